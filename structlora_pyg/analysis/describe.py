"""In words: the resolved pipeline of a model, and what the library makes of every convolution."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch

from structlora_pyg.nn.conv import CONVOLUTIONS, MODELS, edge_information, example_graph, make_conv, try_conv
from structlora_pyg.nn.hetero_conv import RelationalConv
from structlora_pyg.tuner.model import StructLoraModel


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
