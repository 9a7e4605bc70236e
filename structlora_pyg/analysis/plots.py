"""Figures: curves over training, likeness of layers, attention; `graph_plot` draws the adapter graph.

Every function returns a `matplotlib.figure.Figure` that belongs to the caller: pyplot and its global state are not
used, so nothing has to be closed and any backend will do. Lines and letters are drawn in `INK`, `MUTED`, `GRID` and
`PAGE`, which a page replaces by the colours of the reader's theme.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

if TYPE_CHECKING:  # tables and curves are drawn without loading torch
    from torch import Tensor
    from torch_geometric.data import Data

INK, MUTED, GRID = "#1c2733", "#67727e", "#d4dae0"
PAGE = "#fefefe"  # what is empty
ON_COLOR = "#101820"  # text on coloured areas does not follow the theme
# Apart for colour-blind readers too, and of middle lightness: they stand on white and on black.
COLORS = ("#6b7a8c", "#e0592a", "#1d8fa3", "#b0559b", "#5b9a2f", "#c48a0a", "#4668c9", "#8a6a4f", "#cf4d6f", "#3f9e7c")
DIVERGING = LinearSegmentedColormap.from_list(
    "likeness", ["#153f73", "#3f7fba", "#a9cce6", "#f6f6f4", "#f5bfa0", "#d7603c", "#7d1a1f"]
)
SEQUENTIAL = LinearSegmentedColormap.from_list("gate", ["#edf1f3", "#a5d0d3", "#3f9aa6", "#155e75", "#0b3a53"])

Curve = tuple[ArrayLike, ArrayLike]


def training_curves(panels: Mapping[str, Mapping[str, Curve]], xlabel: str = "optimizer step") -> Figure:
    """Draw one panel per quantity: the mean over seeds of every method, with a band of one standard deviation.

    Args:
        panels: ``{quantity: {method: (x, y)}}`` with x (points,) and y (points,) or (seeds, points); NaN where a seed
            has no value.
        xlabel: What x counts.
    """
    figure, grid = panel_grid(list(panels), xlabel)
    methods = list(dict.fromkeys(m for curves in panels.values() for m in curves))
    for ax, curves in zip(grid, panels.values(), strict=True):
        ax.margins(x=0.02, y=0.05)
        for method, (x, y) in curves.items():
            x_points, y_seeds = np.asarray(x, dtype=float), np.ma.masked_invalid(np.atleast_2d(np.asarray(y, float)))
            k, mean = methods.index(method), y_seeds.mean(0)
            color, line = COLORS[k % len(COLORS)], "-" if k < len(COLORS) else (0, (4, 2))
            marker = "o" if len(x_points) < 8 else ""
            style: Any = {"linewidth": 2, "linestyle": line, "marker": marker, "markersize": 4.5, "zorder": 3}
            ax.plot(x_points, mean, color=color, label=method, **style)
            there = ~np.ma.getmaskarray(mean)
            if len(y_seeds) > 1 and there.any():
                middle, sd = mean[there].data, y_seeds.std(0, ddof=1).filled(0)[there]
                alpha = min(0.18, 0.6 / len(curves))  # many overlapping bands stay lighter than the lines
                ax.fill_between(x_points[there], middle - sd, middle + sd, color=color, alpha=alpha, linewidth=0)
    if len(methods) > 1:
        legend_above(figure, grid[0])
    return figure


def similarity_heatmaps(similarities: Mapping[str, ArrayLike], names: Sequence[str]) -> Figure:
    """Draw cosines between the updates of layers, one panel per method, on one scale from -1 to 1.

    Args:
        similarities: ``{method: cosines (N, N)}``.
        names: N names of the adapters; lines separate the roles where adapters of one role stand together.
    """
    return _square_heatmaps(similarities, names, DIVERGING, [-1, -0.5, 0, 0.5, 1], "cosine of the updates")


def attention_heatmaps(
    layers: Sequence[tuple[Tensor, Tensor]], graph: Data, names: Sequence[str] | None = None
) -> Figure:
    """Draw attention weights, averaged over heads: a panel per layer, a row per receiver, a column per sender.

    Args:
        layers: ``(edge_index (2, E'), alpha (E', heads))`` per layer, see `structlora_pyg.analysis.stages`.
        graph: The graph they belong to.
        names: N names of the nodes.
    """
    order, tables = nodes_by_role(graph), {}
    for k, (index, alpha) in enumerate(layers, start=1):
        table = np.zeros((graph.num_nodes, graph.num_nodes))
        np.add.at(table, (index[1].numpy(), index[0].numpy()), alpha.float().mean(1).numpy())
        tables[f"layer {k}"] = table[np.ix_(order, order)]
    labels = [str(names[i]) if names else f"node {i}" for i in order]
    return _square_heatmaps(tables, labels, SEQUENTIAL, [0, 0.5, 1], "attention, mean over heads")


def short_names(names: Sequence[str]) -> list[str]:
    """Return names without the parts that all of them share: ``blocks.0.attn.qkv[q]`` becomes ``0 q``."""
    parts = [re.findall(r"[^.\[\]]+", name) for name in names]
    if len(set(map(tuple, parts))) < 2:
        return list(names)
    if len({len(p) for p in parts}) == 1:
        differing = [k for k in range(len(parts[0])) if len({p[k] for p in parts}) > 1]
        return [" ".join(p[k] for k in differing) for p in parts]
    same = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*parts, strict=False))
    start = min(sum(1 for _ in same), min(map(len, parts)) - 1)
    return [".".join(p[start:]) for p in parts]


def role_names(names: Sequence[str] | None, role: Tensor) -> list[str]:
    """Return a name per role: what its nodes' names share, with ``*`` for the number that differs."""
    count = max(int(role.max()), 0) + 1 if len(role) else 0
    if names is None:
        return [f"role {r}" for r in range(count)]
    shared = dict(zip(role.tolist(), (re.sub(r"(?<![^.])\d+(?=\.|\[|$)", "*", n) for n in names), strict=True))
    return short_names([shared.get(r, "") for r in range(count)])  # virtual nodes have the role -1


