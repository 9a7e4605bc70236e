"""Figures: curves over training, gates, likeness of layers, attention; `graph_plot` draws the adapter graph.

Every function returns a `matplotlib.figure.Figure` that belongs to the caller: pyplot and its global state are not
used, so nothing has to be closed and any backend will do. Lines and letters are drawn in `INK`, `MUTED`, `GRID` and
`PAGE`, which a page replaces by the colours of the reader's theme.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
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
        bands: list[np.ndarray] = []
        shades: list[str] = []
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
                around = np.concatenate([middle - sd, (middle + sd)[::-1]])
                bands.append(np.stack([np.concatenate([x_points[there], x_points[there][::-1]]), around], axis=1))
                shades.append(color)
        if bands:
            alpha = min(0.18, 0.6 / len(curves))  # many overlapping bands stay lighter than the lines
            ax.add_collection(PolyCollection(bands, facecolors=shades, alpha=alpha, linewidths=0, zorder=2))
            ax.autoscale_view()
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
    return _square_heatmaps(tables, _names(names, order), SEQUENTIAL, [0, 0.5, 1], "attention, mean over heads")


def likeness_over_training(graphs: Sequence[Data], names: Sequence[str] | None = None) -> Figure:
    """Draw the cosines between the codes of the nodes at up to three steps.

    Args:
        graphs: Graphs of the same nodes with ``x`` (N, F) and ``step``. Codes are a random projection of the updates;
            their cosines estimate those of the updates.
        names: N names of the nodes.
    """
    order, panels = nodes_by_role(graphs[0]), {}
    for k in evenly(len(graphs), 3):
        x = graphs[k].x[order]
        x = x / x.norm(dim=1, keepdim=True).clamp(min=1e-12)
        panels[f"step {int(graphs[k].step)}"] = (x @ x.T).numpy()
    return similarity_heatmaps(panels, _names(names, order))


def gates_over_training(graphs: Sequence[Data], names: Sequence[str] | None = None) -> Figure:
    """Draw the gates of every direction over the steps: a panel per role, a row per direction, the first layer on top.

    Args:
        graphs: Graphs of the same nodes with ``step``, ``gate`` (N, D) in [0, 1] and ``scaling`` (N, D), 0 where a
            node has fewer than D directions.
        names: N names of the nodes.
    """
    role, depth, exists = graphs[0].role, graphs[0].depth, graphs[0].scaling != 0
    by_role: dict[int, list[int]] = {}
    for i in nodes_by_role(graphs[0]):
        by_role.setdefault(int(role[i]), []).append(i)
    titles = role_names(names, role)
    columns = min(len(by_role), 3)
    rows = -(-len(by_role) // columns)
    height = float(np.clip(0.09 * max(int(exists[nodes].sum()) for nodes in by_role.values()), 1.6, 4.6))
    figure = Figure(figsize=(0.9 + 2.2 * max(columns, 2), rows * (height + 0.65)), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for ax, (r, nodes) in zip(axes, by_role.items(), strict=False):
        image = _image(ax, np.stack([graph.gate[nodes][exists[nodes]] for graph in graphs], 1), SEQUENTIAL, (0, 1))
        _title(ax, titles[r])
        ends = exists[nodes].sum(1).cumsum(0).tolist()
        middles = [(start + end - 1) / 2 for start, end in itertools.pairwise([0, *ends])]
        for end in ends[:-1] if len(ends) <= 16 else []:
            ax.axhline(end - 0.5, color=GRID, linewidth=0.8)
        shown, ticks = _thinned(len(nodes), int(height / 0.16)), evenly(len(graphs), 5)
        ax.set_yticks([middles[k] for k in shown], [str(int(depth[nodes[k]])) for k in shown])
        ax.set_xticks(ticks, [str(int(graphs[k].step)) for k in ticks])
        ax.set_xlabel("optimizer step", fontsize=9, color=MUTED)
        ax.set_ylabel("depth, a row per direction", fontsize=9, color=MUTED)
    for ax in axes[len(by_role) :]:
        ax.set_visible(False)
    _colorbar(figure, image, axes[: len(by_role)], "gate", [0, 0.5, 1])
    return figure


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
    labels, shown = short_names(names), _thinned(n, 17)
    margin = 0.065 * max(map(len, labels))  # labels stand upright below the panels, and once to the left
    figure = Figure(figsize=(side * count + margin + 0.95, side + margin + 0.4), layout="constrained")
    axes = list(figure.subplots(1, count, squeeze=False).flat)
    for ax, (title, given) in zip(axes, panels.items(), strict=True):
        image = _image(ax, np.asarray(given, dtype=float), colors, (ticks[0], ticks[-1]), aspect="equal")
        _title(ax, title)
        ax.set_xticks(shown, [labels[i] for i in shown], rotation=90)
        ax.set_yticks(*((shown, [labels[i] for i in shown]) if ax is axes[0] else ([],)))
        ax.tick_params(labelsize=7.5)
        _separate_roles(ax, names)
    _colorbar(figure, image, axes, label, ticks)
    return figure


def _image(
    ax: Axes, values: ArrayLike, colors: Colormap, ends: tuple[float, float], aspect: Literal["auto", "equal"] = "auto"
):  # type: ignore[no-untyped-def]
    style_axes(ax, spines=())
    ax.tick_params(length=0)
    return ax.imshow(values, cmap=colors, vmin=ends[0], vmax=ends[1], aspect=aspect, interpolation="nearest")


def _title(ax: Axes, text: str) -> None:
    ax.set_title(text, loc="left", y=1.0, fontsize=10, color=INK, fontweight="bold")


def _colorbar(figure: Figure, image: object, axes: list[Axes], label: str, ticks: list[float]) -> None:
    shrink = min(0.75, 2.6 / figure.get_figheight())  # as long on a tall figure as on a flat one
    bar = figure.colorbar(image, ax=axes, ticks=ticks, shrink=shrink, aspect=20, pad=0.02)  # type: ignore[arg-type]
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.ax.tick_params(colors=MUTED, labelcolor=INK, labelsize=8, length=2)
    bar.set_label(label, fontsize=9, color=MUTED)


def _names(names: Sequence[str] | None, nodes: Sequence[int]) -> list[str]:
    return [str(names[i]) if names else f"node {i}" for i in nodes]


def _thinned(n: int, most: int) -> list[int]:
    """Return at most `most` evenly spaced positions of n, the first among them."""
    return list(range(0, n, max(1, -(-n // max(most, 1)))))


def _separate_roles(ax: Axes, names: Sequence[str]) -> None:
    """Draw thin lines between neighbouring adapters of different roles, unless they alternate all the time."""
    roles = [re.sub(r"\d+", "*", name) for name in names]
    borders = [i + 0.5 for i in range(len(roles) - 1) if roles[i] != roles[i + 1]]
    for border in borders if len(borders) < len(roles) / 2 else ():
        ax.axhline(border, color=ON_COLOR, linewidth=0.9)
        ax.axvline(border, color=ON_COLOR, linewidth=0.9)
