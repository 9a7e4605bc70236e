"""The look that all figures share: colours, panels, legends, names.

Lines and letters are drawn in `INK`, `MUTED`, `GRID` and `PAGE`, which a page replaces by the colours
of the reader's theme.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.ticker import MaxNLocator

INK, MUTED, GRID = "#1c2733", "#67727e", "#d4dae0"
PAGE = "#fefefe"  # what is empty
ON_CELLS = "#101820"  # what stands on coloured cells does not follow the theme
# Apart for colour-blind readers too, and of middle lightness: they stand on white and on black.
COLORS = ("#6b7a8c", "#e0592a", "#1d8fa3", "#b0559b", "#5b9a2f", "#c48a0a", "#4668c9", "#8a6a4f", "#cf4d6f", "#3f9e7c")
TITLE_FONT = FontProperties(weight="bold")
DIVERGING = LinearSegmentedColormap.from_list(
    "likeness", ["#153f73", "#3f7fba", "#a9cce6", "#f6f6f4", "#f5bfa0", "#d7603c", "#7d1a1f"]
)
SEQUENTIAL = LinearSegmentedColormap.from_list("gate", ["#edf1f3", "#a5d0d3", "#3f9aa6", "#155e75", "#0b3a53"])


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


def new_figure(size: tuple[float, float]) -> Figure:
    """Return an empty figure of a size in inches whose parts make room for each other."""
    return Figure(figsize=size, layout="constrained")


def panel_grid(titles: Sequence[str], xlabel: str, stacked: bool) -> tuple[Figure, list[Axes]]:
    """Return a figure and one panel a title: up to three in a row, four as two by two, or one below the other."""
    n = len(titles)
    columns = 1 if stacked else 2 if n == 4 else min(n, 3)
    rows = -(-n // columns)
    figure = new_figure((4.1, 2.7 * n + 0.5) if stacked else (3.7 * columns + 0.3, 2.8 * rows + 0.3))
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for ax, title in zip(grid, titles, strict=False):
        style_axes(ax)
        ax.set_title(title, loc="left", fontsize=10, color=INK, fontweight="bold")
        ax.set_xlabel(xlabel, fontsize=9, color=MUTED)
        ax.grid(axis="y", color=GRID, linewidth=0.7)
    for ax in grid[n:]:
        ax.set_visible(False)
    return figure, grid[:n]


def legend_above(figure: Figure, ax: Axes) -> None:
    """Name the methods of a panel above all panels, in as many rows as the width asks for."""
    lines, labels = ax.get_legend_handles_labels()
    room = figure.get_figwidth() - 0.2
    widest = 0.075 * max(map(len, labels)) + 0.45  # inches
    legend = figure.legend(
        lines,
        labels,
        loc="outside upper left",
        ncols=max(1, min(len(labels), int(room / widest))),
        frameon=False,
        fontsize=9,
        handlelength=1.6,
    )
    ink(legend.get_texts())


def style_axes(ax: Axes, spines: Sequence[str] = ("bottom", "left")) -> None:
    """Give a panel the look of all figures: thin lines, small numbers, few ticks."""
    for side, spine in ax.spines.items():
        spine.set(visible=side in spines, color=GRID)
    ax.tick_params(colors=MUTED, labelcolor=INK, labelsize=8, width=0.7, length=3)
    ax.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))


def ink(texts: Sequence) -> None:
    """Give texts the colour of the page's own text."""
    for text in texts:
        text.set_color(INK)
