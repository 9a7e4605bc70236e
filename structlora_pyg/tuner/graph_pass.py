"""The graph pass on one page: factors -> graph -> filter -> coordinator -> factors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric.data import Data
from torch_geometric.typing import Metadata

from structlora_pyg.checks import ConfigError, make_part
from structlora_pyg.config import StructLoraConfig
from structlora_pyg.data.adapters import AdapterSet
from structlora_pyg.data.edges import GRADIENT_EDGES
from structlora_pyg.data.encoding import make_encoding
from structlora_pyg.data.graph_builder import GraphBuilder
from structlora_pyg.data.transforms import StructureTransforms
from structlora_pyg.nn.attention import unexplained
from structlora_pyg.nn.bottleneck import Information
from structlora_pyg.nn.coordinator import Coordinator
from structlora_pyg.nn.filter import OpenGates, make_filter
from structlora_pyg.nn.learned_edges import LearnedEdges
from structlora_pyg.nn.levels import Levels
from structlora_pyg.nn.lift import Lift, make_lift
from structlora_pyg.stage_config import CoordinatorConfig
from structlora_pyg.tuner.distributed import whole
from structlora_pyg.tuner.gradients import GradientSketch

Factors = dict[str, tuple[Tensor, Tensor]]  # A (r, d_in) and B (d_out, r) by layer
Lifted = list[tuple[list[int], Tensor, Tensor]]  # per shape: its adapters, their A' (n, r, d_in) and B' (n, d_out, r)

LEVEL_CHANNELS = 16  # a level is one number, and few held-out batches teach it


class GraphPass(nn.Module):
    """The stages that turn the factors of a model's adapters into coordinated ones.

    It computes and knows nothing of training loops; `structlora_pyg.tuner.hooks.PassHooks` says when it runs.

    Args:
        adapters: The adapters.
        graph: Builds the `Data`.
        stages: The filter, then any number of ``Data -> Data`` modules, the coordinator last.
        lift: Turns messages back into factors.
        information: The auxiliary loss.
        sketch: Gradient edges, or None for edge sets without.
        warmup_steps: Optimizer steps of plain LoRA at the start.
        ramp_steps: Optimizer steps over which the auxiliary loss then reaches its weight.

    Attributes:
        step: Optimizer steps seen.
        config: What `from_config` was given.
    """

    config: StructLoraConfig | None = None

    def __init__(
        self,
        adapters: AdapterSet,
        graph: GraphBuilder,
        stages: list[nn.Module],
        lift: Lift,
        information: Information,
        sketch: GradientSketch | None = None,
        warmup_steps: int = 20,
        ramp_steps: int = 80,
    ) -> None:
        super().__init__()
        self.adapters = adapters
        self.graph, self.stages, self.lift, self.information = graph, nn.ModuleList(stages), lift, information
        self.sketch = sketch
        self.warmup_steps, self.ramp_steps = warmup_steps, ramp_steps
        self.step = 0

    @classmethod
    def from_config(cls, adapters: AdapterSet, config: StructLoraConfig) -> GraphPass:
        """Return the graph pass of a configuration over a set of adapters.

        Raises:
            ConfigError: Learned edges for a convolution that reads no edge weights.
            ValueError: A convolution or a transform that does not fit the graph.
        """
        widths = [a.in_features for a in adapters], [a.out_features for a in adapters]
        encoding = make_encoding(config.encoding.kind, *widths, config.encoding.size, config.seed)
        options = vars(config.graph).copy()
        learned, ema = options["edges"] == "learned", options.pop("ema")
        specs, virtual_nodes = options.pop("transforms"), options.pop("virtual_nodes")
        del options["refresh_every"]
        transforms = StructureTransforms(specs, virtual_nodes, config.seed) if specs else None
        graph = GraphBuilder(adapters, encoding, transforms=transforms, seed=config.seed, **options)
        with torch.random.fork_rng():  # the base's own randomness must not depend on our parts
            torch.manual_seed(config.seed)
            gating = _some(config.filter, "kind", "noise", "prior", "temperature", "init_logit", "lr_scale", "keep")
            stages = [make_filter(scaling=graph.scaling, slots=graph.slots, seed=config.seed, **gating)]
            example = stages[0](graph.example())
            known = {"channels": graph.num_features, "example": example}
            stages += [make_part(spec, known, what="stage") for spec in config.stages]
            if config.coordinator.conv not in (None, "none") and config.coordinator.lift != "none":
                stages += [LearnedEdges(graph.num_features, config.graph.top_k)] if learned else []
                coordinator = make_coordinator(
                    config.coordinator, graph.num_features, example, graph.metadata(), graph.features
                )
                stages.append(coordinator)
                if learned and not {"edge_weight", "edge_attr"} & set(coordinator.edge_information):
                    raise ConfigError(
                        [
                            f"graph.edges=learned with coordinator.conv={config.coordinator.conv!r}, which reads no "
                            "edge weights: no gradient would reach them. Choose GCNConv, GATv2Conv, GraphConv, "
                            "TransformerConv"
                        ]
                    )
            if config.taught:
                stages.append(make_levels(config, graph, example))
            lift = make_lift(config.coordinator.lift, encoding.in_size, encoding.out_size, graph.rank)
            terms = _some(config.filter, "beta", "compression", "gamma", "label_term", "num_labels")
            information = Information(int((graph.scaling != 0).sum()), **terms)
        sketch = None
        if graph.edges in GRADIENT_EDGES:
            sketch = GradientSketch(adapters, ema, config.seed)
        graph_pass = cls(adapters, graph, stages, lift, information, sketch, **vars(config.schedule))
        graph_pass.config = config
        if (network := graph_pass.coordinator) is not None:
            network.log(example)
        return graph_pass

    def forward(self) -> tuple[Data, Lifted]:
        """Return the coordinated graph and, per shape, the coordinated factors A' (n, r, d_in), B' (n, d_out, r)."""
        factors = list(self.adapters.factors(self.graph.scaling.device))
        data = self.graph(factors)
        data.active, data.step = self.active, self.step
        with unexplained(self.stages):
            for stage in self.stages:
                data = stage(data)
        return data, [self._lift(k, data, A, B) for k, (_, A, B) in enumerate(factors)]

    def _lift(self, k: int, data: Data, A: Tensor, B: Tensor) -> tuple[list[int], Tensor, Tensor]:
        """Return group `k` of adapters with the gates, and what the coordinator adds, in their factors."""
        gate = self.graph.of_group(k, data.gate)
        group = self.adapters.groups[k]
        if "message" not in data or not self.active:
            # All parameters take part in every backward pass, as DistributedDataParallel demands.
            idle = [*self.lift.parameters(), *([data.message] if "message" in data else [])]
            return group, A, B * gate.unsqueeze(1) + 0.0 * sum(t.sum() for t in idle)
        code_A, code_B = self.graph.of_group(k, data.code_A), self.graph.of_group(k, data.code_B)
        scaling = self.graph.of_group(k, data.scaling)[:, 0].view(-1, 1, 1)
        message = self.graph.code_of_group(k, data.message) / scaling
        encoding = self.graph.encoding
        P, Q = encoding.basis("in", A.size(-1)), encoding.basis("out", B.size(-2))
        return group, *self.lift(A, B, gate, code_A, code_B, message, P, Q)

    def noise_of(self, data: Data, lifted: Lifted) -> dict[str, Tensor]:
        """Return the noise level of every direction (r, 1) by layer; empty where the filter has no noise."""
        if "level" not in data:
            return {}
        found: dict[str, list[tuple[int, Tensor]]] = {}
        for k, (group, A, _) in enumerate(lifted):
            level = self.graph.of_group(k, data.level)
            level = F.pad(level, (0, A.size(1) - level.size(1))).unsqueeze(-1)  # a dense lift adds directions
            for i, own in zip(group, level.unbind(), strict=True):
                found.setdefault(self.adapters[i].layer, []).append((self.adapters[i].ranks.start, own))
        ordered = {path: [own for _, own in sorted(parts, key=lambda p: p[0])] for path, parts in found.items()}
        return {path: parts[0] if len(parts) == 1 else torch.cat(parts) for path, parts in ordered.items()}

    @torch.no_grad()
    def evaluated(self) -> tuple[Data, Lifted]:
        """Return what `forward` does, in eval mode, in float32 and without gradients."""
        device = self.graph.scaling.device.type
        with whole(self.reads()), evaluating(self), torch.autocast(device, enabled=False):
            return self()

    def reads(self) -> list[nn.Parameter]:
        """Return every parameter that the pass reads: those of the adapters and its own."""
        return [*self.adapters.parameters(), *self.parameters()]

    @property
    def leaves_updates(self) -> bool:
        """Whether every update stays as it is, so that the pass gives noise levels alone."""
        first, *others = self.stages
        alone = type(self.lift) is Lift and self.sketch is None and all(isinstance(s, Levels) for s in others)
        return alone and type(first) is OpenGates and first.factor is None

    @property
    def levels(self) -> Levels | None:
        """The stage that held-out loss teaches; None where the noise levels are fixed."""
        return next((stage for stage in self.stages if isinstance(stage, Levels)), None)

    def taught(self) -> list[nn.Parameter]:
        """Return the parameters that held-out loss teaches, which no optimizer holds."""
        levels = self.levels
        return [] if levels is None else [p for name, p in levels.named_parameters() if name in levels.learned]

    @property
    def coordinator(self) -> Coordinator | None:
        """The network that passes messages, a stage or part of one; None without."""
        return next((module for module in self.stages.modules() if isinstance(module, Coordinator)), None)

    @property
    def active(self) -> bool:
        """Whether filter and coordinator act: the warm-up is over."""
        return self.step >= self.warmup_steps

    @property
    def ramp(self) -> float:
        """Weight of the auxiliary loss at this step, in [0, 1]; 0 in eval mode."""
        if not self.training or not self.active:
            return 0.0
        return min(1.0, (self.step - self.warmup_steps + 1) / (self.ramp_steps + 1))

    def set_gradient_edges(self) -> None:
        """Take gradient edges from what the sketch has seen."""
        if self.sketch is not None:
            # In float64: the last bits of a product in float32 are not the same from one place in memory to another.
            g = F.normalize(self.graph.node_gradients(self.sketch.average).double(), dim=1)
            cosine = (g @ g.T).float()
            least = self.graph.threshold + 2 * self.sketch.error  # above the threshold for certain
            self.graph.set_edges(cosine.masked_fill(cosine < least, -1.0))

    def get_extra_state(self) -> Tensor:
        """Return the step count, for ``state_dict``."""
        return torch.tensor([self.step])

    def set_extra_state(self, state: Tensor) -> None:
        """Restore the step count."""
        self.step = int(state)

    def _apply(self, fn: Callable, recurse: bool = True) -> GraphPass:
        """Follow moves to a device and to float64, but stay in float32 where the model goes to half precision."""

        def keep_precision(t: Tensor) -> Tensor:
            moved = fn(t)
            return t.to(moved.device) if moved.dtype in (torch.float16, torch.bfloat16) else moved

        return super()._apply(keep_precision, recurse)


def make_coordinator(
    config: CoordinatorConfig,
    channels: int,
    example: Data,
    metadata: Metadata | None = None,
    features: Sequence[str] | None = None,
) -> Coordinator:
    """Return the coordinator of a configuration for codes of `channels` features on graphs like `example`."""
    options = {name: value for name, value in vars(config).items() if name not in ("lift", "levels")}
    return Coordinator(channels, example=example, metadata=metadata, features=features, **options)


def make_levels(config: StructLoraConfig, graph: GraphBuilder, example: Data) -> Levels:
    """Return the stage that writes the noise levels of a configuration's adapter graph."""
    own, roles, network = config.coordinator, len(graph.role_names), None
    if own.levels == "graph" and own.conv not in (None, "none"):
        small = dataclasses.replace(own, hidden_channels=LEVEL_CHANNELS, bounded=True)
        network = make_coordinator(small, Levels.num_features(roles), example, graph.metadata(), graph.features)
    free = own.levels == "free"
    return Levels(graph.num_nodes, roles, network, free, config.filter.most_noise, LEVEL_CHANNELS)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module into eval mode for a while."""
    was = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was)


@torch.no_grad()
def adapter_factors(graph_pass: GraphPass, rank: int | None = None) -> tuple[list[tuple[Tensor, Tensor]], float]:
    """Return (A, B) in float32 of every adapter with gates and coordination folded in, and the largest error.

    Args:
        graph_pass: The graph pass.
        rank: Cut adapters of linear layers to at most this rank, by SVD; the error is relative to the norm of the
            update. Without it the error is 0: what the ``dense`` lift adds to the rank stays, up to the layer's width.
    """
    _, lifted = graph_pass.evaluated()
    adapters, worst = graph_pass.adapters, 0.0
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for group, A, B in lifted:
        first = adapters[group[0]]
        most = min(A.size(2), B.size(1)) if A.size(1) > first.r else A.size(1)
        if rank is not None and adapters.is_linear(first.layer):
            most = min(most, rank)
        if A.size(1) > most:
            A, B, error = truncate(A, B, most)
            worst = max(worst, error if rank is not None else 0.0)  # else it is rounding
        found |= dict(zip(group, zip(A, B, strict=True), strict=True))
    return [found[i] for i in range(len(adapters))], worst


def plain_factors(graph_pass: GraphPass, rank: int | None = None) -> tuple[Factors, float]:
    """Return the factors of every adapted layer, and the largest error, see `adapter_factors`."""
    adapters, (pairs, worst) = graph_pass.adapters, adapter_factors(graph_pass, rank)
    parts: dict[str, list[tuple[int, Tensor, Tensor]]] = {}
    for i, (a, b) in enumerate(pairs):
        parts.setdefault(adapters[i].layer, []).append((i, a, b))
    return {path: adapters.join(path, pieces) for path, pieces in parts.items()}, worst


def check_finite(factors: Factors) -> None:
    """Refuse factors that are not finite.

    Raises:
        ValueError: With the first layer that has some.
    """
    for path, (a, b) in factors.items():
        if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
            raise ValueError(f"the factors of {path} are not finite; go back to the last good checkpoint")


def truncate(A: Tensor, B: Tensor, r: int) -> tuple[Tensor, Tensor, float]:
    """Return the best factors of rank r of B A (stacked), and the largest relative error in Frobenius norm."""
    q_b, r_b = torch.linalg.qr(B)
    q_a, r_a = torch.linalg.qr(A.mT)
    u, s, vh = torch.linalg.svd(r_b @ r_a.mT)
    total = s.square().sum(-1)
    lost = s[:, r:].square().sum(-1) / total.clamp(min=1e-30)
    root = s[:, :r].sqrt()
    new_b = q_b @ (u[:, :, :r] * root.unsqueeze(1))
    new_a = (root.unsqueeze(-1) * vh[:, :r]) @ q_a.mT
    return new_a, new_b, float(lost.max().sqrt())


def _some(config: Any, *names: str) -> dict[str, Any]:
    return {name: getattr(config, name) for name in names}