def nodes_by_role(graph: Data) -> list[int]:
    """Return the nodes of a graph without virtual ones, those of one role together, by depth."""
    role, depth = graph.role.tolist(), graph.depth.tolist()
    return sorted((i for i, r in enumerate(role) if r >= 0), key=lambda i: (role[i], depth[i]))


def evenly(count: int, most: int) -> list[int]:
    """Return at most `most` positions of `count`, evenly spaced, the first and the last among them."""
    return sorted({round(x) for x in np.linspace(0, count - 1, min(count, most))})


def panel_grid(titles: Sequence[str], xlabel: str) -> tuple[Figure, list[Axes]]:
    """Return a figure and one panel per title, up to three in a row, four as two by two."""
    n = len(titles)
    columns = 2 if n == 4 else min(n, 3)
    rows = -(-n // columns)
    figure = Figure(figsize=(3.7 * columns + 0.3, 2.8 * rows + 0.1))
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    _place(figure)
    for ax, title in zip(grid, titles, strict=False):
        style_axes(ax)
        _title(ax, title)
        ax.set_xlabel(xlabel, fontsize=9, color=MUTED)
        ax.grid(axis="y", color=GRID, linewidth=0.7)
    for ax in grid[n:]:
        ax.set_visible(False)
    return figure, grid[:n]


def legend_above(figure: Figure, ax: Axes) -> None:
    """Name the methods of a panel above all panels, in as many rows as the width asks for."""
    lines, labels = ax.get_legend_handles_labels()
    widest = 0.075 * max(map(len, labels)) + 0.45  # inches
    columns = max(1, min(len(labels), int((figure.get_figwidth() - 0.2) / widest)))
    room = 0.19 * -(-len(labels) // columns) + 0.12  # inches
    figure.set_figheight(figure.get_figheight() + room)
    _place(figure, room)
    place: Any = {"loc": "upper left", "ncols": columns, "bbox_to_anchor": (0, 1), "borderaxespad": 0.2}
    figure.legend(lines, labels, **place, frameon=False, fontsize=9, handlelength=1.6, labelcolor=INK)


def _place(figure: Figure, above: float = 0.0) -> None:
    """Give panels margins in inches; a layout engine would measure every label for it, twice."""
    width, height = figure.get_size_inches()
    spec: Any = figure.axes[0].get_gridspec()
    inside, tall = width / spec.ncols - 0.7, (height - above) / spec.nrows - 0.8
    figure.subplots_adjust(
        left=0.58 / width, right=1 - 0.12 / width, wspace=0.7 / inside,
        bottom=0.5 / height, top=1 - (above + 0.3) / height, hspace=0.8 / tall,
    )  # fmt: skip


def style_axes(ax: Axes, spines: Sequence[str] = ("bottom", "left")) -> None:
    """Give a panel the look of all figures: thin lines, small numbers, few ticks."""
    ax.set_facecolor("none")
    for side, spine in ax.spines.items():
        spine.set(visible=side in spines, color=GRID)
    ax.tick_params(colors=MUTED, labelcolor=INK, labelsize=8, width=0.7, length=3)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))


