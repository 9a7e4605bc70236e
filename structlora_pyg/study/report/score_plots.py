"""Figures of scores and energies: lines with error bars, and differences with their intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator
from numpy.typing import ArrayLike, NDArray

from structlora_pyg.analysis.plots import (
    COLORS,
    GRID,
    INK,
    MUTED,
    PAGE,
    legend_above,
    panel_grid,
    style_axes,
)

MARKERS = "osD^vPX*"


class Difference(NamedTuple):
    """A row of a forest plot: a mean difference with its interval, filled where one is shown after correction."""

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
) -> Figure:
    """Draw one panel per title: the mean of every method over x, with bars of one standard deviation.

    Args:
        panels: ``{title: {method: {x: scores, one per seed}}}``; x is positive and on a logarithmic scale.
        methods: All methods, in the order of their colours.
        xlabel: What x is.
        ticks: ``{x: label}`` of the ticks.

    Raises:
        ValueError: No panel, or a panel without scores.
    """
    if not panels or not all(panels.values()):
        raise ValueError("panels must hold at least one panel with the scores of at least one method")
    figure, grid = panel_grid(list(panels), xlabel)
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
            error_bars(ax, x, [points[at] for at in sorted(points)], method, k)
    legend_above(figure, max(grid, key=lambda ax: len(ax.get_legend_handles_labels()[1])))
    return figure


def forest_plot(rows: Sequence[Difference], methods: Sequence[str], xlabel: str) -> Figure:
    """Draw differences from a baseline with their intervals, one below the other.

    Args:
        rows: The differences; rows of one group stand together.
        methods: All methods, in the order of their colours.
        xlabel: What the differences are, with unit.

    Raises:
        ValueError: No row.
    """
    if not rows:
        raise ValueError("rows must hold at least one difference")
    lines: list[str | Difference] = []
    for group, members in groupby(rows, key=lambda row: row.group):
        lines += [group, *members]
    figure = Figure(figsize=(7.4, 0.19 * len(lines) + 0.75), layout="constrained")
    ax = figure.subplots()
    style_axes(ax, spines=("bottom",))
    ax.axvline(0, color=MUTED, linewidth=1, zorder=1)
    ax.grid(axis="x", color=GRID, linewidth=0.7)
    ax.set_axisbelow(True)
    for y, line in enumerate(lines):
        if isinstance(line, str):
            ax.axhline(y - 0.5, color=GRID, linewidth=0.7)
            continue
        k = methods.index(line.method)
        color, marker = COLORS[k % len(COLORS)], MARKERS[k % len(MARKERS)]
        ax.plot([line.low, line.high], [y, y], color=color, linewidth=1.6, solid_capstyle="butt", zorder=2)
        fill = color if line.shown else PAGE
        (point,) = ax.plot([line.difference], [y], marker=marker, markersize=5.5, color=color, zorder=3)
        point.set(markerfacecolor=fill, markeredgewidth=1.4)
    ax.set_ylim(len(lines) - 0.5, -0.5)
    ax.set_yticks(range(len(lines)), [line if isinstance(line, str) else line.method for line in lines])
    for label, line in zip(ax.get_yticklabels(), lines, strict=True):
        label.set(fontweight="bold" if isinstance(line, str) else "normal", color=INK)
    ax.tick_params(axis="y", length=0)
    ax.margins(x=0.04)
    ax.set_xlabel(xlabel, fontsize=9, color=MUTED)
    return figure


def energy_lines(energies: Mapping[str, ArrayLike], rows: Sequence[str]) -> Figure:
    """Draw the energy after each layer: the mean over seeds of every row, with bars of one standard deviation.

    Args:
        energies: ``{row: energies (seeds, layers + 1)}``, the network's input first.
        rows: All rows, in the order of their colours.

    Raises:
        ValueError: No row.
    """
    if not energies:
        raise ValueError("energies must hold at least one row")
    figure, (ax,) = panel_grid([""], "layer of the coordinator")
    figure.set_size_inches(7.4, 3.4)
    deepest = 0
    for position, (row, values) in enumerate(energies.items()):
        table = np.atleast_2d(np.asarray(values, dtype=float))
        deepest = max(deepest, table.shape[1] - 1)
        # Side by side, so that rows with equal energies do not hide each other.
        x = np.arange(table.shape[1]) + 0.02 * (position - (len(energies) - 1) / 2)
        error_bars(ax, x, list(table.T), row, rows.index(row))
    ax.set_xticks(range(deepest + 1), ["input", *map(str, range(1, deepest + 1))])
    ax.set_ylabel("Dirichlet energy / squared norm", fontsize=9, color=MUTED)
    ax.set_ylim(bottom=-0.03 * ax.get_ylim()[1])  # rows without edges lie at 0
    legend_above(figure, ax)
    return figure


def error_bars(ax: Axes, x: NDArray, values: Sequence[Sequence[float]], label: str, k: int) -> None:
    """Draw the mean of the values at each x with bars of one standard deviation."""
    seeds = [np.asarray(v, dtype=float) for v in values]
    ax.errorbar(
        x,
        [v.mean() for v in seeds],
        yerr=[v.std(ddof=1) if len(v) > 1 else 0.0 for v in seeds],
        label=label,
        color=COLORS[k % len(COLORS)],
        linestyle="-" if k < len(COLORS) else (0, (4, 2)),
        marker=MARKERS[k % len(MARKERS)],
        markersize=4.5,
        linewidth=1.6,
        elinewidth=1.0,
        capsize=2.5,
    )
