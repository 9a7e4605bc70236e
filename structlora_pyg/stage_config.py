"""Settings of the stages of the graph pass, one dataclass each: graph, encoding, filter, coordinator, schedule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, get_args

from structlora_pyg.checks import Count, CountOrZero, NotNegative, Positive, Section, Share, bounds, part_problems

EdgeKind = Literal["structure", "depth_chain", "same_block", "gradient", "hybrid", "full", "random", "learned", "none"]
FilterKind = Literal["noise", "hard_concrete", "gumbel_sigmoid", "none", "random_mask", "topk_norm"]
Policy = Literal["warn", "error", "off"]
Shared = Literal["graph", "global", "free", "fixed"]
Preset = Literal["default", "paper"]
LiftKind = Literal["none", "tangent", "project", "dense"]


@dataclass(kw_only=True)
class GraphConfig(Section):
    """How the adapter set becomes a graph.

    Args:
        node: ``adapter``: one node per adapted weight. ``layer``: one node per block, its adapters concatenated
            (the paper's reading).
        edges: ``structure`` (chain and block), ``depth_chain`` (same role, consecutive depth), ``same_block``,
            ``gradient`` (cosine of the layers' gradients), ``hybrid`` (chain and gradient), ``full``, ``random`` (as
            many edges as the chain), ``learned`` (of all pairs, by a similarity that is trained), ``none``; or a
            function of your own, itself or by dotted path, see `GraphBuilder`.
        refresh_every: Optimizer steps between two refreshes of the gradient edges, and between two looks for alarms,
            >= 1.
        top_k: Gradient or learned edges kept per node, >= 1.
        threshold: Least gradient cosine of an edge, in [0, 1), which has to be exceeded by two standard errors.
        ema: Decay of the moving average over refreshes of the gradient sketches, in [0, 1).
        edge_features: Give edges four attributes (weight, distance in depth, same role, same block) for convolutions
            that take ``edge_attr``.
        edge_types: Give edges a type (same role, same block, other) for relational convolutions such as ``RGCNConv``.
        transforms: PyG transforms of the structure between filter and coordinator, by class name, or as a mapping of
            ``name`` and arguments: ``[{name: AddLaplacianEigenvectorPE, k: 2}, VirtualNode]``.
        virtual_nodes: Number of nodes the transforms add, >= 0; ``VirtualNode`` adds one.
        shuffle_nodes: Control: every node keeps its code and gets the neighbours of another one, by a permutation drawn
            from the seed; the degrees stay.
    """

    node: Literal["adapter", "layer"] = "adapter"
    edges: Any = "structure"
    refresh_every: Count = 50
    top_k: Count = 3
    threshold: Share = 0.05
    ema: Share = 0.9
    edge_features: bool = False
    edge_types: bool = False
    transforms: list[Any] = field(default_factory=list)
    virtual_nodes: CountOrZero = 0
    shuffle_nodes: bool = False

    def conflicts(self) -> list[str]:
        """Return what does not go together, empty if all does."""
        found = part_problems("edges", self.edges, get_args(EdgeKind))
        if self.shuffle_nodes and self.edges in ("full", "none", "learned"):
            found.append(f"shuffle_nodes has no effect with edges={self.edges}, where all nodes are alike; remove it")
        for spec in self.transforms:
            if not (isinstance(spec, str) or callable(spec) or (isinstance(spec, Mapping) and "name" in spec)):
                found.append(f"transforms: {spec!r} is no class name, no mapping with a name, and no transform")
        if self.virtual_nodes and not self.transforms:
            found.append(f"virtual_nodes={self.virtual_nodes} has no effect without transforms; remove it")
        if self.edges == "learned" and self.transforms:
            found.append("transforms work on fixed edges, learned ones change at every step; leave out one of the two")
        return found


@dataclass(kw_only=True)
class EncodingConfig(Section):
    """How adapters of different shapes meet in one code space.

    Args:
        kind: ``sketch``: seeded bilinear random projection. ``exact``: the flattened update itself, for tiny
            layers. Or an encoding of your own, see `structlora_pyg.data.encoding.make_encoding`.
        size: Side p of the code; a node has p * p features. Ignored by ``exact``, >= 1.
    """

    kind: Any = "sketch"
    size: Count = 16

    def conflicts(self) -> list[str]:
        """Return what does not go together, empty if all does."""
        return part_problems("kind", self.kind, ("sketch", "exact"))


@dataclass(kw_only=True)
class FilterConfig(Section):
    """The information-bottleneck filter over rank-one directions.

    Args:
        kind: How directions are gated: ``noise`` (not at all, only `noise` acts), ``hard_concrete`` (exact zeros,
            prunable), ``gumbel_sigmoid`` (soft), ``none`` (no filter, no noise), or a control: ``random_mask``,
            ``topk_norm``. Or a filter of your own, a ``Data -> Data`` module: dotted path, class or object.
        noise: Level of the multiplicative noise on the rank codes in training, >= 0 and < `most_noise`: the standard
            deviation at the start, from which `CoordinatorConfig.levels` goes on. ``none`` and a filter of one's own
            draw none.
        most_noise: Upper bound of a level, > 0.
        beta: Weight of the compression term, an average over gates, >= 0. The default leaves it to the task which
            gates close; about 1 pulls all gates to their prior, a strong regulariser that can help with few examples.
        compression: ``gate``: KL of the gates to their prior. ``vib``: per-input bound on the rank code.
        gamma: Weight of the label term, >= 0. It needs `label_term`.
        label_term: ``none``, ``decoder`` (a training-only head reads the gated rank codes), ``infonce``, or ``task``
            (the network is the decoder: the task loss is weighted by 1 + gamma).
        num_labels: Number of classes for ``decoder`` and ``infonce``; 1 for real-valued labels.
        prior: Probability of an open gate under the prior, in (0, 1).
        temperature: Temperature of the concrete distribution, > 0.
        init_logit: Gate logit at the start; +4 is open with little noise, +2.5 with more.
        lr_scale: Learning rate of the gate logits relative to the optimizer's, > 0.
        keep: Fraction of directions that the controls ``random_mask`` and ``topk_norm`` keep, in (0, 1].
    """

    kind: Any = "noise"
    noise: NotNegative = 0.5
    most_noise: Positive = 2.5
    beta: NotNegative = 0.01
    compression: Literal["gate", "vib"] = "gate"
    gamma: NotNegative = 0.0
    label_term: Literal["none", "decoder", "infonce", "task"] = "none"
    num_labels: int | None = None
    prior: Annotated[float, bounds(0, 1, open_low=True, open_high=True)] = 0.5
    temperature: Positive = 2.0 / 3.0
    init_logit: float = 4.0
    lr_scale: Positive = 10.0
    keep: Annotated[float, bounds(0, 1, open_low=True)] = 0.5

    @property
    def level(self) -> float:
        """The noise level that the filter draws with at first."""
        return self.noise if self.kind in get_args(FilterKind) and self.kind != "none" else 0.0

    def conflicts(self) -> list[str]:
        """Return what does not go together, empty if all does."""
        found = part_problems("kind", self.kind, get_args(FilterKind))
        if self.noise >= self.most_noise:
            found.append(f"noise={self.noise} must be below most_noise={self.most_noise}; 0.7 is a usual level")
        if (self.gamma > 0) != (self.label_term != "none"):
            found.append(
                f"gamma={self.gamma} with label_term={self.label_term!r} has no effect; set both or neither "
                "(for instance gamma=0.1 label_term=decoder num_labels=2)"
            )
        if self.label_term in ("decoder", "infonce") and (self.num_labels or 0) < 1:
            found.append(
                f"label_term={self.label_term!r} needs num_labels, the number of classes, or 1 for real-valued labels; "
                f"got {self.num_labels}"
            )
        return found


@dataclass(kw_only=True)
class CoordinatorConfig(Section):
    """The message-passing network over the adapter graph.

    Args:
        conv: Any convolution of `torch_geometric.nn`: class name, dotted path, class or instance; with `hetero`, also a
            mapping of relations (``same_role``, ``same_block``, ``other``) to convolutions. ``none`` turns the
            coordinator off.
        conv_kwargs: Extra keyword arguments of the convolution, e.g. ``{"heads": 4}``.
        num_layers: Number of convolutions, >= 1.
        hidden_channels: Width of the convolutions, >= 1.
        act: Activation by the name PyG resolves (``tanh``, ``gelu``, ``elu``, ...).
        residual: Add each convolution's input to its output.
        hetero: ``none``: the same weights for every edge. ``hetero_conv``: a convolution of its own for every edge type
            (role, same_role / same_block / other, role), summed. ``to_hetero``: the same for a ready stack
            (``GraphSAGE``, ``GAT``, ...) or a module of one's own.
        messages: False is a control: a perceptron on each node alone in the place of every convolution, with as many
            parameters, to within ``hidden_channels``.
        frozen: Control: the weights stay at their random start, only the gain is trained (and the lift, where it has
            parameters).
        lr_scale: Learning rate of the coordinator's gain relative to the optimizer's, > 0.
        bounded: A message has at most the length of what it is added to, and begins at 0. False is the paper's own
            update, at full strength: convolutions as wide as the codes (whatever `hidden_channels`), nothing around
            them.
        levels: Who decides the noise levels of the filter, taught by held-out loss, see
            `structlora_pyg.tuner.teaching`: ``graph`` (a common level, and the network by how much nodes differ),
            ``global`` (the common level alone), ``free`` (a common level, and a number of its own for every node),
            ``fixed`` (nobody: they stay at ``filter.noise``).
        lift: How refined codes become factors: ``none`` (the coordinator writes noise levels only), ``tangent``,
            ``project``, ``dense``, see `structlora_pyg.nn.lift`; or a lift of your own: dotted path, class or object.
    """

    conv: Any = "GCNConv"
    conv_kwargs: dict[str, Any] = field(default_factory=dict)
    num_layers: Count = 1
    hidden_channels: Count = 64
    act: str = "tanh"
    residual: bool = True
    hetero: Literal["none", "hetero_conv", "to_hetero"] = "none"
    messages: bool = True
    frozen: bool = False
    lr_scale: Positive = 1.0
    bounded: bool = True
    lift: Any = "none"
    levels: Shared = "graph"

    def conflicts(self) -> list[str]:
        """Return what does not go together, empty if all does."""
        found = part_problems("lift", self.lift, get_args(LiftKind))
        if self.conv in (None, "none"):
            unused = {"messages=false": not self.messages, "frozen=true": self.frozen}
            found += [f"{text} has no effect with conv=none; remove it" for text, given in unused.items() if given]
        elif not isinstance(self.conv, (str, Mapping)) and not callable(self.conv):
            found.append(f"conv={self.conv!r} is no class name, dotted path, class or module")
        elif isinstance(self.conv, Mapping) and self.hetero != "hetero_conv":
            found.append("conv names a convolution for every relation, which needs hetero=hetero_conv")
        return found


@dataclass(kw_only=True)
class ScheduleConfig(Section):
    """When filter and coordinator start to act; counted in optimizer steps, which are detected, never reported.

    Args:
        warmup_steps: Steps of plain LoRA at the start (lora_B = 0 gives gates and graph nothing to see), >= 0.
        ramp_steps: Steps over which the auxiliary terms then rise linearly to their weights, >= 0.
    """

    warmup_steps: CountOrZero = 20
    ramp_steps: CountOrZero = 80


PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "default": {},
    "paper": {  # StructLoRA as arXiv 2603.14228 writes it down
        "graph": {"node": "layer", "edges": "hybrid"},
        "filter": {"kind": "gumbel_sigmoid", "noise": 0.0, "beta": 1.0, "gamma": 0.1, "label_term": "task"},
        "coordinator": {"conv": "GCNConv", "num_layers": 1, "act": "relu", "bounded": False, "lift": "dense"},
    },
}