def _square_heatmaps(
    panels: Mapping[str, ArrayLike], names: Sequence[str], colors: Colormap, ticks: list[float], label: str
) -> Figure:
    """Draw one (N, N) table per panel, side by side on one scale that ends with the first and the last tick."""
    n, count, side = len(names), len(panels), 3.0
    labels, shown = short_names(names), range(0, n, max(1, -(-n // 17)))
    margin = 0.065 * max(map(len, labels))  # labels stand upright below the panels, and once to the left
    figure = Figure(figsize=(side * count + margin + 0.95, side + margin + 0.4), layout="constrained")
    axes = list(figure.subplots(1, count, squeeze=False).flat)
    for ax, (title, given) in zip(axes, panels.items(), strict=True):
        style_axes(ax, spines=())
        ends = {"vmin": ticks[0], "vmax": ticks[-1]}
        image = ax.imshow(np.asarray(given, dtype=float), cmap=colors, **ends, interpolation="nearest")
        _title(ax, title)
        ax.set_xticks(shown, [labels[i] for i in shown], rotation=90)
        ax.set_yticks(*((shown, [labels[i] for i in shown]) if ax is axes[0] else ([],)))
        ax.tick_params(labelsize=7.5, length=0)
        _separate_roles(ax, names)
    shrink = min(0.75, 2.6 / figure.get_figheight())  # as long on a tall figure as on a flat one
    bar: Any = figure.colorbar(image, ax=axes, ticks=ticks, shrink=shrink, aspect=20, pad=0.02)
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=MUTED, labelcolor=INK, labelsize=8, length=2)
    bar.set_label(label, fontsize=9, color=MUTED)
    return figure


def _title(ax: Axes, text: str) -> None:
    ax.set_title(text, loc="left", y=1.0, fontsize=10, color=INK, fontweight="bold")


def _separate_roles(ax: Axes, names: Sequence[str]) -> None:
    """Draw thin lines between neighbouring adapters of different roles, unless they alternate all the time."""
    roles = [re.sub(r"\d+", "*", name) for name in names]
    borders = [i + 0.5 for i in range(len(roles) - 1) if roles[i] != roles[i + 1]]
    for border in borders if len(borders) < len(roles) / 2 else ():
        ax.axhline(border, color=ON_COLOR, linewidth=0.9)
        ax.axvline(border, color=ON_COLOR, linewidth=0.9)
