"""Figures of scores: lines over rank or data, and differences with their intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from structlora_pyg.analysis.plot_style import (
    COLORS,
    GRID,
    INK,
    MUTED,
    PAGE,
    legend_above,
    new_figure,
    panel_grid,
    style_axes,
)

MARKERS = "osD^vPX*"


class Difference(NamedTuple):
    """A row of a forest plot.

    Attributes:
        group: What stands above the rows that share it.
        method: What it is called.
        difference: Mean difference.
        low: Lower end of its interval.
        high: Upper end.
        shown: Whether a difference is shown after correction.
    """

    group: str
    method: str
    difference: float
    low: float
    high: float
    shown: bool


def score_lines(
    panels: Mapping[str, Mapping[str, Mapping[float, Sequence[float]]]],
    methods: Sequence[str],
    xlabel: str,
    ticks: Mapping[float, str],
    stacked: bool = False,
) -> Figure:
    """Draw one panel a title: the mean of every method over x, with bars of one standard deviation.

    Args:
        panels: ``{title: {method: {x: scores, one a seed}}}``; x is positive and on a logarithmic scale.
        methods: All methods, in the order of their colours.
        xlabel: What x is.
        ticks: ``{x: label}`` of the ticks.
        stacked: Panels one below the other, for narrow pages.

    Raises:
        ValueError: No panel, or a panel without scores.
    """
    if not panels or not all(panels.values()):
        raise ValueError("panels must hold at least one panel with the scores of at least one method")
    figure, grid = panel_grid(list(panels), xlabel, stacked)
    span = max(ticks) / min(ticks) if len(ticks) > 1 else 2.0
    for ax, curves in zip(grid, panels.values(), strict=True):
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(FixedLocator(list(ticks)))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.set_xticks(list(ticks), list(ticks.values()))
        ax.margins(x=0.08, y=0.1)
        for method, points in curves.items():
            k = methods.index(method)
            # Side by side, so that bars of equal scores do not hide each other.
            x = np.array(sorted(points)) * span ** (0.012 * (k - (len(methods) - 1) / 2))
            scores = [np.asarray(points[at], dtype=float) for at in sorted(points)]
            mean = [values.mean() for values in scores]
            sd = [values.std(ddof=1) if len(values) > 1 else 0.0 for values in scores]
            ax.errorbar(
                x,
                mean,
                yerr=sd,
                label=method,
                color=COLORS[k % len(COLORS)],
                linestyle="-" if k < len(COLORS) else (0, (4, 2)),
                marker=MARKERS[k % len(MARKERS)],
                markersize=4.5,
                linewidth=1.7,
                elinewidth=1.0,
                capsize=2.5,
            )
    fullest = max(range(len(grid)), key=lambda i: len(list(panels.values())[i]))
    legend_above(figure, grid[fullest])
    return figure


def forest_plot(rows: Sequence[Difference], methods: Sequence[str], xlabel: str, width: float = 7.4) -> Figure:
    """Draw differences from a baseline with their intervals, one below the other; filled where one is shown.

    Args:
        rows: The differences; rows of one group stand together.
        methods: All methods, in the order of their colours.
        xlabel: What the differences are, with unit.
        width: Of the figure, in inches.

    Raises:
        ValueError: No row.
    """
    if not rows:
        raise ValueError("rows must hold at least one difference")
    lines: list[str | Difference] = []
    for group, members in groupby(rows, key=lambda row: row.group):
        lines += [group, *members]
    figure = new_figure((width, 0.19 * len(lines) + 0.75))
    ax = figure.subplots()
    style_axes(ax, spines=("bottom",))
    ax.axvline(0, color=MUTED, linewidth=1, zorder=1)
    ax.grid(axis="x", color=GRID, linewidth=0.7)
    ax.set_axisbelow(True)
    labels = []
    for y, line in enumerate(lines):
        if isinstance(line, str):
            labels.append(line)
            ax.axhline(y - 0.5, color=GRID, linewidth=0.7)
            continue
        labels.append(line.method)
        color = COLORS[methods.index(line.method) % len(COLORS)]
        ax.plot([line.low, line.high], [y, y], color=color, linewidth=1.6, solid_capstyle="butt", zorder=2)
        ax.plot(
            [line.difference],
            [y],
            marker=MARKERS[methods.index(line.method) % len(MARKERS)],
            markersize=5.5,
            color=color,
            markerfacecolor=color if line.shown else PAGE,
            markeredgewidth=1.4,
            zorder=3,
        )
    ax.set_ylim(len(lines) - 0.5, -0.5)
    ax.set_yticks(range(len(lines)), labels)
    for label, line in zip(ax.get_yticklabels(), lines, strict=True):
        label.set(fontweight="bold" if isinstance(line, str) else "normal", color=INK)
    ax.tick_params(axis="y", length=0)
    ax.margins(x=0.04)
    ax.set_xlabel(xlabel, fontsize=9, color=MUTED)
    return figure
