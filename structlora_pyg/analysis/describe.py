"""The resolved pipeline of a model in words."""

from __future__ import annotations

from collections import Counter

from structlora_pyg.nn.lift import Lift
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
        f"  {_lift_name(graph_pass.lift)}",
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


def _lift_name(lift: Lift) -> str:
    return f"{type(lift).__name__}()"
