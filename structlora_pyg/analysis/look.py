"""Figures of what an adapter graph does over training: gates, likeness, attention, curves."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor
from torch_geometric.data import Data

from structlora_pyg.analysis.graph_layout import places
from structlora_pyg.analysis.graph_plots import role_titles
from structlora_pyg.analysis.plot_style import GRID, INK, MUTED, SEQUENTIAL, new_figure, style_axes
from structlora_pyg.analysis.plots import colorbar, similarity_heatmaps, square_heatmaps, thinned, training_curves

LOOKS = {
    "Adjacent-layer cosine": "adjacent_cosine",
    "Cosine of the gradients": "gradient_cosine",
    "Drift energy": "drift_energy",
    "Mean gate": "mean_gate",
}
CURVE_POINTS = 100  # longer curves are averaged over stretches of equal length


def spread(count: int, most: int) -> list[int]:
    """Return at most `most` positions of `count`, evenly spaced, the first and the last among them."""
    return sorted({round(x) for x in np.linspace(0, count - 1, min(count, most))})


def by_role(graph: Data) -> list[int]:
    """Return the nodes of a graph without virtual ones, those of one role together, by depth."""
    depth, role = places(graph)
    return sorted(np.flatnonzero(role >= 0).tolist(), key=lambda i: (role[i], depth[i]))


def gates_over_training(graphs: Sequence[Data], names: Sequence[str] | None = None, stacked: bool = False) -> Figure:
    """Draw the gates of every direction over the steps: a panel a role, a row a direction, the first layer on top.

    Args:
        graphs: Graphs of the same nodes with ``step``, ``gate`` (N, D) in [0, 1] and ``scaling`` (N, D), 0 where a
            node has fewer than D directions.
        names: N names of the nodes.
        stacked: Panels one below the other, for narrow pages.

    Raises:
        ValueError: No graph, or a graph without gates.
    """
    if not graphs or any("gate" not in graph for graph in graphs):
        raise ValueError("graphs must hold at least one graph, each with gate (N, D)")
    depth, role = places(graphs[0])
    order, real = by_role(graphs[0]), graphs[0].scaling != 0
    roles = sorted({int(role[i]) for i in order})
    titles = role_titles(None if names is None else list(names), role)
    table = {
        r: torch.stack([torch.cat([g.gate[i][real[i]] for i in order if role[i] == r]) for g in graphs], 1).numpy()
        for r in roles
    }  # (directions, T) a role
    columns = 1 if stacked else min(len(roles), 3)
    rows = -(-len(roles) // columns)
    height = float(np.clip(0.09 * max(len(values) for values in table.values()), 1.6, 4.6))
    figure = new_figure((4.1 if stacked else 0.9 + 2.2 * max(columns, 2), rows * (height + 0.65)))
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for ax, r in zip(axes, roles, strict=False):
        style_axes(ax, spines=())
        ax.set_title(titles[r], loc="left", fontsize=10, color=INK, fontweight="bold")
        image = ax.imshow(table[r], cmap=SEQUENTIAL, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        nodes = [i for i in order if role[i] == r]
        ends = np.cumsum([int(real[i].sum()) for i in nodes])
        for end in ends[:-1] if len(ends) <= 16 else []:
            ax.axhline(end - 0.5, color=GRID, linewidth=0.8)
        shown = thinned(len(nodes), int(height / 0.16))
        ax.set_yticks(
            [ends[k] - 0.5 - int(real[nodes[k]].sum()) / 2 for k in shown], [str(depth[nodes[k]]) for k in shown]
        )
        ticks = spread(len(graphs), 5)
        ax.set_xticks(ticks, [str(int(graphs[k].step)) for k in ticks])
        ax.set_xlabel("optimizer step", fontsize=9, color=MUTED)
        ax.set_ylabel("depth; a row a direction", fontsize=9, color=MUTED)
        ax.tick_params(length=0)
    for ax in axes[len(roles) :]:
        ax.set_visible(False)
    colorbar(figure, image, axes[: len(roles)], "gate", [0, 0.5, 1])
    return figure


def likeness_over_training(graphs: Sequence[Data], names: Sequence[str] | None = None, stacked: bool = False) -> Figure:
    """Draw the cosines between the codes of the nodes at up to three steps.

    Args:
        graphs: Graphs of the same nodes with ``x`` (N, F) and ``step``. Codes are a random projection of the updates;
            their cosines estimate those of the updates.
        names: N names of the nodes.
        stacked: Panels one below the other, for narrow pages.
    """
    order = by_role(graphs[0])
    panels = {}
    for k in spread(len(graphs), 3):
        x = torch.nn.functional.normalize(graphs[k].x[order], dim=1)
        panels[f"step {int(graphs[k].step)}"] = (x @ x.T).numpy()
    return similarity_heatmaps(panels, [name_of(names, i) for i in order], stacked)


def attention_heatmaps(
    layers: Sequence[tuple[Tensor, Tensor]], graph: Data, names: Sequence[str] | None = None, stacked: bool = False
) -> Figure:
    """Draw the attention weights, averaged over heads: a panel a layer, a row a receiving node, a column a sender.

    Args:
        layers: ``(edge_index (2, E'), alpha (E', heads))`` a layer, see `structlora_pyg.nn.attention`.
        graph: The graph they belong to.
        names: N names of the nodes.
        stacked: Panels one below the other, for narrow pages.

    Raises:
        ValueError: No layer.
    """
    if not layers:
        raise ValueError("layers must hold at least one layer")
    order = by_role(graph)
    panels = {}
    for k, (edge_index, alpha) in enumerate(layers, start=1):
        table = torch.zeros(graph.num_nodes, graph.num_nodes)
        table.index_put_((edge_index[1], edge_index[0]), alpha.float().mean(1), accumulate=True)
        panels[f"layer {k}"] = table[order][:, order].numpy()
    shown = [name_of(names, i) for i in order]
    return square_heatmaps(panels, shown, stacked, SEQUENTIAL, [0, 0.5, 1], "attention, mean over heads")


def recorded_attention(graph: Data) -> list[tuple[Tensor, Tensor]]:
    """Return the attention weights that were recorded with a graph, layer by layer; empty if there are none."""
    found: list[tuple[Tensor, Tensor]] = []
    while f"attention_{len(found)}" in graph:
        found.append((graph[f"attention_index_{len(found)}"], graph[f"attention_{len(found)}"]))
    return found


def loss_curves(lines: Sequence[Mapping[str, Any]], stacked: bool = False) -> Figure | None:
    """Draw the training loss, whole and of the task alone where they differ; None without any step.

    Args:
        lines: The lines of ``metrics.jsonl``.
        stacked: For narrow pages.
    """
    steps = [line for line in lines if line.get("loss") is not None]  # a skipped step has none
    if not steps:
        return None
    width = -(-len(steps) // CURVE_POINTS)
    stretches = [steps[i : i + width] for i in range(0, len(steps), width)]
    x = [stretch[-1]["step"] for stretch in stretches]
    kinds = {"whole": "loss", "task": "task"} if any(line["auxiliary"] for line in steps) else {"task": "task"}
    curves = {
        label: (x, [statistics.fmean(line[key] for line in stretch) for stretch in stretches])
        for label, key in kinds.items()
    }
    return training_curves({"Training loss": curves}, stacked=stacked)


def structure_curves(lines: Sequence[Mapping[str, Any]], label: str, stacked: bool = False) -> Figure | None:
    """Draw cosines of neighbouring updates and gradients, drift energy and mean gate; None if nothing was watched.

    Args:
        lines: The lines of ``metrics.jsonl``.
        label: What the curve is called.
        stacked: Panels one below the other, for narrow pages.
    """
    looks = [line for line in lines if "structure" in line]
    panels = {}
    for title, key in LOOKS.items():
        points = [(line["step"], value) for line in looks if (value := line["structure"].get(key)) is not None]
        if points:
            panels[title] = {label: tuple(map(list, zip(*points, strict=True)))}
    return training_curves(panels, stacked=stacked) if panels else None  # type: ignore[arg-type]


def dirichlet_curves(lines: Sequence[Mapping[str, Any]], stacked: bool = False) -> Figure | None:
    """Draw the Dirichlet energy of the features after every GNN layer over the steps; None if it was not watched.

    Args:
        lines: The lines of ``metrics.jsonl``; ``structure`` may hold ``dirichlet``, the energy of the input first.
        stacked: For narrow pages.
    """
    looks = [
        (line["step"], line["structure"]["dirichlet"]) for line in lines if line.get("structure", {}).get("dirichlet")
    ]
    if not looks:
        return None
    steps, values = [step for step, _ in looks], np.array([value for _, value in looks], dtype=float)
    curves = {"input" if k == 0 else f"layer {k}": (steps, values[:, k]) for k in range(values.shape[1])}
    return training_curves({"Dirichlet energy": curves}, stacked=stacked)


def name_of(names: Sequence[str] | None, node: int) -> str:
    """Return the name of a node, or its number."""
    return str(names[node]) if names else f"node {node}"


def message_share(graph: Data) -> float:
    """Return the norm of the messages relative to the codes they were added to; 0 without messages."""
    if "message" not in graph:
        return 0.0
    before: NDArray = (graph.x - graph.message).numpy()
    norm = float(np.linalg.norm(before))
    return float(np.linalg.norm(graph.message.numpy())) / norm if norm > 0 else 0.0
