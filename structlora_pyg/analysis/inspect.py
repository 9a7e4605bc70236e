"""In words: anybody's LoRA adapter without its base, the pipeline of a model, and what becomes of every convolution."""

from __future__ import annotations

import functools
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch_geometric.data import Data

from structlora_pyg.analysis.structure import Structure, structure_of
from structlora_pyg.data.adapters import AdapterSet
from structlora_pyg.data.graph_builder import GraphBuilder
from structlora_pyg.nn.conv import CONVOLUTIONS, MODELS, edge_information, example_graph, make_conv, try_conv
from structlora_pyg.nn.hetero_conv import RelationalConv
from structlora_pyg.tuner.model import StructLoraModel


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What `inspect_adapter` finds.

    Attributes:
        adapters: The adapters, in the order of their names.
        graph: The adapter graph (``depth_chain``), with ``name``.
        structure: Drift, coherence and similarities.
        norm: (N,) Frobenius norms of the updates.
        effective_rank: (N,) exponential of the entropy of the normalised singular values, in [1, r]; 0 for no update.
        redundancy: (N,) share of the rank that is not used, 1 - effective_rank / r, in [0, 1].
    """

    adapters: AdapterSet
    graph: Data
    structure: Structure
    norm: Tensor
    effective_rank: Tensor
    redundancy: Tensor

    def most_alike(self, count: int = 5) -> list[tuple[str, str, float]]:
        """Return the pairs of adapters with the largest absolute cosine: two names and the cosine."""
        names, n = self.structure.names, len(self.structure.names)
        first, second = torch.triu_indices(n, n, offset=1)
        values = self.structure.similarity[first, second]
        order = values.abs().argsort(descending=True)[:count]
        return [(names[first[k]], names[second[k]], float(values[k])) for k in order]

    def summary(self) -> str:
        """Return the findings as text for a terminal."""
        s, width = self.structure, max(len(a.name) for a in self.adapters)
        lines = [
            f"{len(self.adapters)} adapters of {len(self.adapters.roles)} roles in {len(self.adapters.blocks)} blocks",
            f"adjacent-layer cosine  {s.adjacent_cosine:.4f}",
            f"drift energy           {s.drift_energy:.4g} ({s.relative_drift:.4g} times the mean squared norm)",
            f"mean redundancy        {float(self.redundancy.mean()):.3f}",
            "",
            f"{'adapter':<{width}}  {'r':>3}  {'norm':>10}  {'effective rank':>14}  {'redundancy':>10}",
        ]
        for a, norm, rank, unused in zip(self.adapters, self.norm, self.effective_rank, self.redundancy, strict=True):
            lines.append(f"{a.name:<{width}}  {a.r:>3}  {norm:>10.4g}  {rank:>14.2f}  {unused:>10.3f}")
        lines += ["", "most alike"]
        lines += [f"  {cosine:+.4f}  {one}  {two}" for one, two, cosine in self.most_alike()]
        return "\n".join(lines)


@torch.no_grad()
def inspect_adapter(folder: str | Path) -> Inspection:
    """Return graph and structure of a PEFT LoRA folder; the base model is not needed.

    Args:
        folder: A folder with ``adapter_config.json`` and ``adapter_model.safetensors``. Of a DoRA the low-rank part is
            inspected; its magnitudes are not.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If the adapter is not a LoRA of linear layers, or a file is damaged.
    """
    builder = GraphBuilder.from_model(folder)
    adapters, graph = builder.adapters, builder()
    graph.name = list(builder.node_names)
    pairs = [adapters.pair(a) for a in adapters]
    found = structure_of(adapters, pairs)
    ranks = torch.tensor([_effective_rank(a.double(), b.double()) for a, b in pairs])
    return Inspection(
        adapters=adapters,
        graph=graph,
        structure=found,
        norm=found.gram.diagonal().clamp(min=0).sqrt(),
        effective_rank=ranks,
        redundancy=1 - ranks / torch.tensor([float(a.r) for a in adapters]),
    )


def _effective_rank(a: Tensor, b: Tensor) -> float:
    """Return exp(entropy) of the normalised singular values of B A (Roy and Vetterli, 2007)."""
    singular = torch.linalg.svdvals(torch.linalg.qr(b).R @ torch.linalg.qr(a.mT).R.mT)
    if float(singular.sum()) == 0.0:
        return 0.0
    p = singular / singular.sum()
    return math.exp(float(-(p * p.clamp(min=1e-300).log()).sum()))


def describe(model: StructLoraModel) -> str:
    """Return what was built: adapters, graph, stages, schedule and parameter counts, as text for a terminal."""
    graph_pass, config = model.graph_pass, model.structlora_config
    graph, adapters = graph_pass.graph, graph_pass.adapters
    roles = Counter((a.role, a.in_features, a.out_features, a.r, a.scaling) for a in adapters)
    width = max(len(role) for role, *_ in roles)
    counts = model.parameter_counts()
    base = sum(p.numel() for p in model.parameters()) - sum(counts.values())
    edges = graph.edge_index.size(1) // 2
    kind = f"edges={graph.edges}{', nodes shuffled' if graph.shuffle_nodes else ''}"
    lines = [
        f"StructLoRA on {type(model.get_base_model()).__name__}",
        "",
        f"adapters     {len(adapters)} of {len(adapters.roles)} roles in {len(adapters.blocks)} blocks",
        *(
            f"  {role:<{width}}  x {count:<3}  {d_in} -> {d_out}, r={r}, scaling={scaling:g}"
            for (role, d_in, d_out, r, scaling), count in roles.items()
        ),
        "",
        f"graph        {graph.num_nodes} nodes (node={graph.node}), {edges} undirected edges ({kind})",
        f"  features   {graph.num_features} a node; {graph_pass.graph.encoding}",
    ]
    if graph_pass.sketch is not None:
        lines.append(
            f"  refresh    every {model.hooks.refresh_every} steps from true gradients: top {graph.top_k} with cosine "
            f"> {graph.threshold:g} (until then: the chain)"
        )
    lines += ["", "stages"]
    for stage in graph_pass.stages:
        text = repr(stage).replace("\n", "\n  ")
        lines.append(f"  {text}")
    lines += [
        f"  {type(graph_pass.lift).__name__}()",
        "",
        f"schedule     {graph_pass.warmup_steps} steps plain LoRA, then {graph_pass.ramp_steps} steps ramp; "
        f"beta={config.filter.beta:g}, gamma={config.filter.gamma:g}",
        "",
        "parameters",
        f"  exported       {counts['adapter']:>13,}  adapter",
        f"                 {counts['heads']:>13,}  heads and biases",
        f"  training only  {counts['training_only']:>13,}  gates, coordinator, lift, auxiliary heads",
        f"  frozen         {base:>13,}",
    ]
    return "\n".join(lines)


_METADATA = (["q", "v"], [("q", "same_role", "q"), ("q", "same_block", "v"), ("v", "same_block", "q")])


@dataclass(frozen=True, kw_only=True)
class ConvReport:
    """What the library makes of a convolution of PyTorch Geometric.

    Attributes:
        name: Class name in `torch_geometric.nn`.
        works: Whether it can coordinate.
        edge_information: What it uses of an adapter graph that carries everything.
        hetero: The value of ``coordinator.hetero`` that runs it as relations between roles; empty if there is none.
        reason: Why it is refused without ``coordinator.hetero``; empty if it works.
    """

    name: str
    works: bool
    edge_information: tuple[str, ...]
    hetero: str
    reason: str


@functools.cache
def conv_reports(channels: int = 16) -> list[ConvReport]:
    """Return a report on every convolution and ready stack of `torch_geometric.nn`, by trying it.

    Args:
        channels: Width of the features that each is tried with.
    """
    return [_conv_report(name, channels) for name in (*CONVOLUTIONS, *MODELS)]


def _conv_report(name: str, channels: int) -> ConvReport:
    example = example_graph(channels, weighted=True, relations=4)
    example.node_type = torch.tensor([0, 1, 0, 1])
    used: tuple[str, ...] = ()
    reason, hetero = "", "to_hetero" if name in MODELS else "hetero_conv"
    try:
        conv = make_conv(name, channels, {}, example)
        try_conv(conv, channels, example)
        used = edge_information(conv, example)
    except ValueError as error:
        reason = str(error)
    try:
        RelationalConv(name, channels, _METADATA, hetero, {}, example_graph(channels, weighted=True))
    except ValueError:
        hetero = ""
    return ConvReport(name=name, works=not reason, edge_information=used, hetero=hetero, reason=reason)
