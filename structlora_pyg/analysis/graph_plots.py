"""Drawings of the adapter graph: one graph, or the same graph at several times."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.textpath import TextPath
from numpy.typing import NDArray
from torch_geometric.data import Data

from structlora_pyg.analysis.graph_layout import GraphLayout, places, undirected, union_of_edges
from structlora_pyg.analysis.plot_style import COLORS, INK, MUTED, ON_CELLS, TITLE_FONT, ink, short_names, style_axes

# What edges of weight 0 and 1, and nodes of mean gate 0 and 1, look like.
WIDTH, OPACITY, PALE = (0.7, 2.8), (0.3, 0.9), (0.12, 1.0)
EMPTY = "#ffffff"  # below a pale node; it does not follow the theme, as the number on it does not


def draw_graph(data: Data) -> Figure:
    """Draw the adapter graph: depth from left to right, one row and one colour a role.

    The wider and darker an edge, the larger its weight. Edges within a role have the role's colour, edges across roles
    are grey. An edge bends where it would run through other nodes. Both directions of an edge are drawn as one.

    Args:
        data: A graph with ``edge_index`` (2, E), ``depth`` (N,) and ``role`` (N,); ``edge_weight`` (E,) in [0, 1] and
            ``name`` (N strings) are used where present. `StructLoraModel.adapter_graph` makes such graphs.

    Raises:
        ValueError: Missing attributes, or names that do not fit.
    """
    depth, role = places(data)
    names = [str(name) for name in data.name] if "name" in data else None
    if names is not None and len(names) != len(depth):
        raise ValueError(f"data.name holds {len(names)} names for {len(depth)} nodes")
    columns, rows = depth.max(initial=0) + 1, role.max(initial=0) + 1
    edges, weight = undirected(data)
    layout = GraphLayout(depth, role, edges)
    dx, dy, size = layout.step, layout.spacing, layout.size

    titles = role_titles(names, role)
    left, bottom, right, top = layout.box
    spare = max(0.0, 1.6 - (right - left)) / 2  # the axis' own label needs room too
    left, right = left - spare, right + spare
    gutter = max(TextPath((0, 0), title, size=10, prop=TITLE_FONT).get_extents().width for title in titles) / 72 + 0.2
    weighted = bool(len(weight)) and float(np.ptp(weight)) > 1e-6
    foot = 0.85 if weighted else 0.55
    width, height = right - left + gutter + 0.1, top - bottom + foot
    figure = Figure(figsize=(width, height))
    ax = figure.add_axes((gutter / width, foot / height, (right - left) / width, (top - bottom) / height))
    style_axes(ax, spines=("bottom",))
    ax.set_xlim(left, right)
    ax.set_ylim(bottom, top)
    _draw(ax, layout, role, edges, weight)
    if size >= 0.2:
        for (x, y), text in zip(layout.at, node_numbers(names, depth), strict=True):
            ax.text(x, y, text, ha="center", va="center_baseline", fontsize=8, color="#ffffff", zorder=4)

    ax.set_yticks([-r * dy for r in range(rows)], titles)
    for r, label in enumerate(ax.get_yticklabels()):
        label.set(color=role_color(r), fontproperties=TITLE_FONT, fontsize=10)
    step = max(1, int(np.ceil(0.22 / dx)))
    ticks = [k for k in range(columns) if k % step == 0]
    ax.set_xticks([k * dx for k in ticks], [str(k) for k in ticks])
    ax.set_xlabel("depth within the role", fontsize=9, color=MUTED)
    ax.tick_params(axis="y", length=0, pad=2)
    if weighted:
        _weight_legend(figure, float(weight.min()), float(weight.max()))
    return figure


def draw_graphs(
    graphs: Sequence[Data], titles: Sequence[str], names: Sequence[str] | None = None, width: float = 9.0
) -> Figure:
    """Draw one adapter graph at several times, one panel a time: depth downwards, one column and one colour a role.

    Nodes and edges are at the same place in every panel. Edges are as in `draw_graph`; the paler a node, the more its
    gates are closed.

    Args:
        graphs: Graphs of the same nodes, as for `draw_graph`; ``gate`` (N, D) in [0, 1] is used where present.
        titles: A title a graph.
        names: N names of the nodes.
        width: Most inches of the figure's width.

    Raises:
        ValueError: No graph; graphs that lack attributes or do not have the same nodes.
    """
    if not graphs or len(graphs) != len(titles):
        raise ValueError(f"give at least one graph, and a title for each; got {len(graphs)} and {len(titles)}")
    depth, role = places(graphs[0])
    if any(len(depth) != graph.num_nodes for graph in graphs):
        raise ValueError("the graphs have different nodes; draw each of them with draw_graph")
    edges, weights = union_of_edges(graphs)
    layout = GraphLayout(depth, role, edges, length=3.4, spacing=0.5, downwards=True)
    left, bottom, right, top = layout.box
    labels = role_titles(None if names is None else list(names), role)
    margin, gap, head = 0.45, 0.2, 0.32
    fit = int(np.clip((width - margin) // (max(right - left, 0.8) + gap), 1, len(graphs)))
    columns = -(-len(graphs) // -(-len(graphs) // fit))  # rows of the same length, as far as possible
    spare = max(0.0, 0.8 - (right - left)) / 2  # the titles need room too
    left, right = left - spare, right + spare
    rows = -(-len(graphs) // columns)
    panel = right - left, top - bottom
    legend_width = max(0.35 + 0.085 * len(label) for label in labels)
    full = max(margin + columns * (panel[0] + gap), margin + legend_width)
    per_line = max(1, int((full - 0.2) / (legend_width + 0.25)))
    above = 0.24 * -(-len(labels) // per_line) + 0.1
    height = above + rows * (panel[1] + head) + 0.1
    figure = Figure(figsize=(full, height))
    numbers = node_numbers(None if names is None else list(names), depth)
    for k, (graph, title) in enumerate(zip(graphs, titles, strict=True)):
        row, column = divmod(k, columns)
        x = margin + column * (panel[0] + gap)
        y = height - above - (row + 1) * (panel[1] + head)
        ax = figure.add_axes((x / full, y / height, panel[0] / full, panel[1] / height))
        style_axes(ax, spines=())
        ax.set(xlim=(left, right), ylim=(bottom, top), xticks=[])
        ax.set_title(title, loc="left", fontsize=9, color=INK, fontweight="bold", pad=2)
        there = weights[k] > 0
        _draw(ax, layout, role, edges[there], weights[k][there], there, gate_means(graph))
        if layout.size >= 0.2:
            for (px, py), text in zip(layout.at, numbers, strict=True):
                ax.text(px, py, text, ha="center", va="center_baseline", fontsize=7.5, color=ON_CELLS, zorder=4)
        every = max(1, int(np.ceil(0.2 / layout.step)))
        ticks = range(0, depth.max(initial=0) + 1, every) if layout.size < 0.2 else ()  # else a node shows its number
        ax.set_yticks([-d * layout.step for d in ticks], [str(d) for d in ticks] if column == 0 else [])
        ax.tick_params(length=0)
        if column == 0:
            ax.set_ylabel("depth within the role", fontsize=8, color=MUTED)
    handles = [
        Line2D([], [], linestyle="none", marker="o", markersize=8, color=role_color(r)) for r in range(len(labels))
    ]
    legend = figure.legend(
        handles, labels, loc="upper left", ncols=per_line, frameon=False, fontsize=9, handletextpad=0.3,
        borderaxespad=0.1, labelspacing=0.3,
    )  # fmt: skip
    ink(legend.get_texts())
    return figure


def gate_means(data: Data) -> NDArray:
    """Return the mean gate (N,) of each node over its real directions, in [0, 1]; 1 for nodes without any."""
    if "gate" not in data:
        return np.ones(data.num_nodes)
    gate = np.asarray(data.gate, dtype=float)
    real = np.asarray(data.scaling) != 0 if "scaling" in data else np.ones_like(gate, dtype=bool)
    return np.where(real.any(1), (gate * real).sum(1) / np.maximum(real.sum(1), 1), 1.0)


def role_color(role: int) -> str:
    """Return the colour of a role; virtual nodes, role -1, are grey."""
    return COLORS[(role + 1) % len(COLORS)]


def along(ends: tuple[float, float], share: float) -> float:
    """Return the value between two `ends` that a share in [0, 1] stands for."""
    return ends[0] + (ends[1] - ends[0]) * float(share)


def role_titles(names: list[str] | None, role: NDArray) -> list[str]:
    """Return a title a row: the name that its nodes share, with ``*`` for the number that differs."""
    rows = role.max(initial=0) + 1
    if names is None:
        return [f"role {r}" for r in range(rows)]
    patterns = [""] * rows
    for name, r in zip(names, role, strict=True):
        if r >= 0:  # virtual nodes have no role
            patterns[r] = re.sub(r"(?<![^.])\d+(?=\.|\[|$)", "*", name)
    return short_names(patterns)


def node_numbers(names: list[str] | None, depth: NDArray) -> list[str]:
    """Return the text inside each node: the first number of its name, or its depth."""
    if names is None:
        return [str(d) for d in depth]
    found = [re.search(r"(?<![^.])\d+(?=\.|\[|$)", name) for name in names]
    return [match.group() if match else str(d) for match, d in zip(found, depth, strict=True)]


def _draw(
    ax: Axes,
    layout: GraphLayout,
    role: NDArray,
    edges: NDArray,
    weight: NDArray,
    which: NDArray | None = None,
    strength: NDArray | None = None,
) -> None:
    """Draw nodes and edges, of the layout's edges only `which`; the weaker a node, the paler."""
    chosen = np.arange(len(layout.paths)) if which is None else np.flatnonzero(which)
    within, alpha = layout.within[chosen], layout.alpha[chosen]
    colors = [
        to_rgba(role_color(role[i]) if same else MUTED, along(OPACITY, w) * a)
        for (i, _), same, w, a in zip(edges, within, weight, alpha, strict=True)
    ]
    order = np.argsort(within, kind="stable")  # edges of a role lie above the grey ones
    lines = PathCollection(
        [layout.paths[chosen[k]] for k in order],
        facecolors="none",
        edgecolors=[colors[k] for k in order],
        linewidths=[along(WIDTH, weight[k]) * layout.thin for k in order],
        capstyle="round",
        zorder=1,
    )
    lines.set_rasterized(len(edges) > 3000)
    ax.add_collection(lines)
    area = (72 * layout.size) ** 2
    if strength is not None:  # a pale node must not show the edges below it
        ax.scatter(layout.at[:, 0], layout.at[:, 1], s=area, c=EMPTY, linewidths=0, zorder=2)
    fills = [to_rgba(role_color(r), 1.0 if strength is None else along(PALE, strength[k])) for k, r in enumerate(role)]
    ax.scatter(layout.at[:, 0], layout.at[:, 1], s=area, c=fills, linewidths=0, zorder=3)


def _weight_legend(figure: Figure, low: float, high: float) -> None:
    samples = [low, (low + high) / 2, high]
    handles = [Line2D([], [], color=to_rgba(MUTED, along(OPACITY, w)), linewidth=along(WIDTH, w)) for w in samples]
    legend = figure.legend(
        handles,
        [f"{w:.2f}" for w in samples],
        loc="lower right",
        ncols=3,
        frameon=False,
        fontsize=8,
        title="edge weight",
        title_fontsize=8,
        alignment="right",
        handlelength=1.8,
        columnspacing=1.0,
    )
    ink(legend.get_texts())
    legend.get_title().set_color(MUTED)
