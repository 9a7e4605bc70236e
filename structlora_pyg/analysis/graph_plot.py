"""Drawings of the adapter graph: one graph, or the same graph at several steps of training.

Depth and role place every node, so that no layout has to be computed; only edges bend, around the nodes in their way.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.path import Path
from numpy.typing import NDArray
from torch_geometric.data import Data
from torch_geometric.utils import coalesce, remove_self_loops

from structlora_pyg.analysis.plots import COLORS, INK, MUTED, ON_COLOR, role_names, style_axes

# What edges of weight 0 and 1, and nodes of mean gate 0 and 1, look like.
WIDTH, OPACITY, PALE = (0.7, 2.8), (0.3, 0.9), (0.12, 1.0)


def draw_graph(data: Data) -> Figure:
    """Draw the adapter graph: depth from left to right, one row and one colour per role.

    The wider and darker an edge, the larger its weight; edges within a role have the role's colour, edges across roles
    are grey, and both directions of an edge are drawn as one. The paler a node, the more its gates are closed.

    Args:
        data: A graph with ``edge_index`` (2, E), ``depth`` (N,) and ``role`` (N,); ``edge_weight`` (E,) in [0, 1],
            ``gate`` (N, D) in [0, 1] with ``scaling`` (N, D), and ``name`` (N strings) are used where present.
            `StructLoraModel.adapter_graph` makes such graphs.

    Raises:
        ValueError: Missing attributes.
    """
    return draw_graphs([data], [""], data.get("name"), length=5.6, spacing=0.9)


def draw_graphs(
    graphs: Sequence[Data],
    titles: Sequence[str],
    names: Sequence[str] | None = None,
    length: float = 3.4,
    spacing: float = 0.6,
) -> Figure:
    """Draw one adapter graph at several steps, two panels in a row; see `draw_graph`.

    Nodes and edges are at the same place in every panel.

    Args:
        graphs: Graphs of the same nodes.
        titles: A title per graph.
        names: N names of the nodes.
        length: Inches from the first depth to the last, as far as nodes are neither crowded nor lost.
        spacing: Inches between neighbouring roles.

    Raises:
        ValueError: Graphs that lack attributes or do not have the same nodes.
    """
    first = graphs[0]
    missing = [key for key in ("edge_index", "depth", "role") if key not in first]
    if missing:
        raise ValueError(f"the graph has no {', '.join(missing)}; model.adapter_graph() returns one that can be drawn")
    if any(len(graph.depth) != len(first.depth) for graph in graphs):
        raise ValueError("the graphs have different nodes; draw each of them with draw_graph")
    depth, role = first.depth.cpu().numpy(), first.role.cpu().numpy()
    labels, last = role_names(names, first.role), int(depth.max(initial=0))
    step = float(np.clip(length / max(last, 1), 0.13, 0.75))
    size = min(0.34, 0.66 * step)  # diameter of a node
    at = np.stack([depth * step, -role * spacing], axis=1)
    each = [undirected(graph) for graph in graphs]
    ends = np.unique(np.concatenate([edges for edges, _ in each]), axis=0)
    paths = dict(zip(map(tuple, ends.tolist()), _edge_paths(ends, at, size, 0.4 * spacing), strict=True))
    points = np.concatenate([at, *(path.get_extents().get_points() for path in paths.values())])
    low, high = points.min(0) - 0.6 * size, points.max(0) + 0.6 * size

    columns = min(len(graphs), 2)
    rows, panel = -(-len(graphs) // columns), np.maximum(high - low, (1.2, 0.4))
    wide = columns * (panel[0] + 0.2) + 0.09 * max(map(len, labels), default=0) + 0.2
    figure = Figure(figsize=(wide, rows * (panel[1] + 0.5) + 0.5), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    numbers = [re.search(r"(?<![^.])\d+(?=\.|\[|$)", name) for name in names or [""] * len(depth)]
    for k, (ax, graph, (edges, weight)) in enumerate(zip(axes, graphs, each, strict=False)):
        style_axes(ax, spines=())
        ax.set_title(titles[k], loc="left", fontsize=9, color=INK, fontweight="bold")
        ax.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]))
        _draw_edges(ax, [paths[tuple(edge)] for edge in edges.tolist()], role[edges], weight, size)
        _draw_nodes(ax, at, role, gate_means(graph), size)
        for (x, y), number, d in zip(at, numbers, depth, strict=True) if size >= 0.2 else ():
            text = number.group() if number else str(d)
            ax.text(x, y, text, ha="center", va="center_baseline", fontsize=8, color=ON_COLOR, zorder=4)
        ticks = range(0, last + 1, max(1, int(np.ceil(0.25 / step))))
        ax.set_xticks([d * step for d in ticks], [str(d) for d in ticks])
        ax.set_yticks([-r * spacing for r in range(len(labels))], labels if k % columns == 0 else [""] * len(labels))
        for r, label in enumerate(ax.get_yticklabels()):
            label.set(color=role_color(r), fontweight="bold", fontsize=9)
        ax.tick_params(length=0)
        if k >= len(graphs) - columns:
            ax.set_xlabel("depth within the role", fontsize=9, color=MUTED)
    for ax in axes[len(graphs) :]:
        ax.set_visible(False)
    weights = np.concatenate([weight for _, weight in each])
    if len(weights) and float(np.ptp(weights)) > 1e-6:
        _weight_legend(figure, float(weights.min()), float(weights.max()))
    return figure


def undirected(data: Data) -> tuple[NDArray, NDArray]:
    """Return every pair of joined nodes once (E', 2) with its largest weight (E',) in [0, 1]; loops are left out."""
    weight = data.edge_weight if "edge_weight" in data else data.edge_index.new_ones(data.num_edges).float()
    index, weight = remove_self_loops(data.edge_index, weight.float().flatten())
    index, weight = coalesce(index.sort(0).values, weight, num_nodes=len(data.depth), reduce="max")
    return index.T.cpu().numpy(), weight.detach().clamp(0, 1).cpu().numpy()


def gate_means(data: Data) -> NDArray:
    """Return the mean gate (N,) of each node over its real directions, in [0, 1]; 1 for nodes without any."""
    if "gate" not in data:
        return np.ones(len(data.depth))
    gate = np.asarray(data.gate.detach().cpu(), dtype=float)
    exists = np.asarray(data.scaling.cpu()) != 0 if "scaling" in data else np.ones_like(gate, dtype=bool)
    return np.where(exists.any(1), (gate * exists).sum(1) / np.maximum(exists.sum(1), 1), 1.0)


def role_color(role: int) -> str:
    """Return the colour of a role; virtual nodes, role -1, are grey."""
    return COLORS[(role + 1) % len(COLORS)]


def _between(ends: tuple[float, float], share: float) -> float:
    return ends[0] + (ends[1] - ends[0]) * float(share)


def _edge_paths(edges: NDArray, at: NDArray, size: float, room: float) -> list[Path]:
    """Return a path per edge: straight where no other node is in the way, else bent to one side.

    Args:
        edges: (E, 2) pairs of nodes.
        at: (N, 2) places of the nodes.
        size: Diameter of a node.
        room: How far the longest edge within a row may bend.
    """
    paths, t = [], np.linspace(0.0, 1.0, 33)[:, None]
    longest = max(np.linalg.norm(at[edges[:, 0]] - at[edges[:, 1]], axis=1), default=1.0)
    for i, j in edges:
        a, b, others = at[i], at[j], np.delete(at, [i, j], axis=0)[:, None]
        span = max(float(np.linalg.norm(b - a)), 1e-9)
        normal = np.array([a[1] - b[1], b[0] - a[0]]) / span
        most = size + max(room - size, 0.0) * span / longest
        side = 1 if round(a[0] / size) % 2 == 0 else -1  # edges of one row take turns above and below it
        found: dict[float, Path] = {}  # by how close they come to another node
        for bend in (0.0, side * most, -side * most, 1.6 * side * size, -1.6 * side * size):
            middle = (a + b) / 2 + 2 * bend * normal  # a curve reaches half as far as its middle point
            line = a * (1 - t) ** 2 + 2 * middle * t * (1 - t) + b * t**2
            clear = float(np.linalg.norm(others - line, axis=-1).min(initial=np.inf))
            found[clear] = Path([a, middle, b], [Path.MOVETO, Path.CURVE3, Path.CURVE3]) if bend else Path([a, b])
            if clear >= 0.75 * size:
                break
        paths.append(found[max(found)])
    return paths


def _draw_edges(ax: Axes, paths: list[Path], roles: NDArray, weight: NDArray, size: float) -> None:
    """Draw edges; the more there are, the fainter: a crowd must not hide the nodes."""
    within = roles[:, 0] == roles[:, 1]
    order = np.argsort(within, kind="stable")  # edges of a role lie above the grey ones
    faint = {True: np.clip(60 / max(within.sum(), 1), 0.05, 1), False: np.clip(30 / max((~within).sum(), 1), 0.03, 1)}
    lines = PathCollection(
        [paths[k] for k in order],
        facecolors="none",
        edgecolors=[
            to_rgba(role_color(roles[k, 0]) if within[k] else MUTED, _between(OPACITY, weight[k]) * faint[within[k]])
            for k in order
        ],
        linewidths=[_between(WIDTH, weight[k]) * (1.0 if size > 0.2 else 0.5) for k in order],
        capstyle="round",
        zorder=1,
    )
    lines.set_rasterized(len(paths) > 3000)
    ax.add_collection(lines)


def _draw_nodes(ax: Axes, at: NDArray, role: NDArray, gate: NDArray, size: float) -> None:
    """Draw nodes, the paler the more closed; a pale node must not show the edges below it."""
    fills = [to_rgba(role_color(r), _between(PALE, g)) for r, g in zip(role, gate, strict=True)]
    for colors, zorder in (("#ffffff", 2), (fills, 3)):
        ax.scatter(at[:, 0], at[:, 1], s=(72 * size) ** 2, c=colors, linewidths=0, zorder=zorder)


def _weight_legend(figure: Figure, low: float, high: float) -> None:
    samples = [low, (low + high) / 2, high]
    color = [to_rgba(MUTED, _between(OPACITY, w)) for w in samples]
    lines = [Line2D([], [], color=c, linewidth=_between(WIDTH, w)) for c, w in zip(color, samples, strict=True)]
    labels = [f"{'edge weight ' if k == 0 else ''}{w:.2f}" for k, w in enumerate(samples)]
    figure.legend(lines, labels, loc="outside lower right", ncols=3, frameon=False, fontsize=8, labelcolor=MUTED)
