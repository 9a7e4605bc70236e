"""Figures: training curves, gates, likeness of layers; `structlora_pyg.analysis.graph_plots` draws the adapter graph.

Every function returns a `matplotlib.figure.Figure` that belongs to the caller: pyplot and its global state are not
used, so nothing has to be closed and any backend will do.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from structlora_pyg.analysis.graph_plots import draw_graph, draw_graphs
from structlora_pyg.analysis.plot_style import (
    COLORS,
    DIVERGING,
    INK,
    MUTED,
    ON_CELLS,
    SEQUENTIAL,
    legend_above,
    new_figure,
    panel_grid,
    short_names,
    style_axes,
)

__all__ = [
    "draw_graph", "draw_graphs", "gate_heatmap", "similarity_heatmaps", "square_heatmaps", "training_curves",
]  # fmt: skip

Curve = tuple[ArrayLike, ArrayLike]


def training_curves(
    panels: Mapping[str, Mapping[str, Curve]],
    marks: Mapping[str, float] | None = None,
    xlabel: str = "optimizer step",
    stacked: bool = False,
) -> Figure:
    """Draw one panel a quantity: the mean over seeds of every method, with a band of one standard deviation.

    Args:
        panels: ``{quantity: {method: (x, y)}}`` with x (points,) and y (seeds, points).
        marks: ``{label: x}`` of vertical lines, for instance where the filter starts to act.
        xlabel: What x counts.
        stacked: Panels one below the other, for narrow pages, instead of side by side.

    Raises:
        ValueError: No panel; x and y that do not fit.
    """
    if not panels:
        raise ValueError("panels must hold at least one quantity")
    methods = list(dict.fromkeys(m for curves in panels.values() for m in curves))
    figure, grid = panel_grid(list(panels), xlabel, stacked)
    for ax, (quantity, curves) in zip(grid, panels.items(), strict=True):
        ax.margins(x=0.02, y=0.14 if marks else 0.05)  # room for the marks' labels above the curves
        for method, (x, y) in curves.items():
            x_points, y_seeds = np.asarray(x, dtype=float), np.atleast_2d(np.asarray(y, dtype=float))
            if y_seeds.shape[1:] != x_points.shape:
                raise ValueError(
                    f"{quantity} of {method}: y must be (seeds, {len(x_points)}), one column a point of x, got "
                    f"{y_seeds.shape}"
                )
            k, mean = methods.index(method), y_seeds.mean(0)
            color, line = COLORS[k % len(COLORS)], "-" if k < len(COLORS) else (0, (4, 2))
            ax.plot(x_points, mean, color=color, linewidth=2, linestyle=line, label=method, zorder=3)
            if len(y_seeds) > 1:
                sd = y_seeds.std(0, ddof=1)
                alpha = min(0.18, 0.6 / len(curves))  # many bands on one another stay lighter than the lines
                ax.fill_between(x_points, mean - sd, mean + sd, color=color, alpha=alpha, linewidth=0, zorder=2)
        for label, position in (marks or {}).items():
            ax.axvline(position, color=MUTED, linewidth=0.9, linestyle=(0, (3, 3)), zorder=1)
            ax.annotate(
                label,
                (position, 1),
                xycoords=("data", "axes fraction"),
                xytext=(4, -2),
                textcoords="offset points",
                va="top",
                fontsize=8,
                color=MUTED,
            )
    if len(methods) > 1:
        legend_above(figure, grid[0])
    return figure


def gate_heatmap(gate: ArrayLike, names: Sequence[str]) -> Figure:
    """Draw the gates: one row an adapter, one column a rank-one direction; closed gates show a plain 0.

    Args:
        gate: (N, D) gates in [0, 1].
        names: N names of the rows.

    Raises:
        ValueError: Shapes that do not fit.
    """
    values = np.asarray(gate, dtype=float)
    if values.ndim != 2 or len(values) != len(names):
        raise ValueError(f"gate must be ({len(names)}, directions), one row a name, got {values.shape}")
    n, d = values.shape
    row = min(0.27, 9.0 / n)
    width = max(2.4, min(0.5 * d, 7.0))
    figure = new_figure((width + 1.9, row * n + 0.95))
    ax = figure.subplots()
    style_axes(ax, spines=())
    image = ax.imshow(values, cmap=SEQUENTIAL, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    labels = short_names(names)
    rows = thinned(n, int(row * n / 0.16))
    ax.set_yticks(rows, [labels[i] for i in rows])
    columns = thinned(d, int(width / 0.26))
    ax.set_xticks(columns, [str(j + 1) for j in columns])
    ax.set_xlabel("direction", fontsize=9, color=MUTED)
    ax.tick_params(length=0)
    _separate(ax, names, vertical=False)
    annotated = row >= 0.2 and d <= 16
    if annotated:
        for i, j in itertools.product(range(n), range(d)):
            text = "0" if values[i, j] == 0 else f"{values[i, j]:.2f}".removeprefix("0")
            light = values[i, j] > 0.58
            ax.text(j, i, text, ha="center", va="center", fontsize=7.5, color="#ffffff" if light else ON_CELLS)
    closed = " (0: closed)" if annotated else ""
    colorbar(figure, image, ax, f"gate{closed}", [0, 0.5, 1])
    return figure


def similarity_heatmaps(similarities: Mapping[str, ArrayLike], names: Sequence[str], stacked: bool = False) -> Figure:
    """Draw cosines between the updates of layers, one panel a method, on one scale from -1 to 1 centred at 0.

    Args:
        similarities: ``{method: cosines (N, N)}``.
        names: N names of the adapters; lines separate the roles where adapters of one role stand together.
        stacked: Panels one below the other, for narrow pages.

    Raises:
        ValueError: No panel; shapes that do not fit.
    """
    if not similarities:
        raise ValueError("similarities must hold at least one method")
    return square_heatmaps(similarities, names, stacked, DIVERGING, [-1, -0.5, 0, 0.5, 1], "cosine of the updates")


def square_heatmaps(
    panels: Mapping[str, ArrayLike],
    names: Sequence[str],
    stacked: bool,
    colors: Colormap,
    ticks: list[float],
    label: str,
) -> Figure:
    """Draw one (N, N) table a panel on one scale.

    Args:
        panels: ``{title: values (N, N)}``.
        names: N names of rows and columns; lines separate the roles where adapters of one role stand together.
        stacked: Panels one below the other, for narrow pages.
        colors: Colours of the scale.
        ticks: Marks of the scale; the first and the last are its ends.
        label: What the scale shows.

    Raises:
        ValueError: Shapes that do not fit.
    """
    n, count = len(names), len(panels)
    labels, shown = short_names(names), thinned(n, 17)
    margin = 0.065 * max(map(len, labels))  # labels stand upright below a panel, and once to the left
    side = 3.0
    figure = new_figure(
        (side + margin + 0.85, (side + margin + 0.45) * count)
        if stacked
        else (side * count + margin + 0.95, side + margin + 0.4)
    )
    grid = figure.subplots(count, 1, squeeze=False) if stacked else figure.subplots(1, count, squeeze=False)
    for ax, (title, given) in zip(grid.flat, panels.items(), strict=True):
        values = np.asarray(given, dtype=float)
        if values.shape != (n, n):
            raise ValueError(f"{label} of {title} must be ({n}, {n}), got {values.shape}")
        style_axes(ax, spines=())
        ax.set_title(title, loc="left", fontsize=10, color=INK, fontweight="bold")
        image = ax.imshow(values, cmap=colors, vmin=ticks[0], vmax=ticks[-1], interpolation="nearest")
        ax.set_xticks(shown, [labels[i] for i in shown], rotation=90)
        if stacked or ax is grid.flat[0]:
            ax.set_yticks(shown, [labels[i] for i in shown])
        else:
            ax.set_yticks([])
        ax.tick_params(length=0, labelsize=7.5)
        _separate(ax, names, vertical=True)
    colorbar(figure, image, list(grid.flat), label, ticks)
    return figure


def colorbar(figure: Figure, image: object, axes: Axes | list[Axes], label: str, ticks: list[float]) -> None:
    """Put a scale beside panels."""
    shrink = min(0.75, 2.6 / figure.get_figheight())  # as long on a tall figure as on a flat one
    bar = figure.colorbar(image, ax=axes, ticks=ticks, shrink=shrink, aspect=20, pad=0.02)  # type: ignore[arg-type]
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.ax.tick_params(colors=MUTED, labelcolor=INK, labelsize=8, length=2)
    bar.set_label(label, fontsize=9, color=MUTED)


def thinned(n: int, most: int) -> list[int]:
    """Return at most `most` evenly spaced positions of n, the first among them."""
    return list(range(0, n, max(1, -(-n // max(most, 1)))))


def _separate(ax: Axes, names: Sequence[str], vertical: bool) -> None:
    """Draw thin lines between neighbouring adapters of different roles, unless they alternate all the time."""
    roles = [re.sub(r"\d+", "*", name) for name in names]
    borders = [i + 0.5 for i in range(len(roles) - 1) if roles[i] != roles[i + 1]]
    if len(borders) >= len(roles) / 2:
        return
    for border in borders:
        ax.axhline(border, color=ON_CELLS, linewidth=0.9)
        if vertical:
            ax.axvline(border, color=ON_CELLS, linewidth=0.9)
