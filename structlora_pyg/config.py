"""Typed configuration, as dataclasses.

Components never see these objects; `structlora_pyg.model` and `structlora_pyg.train` unpack them into plain
arguments. Every problem of a configuration is reported in one `ConfigError`, before any weight is loaded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

from peft import LoraConfig

from structlora_pyg.alarms import Policy
from structlora_pyg.checks import ConfigError, at_least, between, build, hints_of, not_one_of, positive

EdgeKind = Literal["depth_chain", "same_block", "gradient", "hybrid", "full", "random", "learned", "none"]
FilterKind = Literal["hard_concrete", "gumbel_sigmoid", "none", "random_mask", "topk_norm"]
LiftKind = Literal["mixing", "basis", "tangent", "project", "gate", "scale", "dense"]
MethodName = Literal[
    "full", "head", "lora", "qlora", "dora", "adalora", "sensitivity_lora", "lora_dropout", "dylora", "lora_fa", "vera",
    "lora_cos", "lora_laplacian", "structlora", "structlora_qlora", "structlora_dora", "structlora_fa",
]  # fmt: skip
# Schedules of Transformers that need nothing but the number of steps.
SCHEDULES = (
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt",
)  # fmt: skip
TaskName = Literal[
    "rte", "mrpc", "cola", "stsb", "wnli", "sst2", "qnli", "qqp", "mnli", "boolq", "piqa", "cifar100", "image_folder",
    "captions", "vqa", "text",
]  # fmt: skip

# Starts of lora_A that leave the base weights alone. PEFT's pissa, olora, corda, loftq and lora_ga rewrite them, so
# an adapter trained from such a start only fits the rewritten base and could not be exported as a plain LoRA.
LORA_STARTS = (True, False, "gaussian", "orthogonal", "shared", "gradient")


@dataclass(kw_only=True)
class GraphConfig:
    """How the adapter set becomes a graph.

    Args:
        node: ``adapter``: one node per adapted weight. ``layer``: one node per block, its adapters concatenated
            (the paper's reading).
        edges: ``depth_chain`` (same role, consecutive depth), ``same_block``, ``gradient`` (cosine of the layers'
            gradients), ``hybrid`` (chain and gradient), ``full``, ``random`` (as many edges as the chain), ``learned``
            (of all pairs, by a similarity that is trained), ``none``.
        refresh_every: Optimizer steps between two refreshes of the gradient edges, and between two entries of learned
            edges in the edge log, >= 1.
        top_k: Gradient or learned edges kept per node, >= 1.
        threshold: Least gradient cosine of an edge, in [0, 1).
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
    edges: EdgeKind = "hybrid"
    refresh_every: int = 50
    top_k: int = 3
    threshold: float = 0.3
    ema: float = 0.9
    edge_features: bool = False
    edge_types: bool = False
    transforms: list[Any] = field(default_factory=list)
    virtual_nodes: int = 0
    shuffle_nodes: bool = False

    def problems(self) -> list[str]:
        """Return every problem of the values, empty if there is none."""
        found = []
        if self.shuffle_nodes and self.edges in ("full", "none", "learned"):
            found.append(f"shuffle_nodes has no effect with edges={self.edges}, where all nodes are alike; remove it")
        for spec in self.transforms:
            if not (isinstance(spec, str) or callable(spec) or (isinstance(spec, Mapping) and "name" in spec)):
                found.append(f"transforms: {spec!r} is no class name, no mapping with a name, and no transform")
        if self.virtual_nodes and not self.transforms:
            found.append(f"virtual_nodes={self.virtual_nodes} has no effect without transforms; remove it")
        if self.edges == "learned" and self.transforms:
            found.append("transforms work on fixed edges, learned ones change at every step; leave out one of the two")
        return [
            *found,
            *at_least(self, 0, "virtual_nodes"),
            *at_least(self, 1, "refresh_every", "top_k"),
            *between(self, 0.0, 1.0, "threshold", "ema", open_right=True),
        ]


@dataclass(kw_only=True)
class EncodingConfig:
    """How adapters of different shapes meet in one code space.

    Args:
        kind: ``sketch``: seeded bilinear random projection. ``span``: projection on what the updates of all layers of
            a width share most of, taken when filter and coordinator begin to act. ``exact``: the flattened update
            itself, for tiny layers.
        size: Side p of the code; a node has p * p features. Ignored by ``exact``, >= 1.
    """

    kind: Literal["sketch", "span", "exact"] = "sketch"
    size: int = 16

    def problems(self) -> list[str]:
        """Return every problem of the values, empty if there is none."""
        return at_least(self, 1, "size")


@dataclass(kw_only=True)
class FilterConfig:
    """The information-bottleneck filter over rank-one directions.

    Args:
        kind: ``hard_concrete`` (exact zeros, prunable), ``gumbel_sigmoid`` (soft), ``none``, or a control:
            ``random_mask``, ``topk_norm``. A dotted path to a ``Data -> Data`` module class is accepted too.
        beta: Weight of the compression term, an average over gates, >= 0. The default leaves it to the task which
            gates close; about 1 pulls all gates to their prior, a strong regulariser that can help with few examples.
        compression: ``gate``: KL of the gates to their prior. ``vib``: per-input bound on the rank code.
        gamma: Weight of the label term, >= 0. It needs `label_term`.
        label_term: ``none``, ``decoder`` (a training-only head reads the gated rank codes), ``infonce``, or ``task``
            (the network is the decoder: the task loss is weighted by 1 + gamma).
        num_labels: Number of classes for ``decoder`` and ``infonce``.
        prior: Probability of an open gate under the prior, in (0, 1).
        temperature: Temperature of the concrete distribution, > 0.
        init_logit: Gate logit at the start; +4 is open with little noise, +2.5 with more.
        lr_scale: Learning rate of the gate logits relative to the optimizer's, > 0.
        keep: Fraction of directions that the controls ``random_mask`` and ``topk_norm`` keep, in (0, 1].
    """

    kind: str = "hard_concrete"
    beta: float = 0.01
    compression: Literal["gate", "vib"] = "gate"
    gamma: float = 0.0
    label_term: Literal["none", "decoder", "infonce", "task"] = "none"
    num_labels: int | None = None
    prior: float = 0.5
    temperature: float = 2.0 / 3.0
    init_logit: float = 4.0
    lr_scale: float = 10.0
    keep: float = 0.5

    def problems(self) -> list[str]:
        """Return every problem of the values, empty if there is none."""
        found = [
            *at_least(self, 0.0, "beta", "gamma"),
            *between(self, 0.0, 1.0, "prior", open_left=True, open_right=True),
            *between(self, 0.0, 1.0, "keep", open_left=True),
            *positive(self, "temperature", "lr_scale"),
        ]
        if "." not in self.kind and self.kind not in get_args(FilterKind):
            found.append(not_one_of("kind", self.kind, get_args(FilterKind), "or a dotted path"))
        if (self.gamma > 0) != (self.label_term != "none"):
            found.append(
                f"gamma={self.gamma} with label_term={self.label_term!r} has no effect; set both or neither "
                "(for instance gamma=0.1 label_term=decoder num_labels=2)"
            )
        if self.label_term in ("decoder", "infonce") and (self.num_labels or 0) < 2:
            found.append(f"label_term={self.label_term!r} needs num_labels >= 2, got {self.num_labels}")
        return found


@dataclass(kw_only=True)
class CoordinatorConfig:
    """The message-passing network over the adapter graph.

    Args:
        conv: Any convolution of `torch_geometric.nn`: class name, dotted path, class or instance. ``none`` turns the
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
        ignore_edge_weight: Allow a convolution that cannot take the graph's edge weights.
        lr_scale: Learning rate of the coordinator's gain relative to the optimizer's, > 0.
        lift: How refined codes become factors: ``mixing``, ``basis``, ``tangent``, ``project``, ``gate``, ``scale``,
            ``dense``; see `structlora_pyg.lifts`.
    """

    conv: Any = "GCNConv"
    conv_kwargs: dict[str, Any] = field(default_factory=dict)
    num_layers: int = 1
    hidden_channels: int = 64
    act: str = "tanh"
    residual: bool = True
    hetero: Literal["none", "hetero_conv", "to_hetero"] = "none"
    messages: bool = True
    frozen: bool = False
    ignore_edge_weight: bool = False
    lr_scale: float = 1.0
    lift: LiftKind = "tangent"

    def problems(self) -> list[str]:
        """Return every problem of the values, empty if there is none."""
        found = []
        if self.conv in (None, "none"):
            unused = {"messages=false": not self.messages, "frozen=true": self.frozen}
            found = [f"{text} has no effect with conv=none; remove it" for text, given in unused.items() if given]
        elif not isinstance(self.conv, str) and not callable(self.conv):
            found.append(f"conv={self.conv!r} is no class name, dotted path, class or module")
        return [*found, *at_least(self, 1, "num_layers", "hidden_channels"), *positive(self, "lr_scale")]


@dataclass(kw_only=True)
class ScheduleConfig:
    """When filter and coordinator start to act; counted in optimizer steps, which are detected, never reported.

    Args:
        warmup_steps: Steps of plain LoRA at the start (lora_B = 0 gives gates and graph nothing to see), >= 0.
        ramp_steps: Steps over which the auxiliary terms then rise linearly to their weights, >= 0.
    """

    warmup_steps: int = 20
    ramp_steps: int = 80

    def problems(self) -> list[str]:
        """Return every problem of the values, empty if there is none."""
        return at_least(self, 0, "warmup_steps", "ramp_steps")


@dataclass(kw_only=True)
class StructLoraConfig(LoraConfig):
    """A `peft.LoraConfig` with a graph, a filter and a coordinator.

    All arguments of `peft.LoraConfig` are accepted and keep their meaning. `init_lora_weights` knows two more values:
    ``shared`` (one draw of lora_A for all adapters of a role and width) and ``gradient`` (top singular directions of
    the loss gradient; needs `train_step` in `get_structlora_model`).

    Args:
        r: Rank of every adapter, >= 1.
        lora_alpha: Scaling times rank; usually 2 r. PEFT's default is 8.
        target_modules: Names, or a regular expression, of the layers to adapt; ``all-linear``; default: what PEFT
            uses for the architecture.
        lora_dropout: Dropout before lora_A, in [0, 1).
        bias: Biases to train: ``none``, ``all``, ``lora_only``.
        modules_to_save: Modules to train and save as a whole, such as a new head.
        init_lora_weights: Start of lora_A: ``true`` (PEFT's), ``gaussian``, ``orthogonal``, ``shared``, ``gradient``;
            ``false`` leaves both factors random.
        rank_pattern: Ranks by module name where they differ from `r`.
        fused_slices: Slices of a fused projection (``qkv``, ``c_attn``, ``in_proj``) to adapt, a subset of
            ``["q", "k", "v"]``; each slice is an adapter of rank r of its own. Default: the layer as a whole.
        graph: See `GraphConfig`.
        encoding: See `EncodingConfig`.
        filter: See `FilterConfig`.
        coordinator: See `CoordinatorConfig`.
        schedule: See `ScheduleConfig`.
        alarms: What happens when training silently goes wrong (a layer or a stage without gradient, all gates closed,
            no edges, codes that are not finite): ``warn``, ``error`` or ``off``.
        seed: Seed of sketches, gate noise and random edges, >= 0.

    Raises:
        ConfigError: With every problem found.
    """

    checks_itself: ClassVar[bool] = True
    init_lora_weights: Any = True  # PEFT's own annotation does not know our starts
    fused_slices: list[str] | None = None
    graph: GraphConfig = field(default_factory=GraphConfig)
    encoding: EncodingConfig = field(default_factory=EncodingConfig)
    filter: FilterConfig = field(default_factory=FilterConfig)
    coordinator: CoordinatorConfig = field(default_factory=CoordinatorConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    alarms: Policy = "warn"
    seed: int = 0

    def __post_init__(self) -> None:
        """Build nested sections from mappings and raise every problem at once."""
        found: list[str] = []
        for name in SECTIONS:
            value = getattr(self, name)
            if isinstance(value, Mapping):
                section, section_problems = build(hints_of(type(self))[name], value, prefix=f"{name}.")
                found += section_problems
                if section is not None:
                    setattr(self, name, section)
            elif not isinstance(value, hints_of(type(self))[name]):
                found.append(f"{name}: got {value!r}, expected a section of settings")
            else:
                found += [f"{name}.{p}" for p in value.problems()]
        if not isinstance(self.r, int) or self.r < 1:
            found.append(f"r must be an integer >= 1, got {self.r!r}; 8 is a usual rank")
        if not self.lora_alpha > 0:
            found.append(f"lora_alpha must be > 0, got {self.lora_alpha!r}; 2 * r is usual")
        if not 0.0 <= self.lora_dropout < 1.0:
            found.append(f"lora_dropout must be in [0, 1), got {self.lora_dropout!r}")
        for name in ("target_modules", "exclude_modules", "modules_to_save"):
            value = getattr(self, name)
            names = value if isinstance(value, (list, set, tuple)) else [value]
            if value is not None and not all(isinstance(n, str) for n in names):
                found.append(f"{name} must be a name or a list of names, got {value!r}")
        if self.init_lora_weights not in LORA_STARTS:
            found.append(
                f"init_lora_weights={self.init_lora_weights!r} is not available; allowed: {LORA_STARTS}. Starts that "
                "rewrite the base weights cannot be exported as a plain LoRA; 'gradient' is the gradient-aligned one"
            )
        sound = isinstance(self.coordinator, CoordinatorConfig) and isinstance(self.graph, GraphConfig)
        if sound and self.coordinator.conv in (None, "none"):
            idle = {"graph.edges=learned": self.graph.edges == "learned"}
            idle[f"coordinator.hetero={self.coordinator.hetero}"] = self.coordinator.hetero != "none"
            found += [
                f"{key} has no effect with coordinator.conv=none; remove it" for key, given in idle.items() if given
            ]
        if sound and self.graph.edges == "none" and self.coordinator.hetero != "none":
            found.append(
                f"coordinator.hetero={self.coordinator.hetero} needs edges between types; choose other graph.edges, or "
                "coordinator.hetero=none"
            )
        if sound and not self.coordinator.messages and self.graph.edges == "learned":
            found.append("graph.edges=learned cannot be learned with coordinator.messages=false; set graph.edges=none")
        found += at_least(self, 0, "seed")
        if self.alarms not in get_args(Policy):
            found.append(not_one_of("alarms", self.alarms, get_args(Policy)))
        slices = self.fused_slices
        if slices is not None and (not slices or len(set(slices)) < len(slices) or not set(slices) <= set("qkv")):
            found.append(f"fused_slices must be a non-empty subset of ['q', 'k', 'v'], got {slices!r}")
        for pattern, rank in (self.rank_pattern or {}).items():
            if rank < 1:
                found.append(f"rank_pattern[{pattern!r}] must be >= 1, got {rank!r}")
        if found:
            raise ConfigError(found)
        super().__post_init__()

    def to_lora_config(self, **changes: Any) -> LoraConfig:
        """Return the plain `peft.LoraConfig` inside, with `changes` applied."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(LoraConfig) if f.init}
        return LoraConfig(**{**values, **changes})

    def foreign_code(self) -> list[str]:
        """Return the settings that name code outside of this library and PyG, which building a model would import."""
        own = ("torch_geometric", "structlora_pyg")
        transforms = [t.get("name") if isinstance(t, Mapping) else t for t in self.graph.transforms]
        named = [("coordinator.conv", self.coordinator.conv), ("filter.kind", self.filter.kind)]
        named += [("coordinator.conv_kwargs", value) for value in self.coordinator.conv_kwargs.values()]
        named += [("graph.transforms", name) for name in transforms]
        return [f"{k}={v}" for k, v in named if isinstance(v, str) and "." in v and v.split(".")[0] not in own]

    def own_fields(self) -> dict[str, Any]:
        """Return what `peft.LoraConfig` does not have, as plain values that `StructLoraConfig(**...)` takes back.

        Raises:
            ConfigError: If the convolution is an object, which cannot be written to a file.
        """
        own = {name: dataclasses.asdict(getattr(self, name)) for name in SECTIONS}
        conv = self.coordinator.conv
        if isinstance(conv, type):
            own["coordinator"]["conv"] = f"{conv.__module__}.{conv.__qualname__}"
        elif conv is not None and not isinstance(conv, str):
            own["coordinator"]["conv"] = None  # an instance travels as weights; the caller passes it again
        return {**own, "fused_slices": self.fused_slices, "alarms": self.alarms, "seed": self.seed}


SECTIONS = ("graph", "encoding", "filter", "coordinator", "schedule")


@dataclass(kw_only=True)
class ModelConfig:
    """The pretrained model.

    Args:
        path: Local folder, local timm ``.safetensors`` file, or hub id.
        library: ``transformers`` or ``timm``.
        architecture: timm's model name; needed with ``library: timm``.
        dtype: Data type of the base weights.
        overrides: Values in place of those of the model's own configuration, for instance
            ``{"hidden_dropout_prob": 0.0}``, and ``attn_implementation``; with timm arguments of its ``create_model``,
            for instance ``{"drop_rate": 0.1}``. Default: none.
    """

    path: str = ""
    library: Literal["transformers", "timm"] = "transformers"
    architecture: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    overrides: dict[str, Any] = field(default_factory=dict)

    def problems(self) -> list[str]:
        """Return every problem of the values, empty if there is none."""
        found = [] if self.path else ["path is missing; give a folder, a file or a hub id"]
        if self.library == "timm" and not self.architecture:
            found.append("architecture is missing; library=timm needs it, for instance deit_tiny_patch16_224")
        if self.library == "transformers" and self.architecture:
            found.append("architecture has no effect with library=transformers; remove it or set library=timm")
        return found


@dataclass(kw_only=True)
class DataConfig:
    """The data set.

    Args:
        task: What to learn; it fixes file layout, loss and metric.
        path: Local folder or file, or hub id. A relative path is looked up in the folder named by the environment
            variable ``STRUCTLORA_DATA`` first, then in the working directory.
        max_length: Tokens an example is truncated to, >= 1; those of a picture count too.
        image_size: Side in pixels that images are resized to, >= 1; a vision-language model has its own.
        prompt: What ``captions`` and ``vqa`` ask the model, ``{question}`` standing for the question; the processor's
            chat template, or the format of LLaVA-1.5, goes around it. Default: what LLaVA is asked.
        train_limit: Use this many training examples, drawn with the seed; default all.
        eval_limit: Use this many evaluation examples, drawn with the seed; default all.
        train_fraction: Train on this share of the training examples, at least one of them, in (0, 1]; what
            `validation_share` holds out is cut off before. The examples are drawn uniformly, whatever their class; with
            one seed, a smaller share is a part of a larger one. Instead of `train_limit`.
        validation_share: Evaluate on this share cut from the training part instead, in [0, 1); the cut is the same for
            every seed, and the evaluation part is not read. For choosing learning rates and other settings: the
            evaluation part is for results.
    """

    task: TaskName = "rte"
    path: str = ""
    max_length: int = 128
    image_size: int = 224
    prompt: str | None = None
    train_limit: int | None = None
    eval_limit: int | None = None
    train_fraction: float = 1.0
    validation_share: float = 0.0

    def problems(self) -> list[str]:
        """Return every problem of the values, empty if there is none."""
        found = [
            *between(self, 0.0, 1.0, "validation_share", open_right=True),
            *between(self, 0.0, 1.0, "train_fraction", open_left=True),
        ]
        if self.train_fraction != 1.0 and self.train_limit is not None:
            found.append(
                f"train_fraction={self.train_fraction:g} and train_limit={self.train_limit} both say how many examples "
                "to train on; give one of them"
            )
        found += [] if self.path else ["path is missing; give a folder, a file or a hub id"]
        if self.prompt is not None:
            if self.task not in ("captions", "vqa"):
                found.append(f"prompt has no effect with task={self.task}; it belongs to captions, vqa")
            elif ("{question}" in self.prompt) != (self.task == "vqa"):
                place = "needs {question} where the question goes" if self.task == "vqa" else "has no {question}"
                found.append(f"prompt={self.prompt!r}: the prompt of task={self.task} {place}")
        limits = [name for name in ("train_limit", "eval_limit") if getattr(self, name) is not None]
        return found + at_least(self, 1, "max_length", "image_size", *limits)


@dataclass(kw_only=True)
class MethodConfig:
    """Which system adapts the model, and what single systems need besides `adapter`.

    Only the ``structlora`` kinds read `adapter.graph` to `adapter.schedule`; the others leave these sections aside, so
    that one file serves a whole comparison.

    Args:
        name: ``structlora``, a baseline, or StructLoRA stacked on one; ``structlora compare --list`` explains each.
        dropout: Probability that a column or row drops out, in (0, 1); ``lora_dropout`` only.
        samples: Mask sets a step and of the ensemble, >= 1; ``lora_dropout`` only.
        ensemble: Evaluate with the ensemble instead of the merged adapter; ``lora_dropout`` only.
        weight: Weight of the penalty, > 0; ``lora_cos`` and ``lora_laplacian`` only.
        vera_r: Rank of the shared factors, >= 1; ``vera`` only.
    """

    name: MethodName = "structlora"
    dropout: float = 0.2
    samples: int = 4
    ensemble: bool = False
    weight: float = 0.1
    vera_r: int = 256

    def problems(self) -> list[str]:
        """Return every problem of the values, empty if there is none."""
        found = [
            *between(self, 0.0, 1.0, "dropout", open_left=True, open_right=True),
            *at_least(self, 1, "samples", "vera_r"),
            *positive(self, "weight"),
        ]
        uses: dict[str, tuple[str, ...]] = dict.fromkeys(("dropout", "samples", "ensemble"), ("lora_dropout",))
        uses |= {"weight": ("lora_cos", "lora_laplacian"), "vera_r": ("vera",)}
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        for key, names in uses.items():
            if getattr(self, key) != defaults[key] and self.name not in names:
                found.append(f"{key} has no effect with name={self.name}; it belongs to {', '.join(names)}")
        return found


@dataclass(kw_only=True)
class TrainConfig:
    """The training loop.

    Args:
        output_dir: Folder for checkpoints, results and the exported adapter.
        epochs: Passes over the training set, > 0. `max_steps` wins if given.
        max_steps: Optimizer steps, >= 1; default: from `epochs`.
        batch_size: Examples a forward, >= 1.
        eval_batch_size: Examples a forward in evaluation, >= 1.
        gradient_accumulation_steps: Forwards an optimizer step, >= 1.
        lr: Peak learning rate, > 0.
        weight_decay: AdamW's decoupled decay, >= 0; gates have none.
        lr_scheduler: One of Transformers' schedules that need nothing but the number of steps.
        warmup_ratio: Share of the steps with rising learning rate, in [0, 1).
        max_grad_norm: Gradients are clipped to this norm, > 0.
        mixed_precision: Accelerate's mixed precision.
        gradient_checkpointing: Recompute activations (non-reentrant) to save memory.
        eval_every: Optimizer steps between evaluations; 0: at the end only.
        save_every: Optimizer steps between checkpoints; 0: at the end only.
        keep_checkpoints: Number of checkpoints kept, >= 1.
        watch_every: Optimizer steps between looks at the structure of updates and gradients (LoRA kinds only); 0: none.
        record_every: Optimizer steps between records of the adapter graph in ``<output_dir>/graphs`` (``structlora``
            kinds only), a PyG dataset, see `structlora_pyg.graph_dataset`; 0: none.
        trackers: Trackers to log to, by the names that Accelerate knows: ``tensorboard``, ``wandb``, ``mlflow``, ...
            They get what ``metrics.jsonl`` gets; local files go to ``<output_dir>/logs``.
        importance_examples: Measure after training what the removal of each direction costs, on this many evaluation
            examples (``structlora`` kinds only); a forward pass a direction. 0: do not.
        nonfinite: When loss or gradient are not finite: ``stop``, or ``skip`` the step and go on, ten times in a row
            at most.
        seed: Seed of head, data order, dropout and limits.
    """

    output_dir: str = "runs/train"
    epochs: float = 3.0
    max_steps: int | None = None
    batch_size: int = 32
    eval_batch_size: int = 64
    gradient_accumulation_steps: int = 1
    lr: float = 5e-4
    weight_decay: float = 0.01
    lr_scheduler: str = "linear"
    warmup_ratio: float = 0.06
    max_grad_norm: float = 1.0
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    gradient_checkpointing: bool = False
    eval_every: int = 0
    save_every: int = 0
    keep_checkpoints: int = 2
    watch_every: int = 0
    record_every: int = 0
    trackers: list[str] = field(default_factory=list)
    importance_examples: int = 0
    nonfinite: Literal["stop", "skip"] = "stop"
    seed: int = 0

    def problems(self) -> list[str]:
        """Return every problem of the values, empty if there is none."""
        found = [] if self.max_steps is None else at_least(self, 1, "max_steps")
        if self.lr_scheduler not in SCHEDULES:
            found.append(not_one_of("lr_scheduler", self.lr_scheduler, SCHEDULES))
        return [
            *found,
            *positive(self, "epochs", "lr", "max_grad_norm"),
            *at_least(self, 1, "batch_size", "eval_batch_size", "gradient_accumulation_steps", "keep_checkpoints"),
            *at_least(self, 0, "weight_decay", "eval_every", "save_every", "watch_every", "record_every"),
            *at_least(self, 0, "importance_examples", "seed"),
            *between(self, 0.0, 1.0, "warmup_ratio", open_right=True),
        ]


@dataclass(kw_only=True)
class RunConfig:
    """Everything ``structlora train`` needs.

    Args:
        model: See `ModelConfig`.
        data: See `DataConfig`.
        adapter: See `StructLoraConfig`.
        method: See `MethodConfig`.
        train: See `TrainConfig`.
    """

    model: ModelConfig
    data: DataConfig
    adapter: StructLoraConfig = field(default_factory=StructLoraConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def problems(self) -> list[str]:
        """Return nothing: the sections report their own problems."""
        return []
