"""The figure of a depth study: how alike the features of joined adapters become, layer by layer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from structlora_pyg.analysis.plots import COLORS, MUTED, legend_above, panel_grid
from structlora_pyg.study.report.cells import percent
from structlora_pyg.study.report.contrasts import task_name
from structlora_pyg.study.report.page import FigureSection
from structlora_pyg.study.report.records import Grid, Setting, number
from structlora_pyg.study.report.score_plots import MARKERS

Energies = dict[str, NDArray]


def smoothing_figures(grid: Grid, name: str) -> list[FigureSection]:
    """Return, task by task, the Dirichlet energies of the coordinators, at the last look of the runs that have any."""
    found = []
    for task in dict.fromkeys(setting.task for setting in grid.settings):
        energies = {s: _energies(grid, s) for s in grid.settings if s.task == task}
        setting = max(energies, key=lambda s: (sum(map(len, energies[s].values())), s.fraction, s.rank))
        if energies[setting]:
            found.append(_section(grid, setting, energies[setting], name))
    return found


def energy_lines(energies: Mapping[str, ArrayLike], rows: Sequence[str], width: float = 7.4) -> Figure:
    """Draw the energy after each layer: the mean over seeds of every row, with bars of one standard deviation.

    Args:
        energies: ``{row: energies (seeds, layers + 1)}``, the network's input first.
        rows: All rows, in the order of their colours.
        width: Of the figure, in inches.

    Raises:
        ValueError: No row.
    """
    if not energies:
        raise ValueError("energies must hold at least one row")
    figure, (ax,) = panel_grid([""], "layer of the coordinator")
    figure.set_size_inches(width, 3.4 if width > 5 else 4.4)  # a narrow legend is tall
    deepest = 0
    for position, (row, values) in enumerate(energies.items()):
        k, table = rows.index(row), np.atleast_2d(np.asarray(values, dtype=float))
        deepest = max(deepest, table.shape[1] - 1)
        # Side by side, so that rows with equal energies do not hide each other.
        x = np.arange(table.shape[1]) + 0.02 * (position - (len(energies) - 1) / 2)
        ax.errorbar(
            x,
            table.mean(0),
            yerr=table.std(0, ddof=1) if len(table) > 1 else None,
            label=row,
            color=COLORS[k % len(COLORS)],
            linestyle="-" if k < len(COLORS) else (0, (4, 2)),
            marker=MARKERS[k % len(MARKERS)],
            markersize=4.5,
            linewidth=1.5,
            elinewidth=0.9,
            capsize=2,
        )
    ax.set_xticks(range(deepest + 1), ["input", *map(str, range(1, deepest + 1))])
    ax.set_ylabel("Dirichlet energy / squared norm", fontsize=9, color=MUTED)
    ax.set_ylim(bottom=-0.03 * ax.get_ylim()[1])  # rows without edges lie at 0
    legend_above(figure, ax)
    return figure


def _energies(grid: Grid, setting: Setting) -> Energies:
    """Return ``{row: (seeds, layers + 1)}`` of the last look of every run."""
    found = {}
    for row in grid.methods:
        looks = [(run.data.get("curves") or {}).get("structure") or [{}] for run in grid.done(row, setting).values()]
        lists = [[number(value) for value in look[-1].get("dirichlet") or []] for look in looks]
        lists = [values for values in lists if values and np.isfinite(values).all()]
        if lists and len(set(map(len, lists))) == 1:
            found[row] = np.array(lists)
    return found


def _section(grid: Grid, setting: Setting, energies: Energies, name: str) -> FigureSection:
    data = "all data" if setting.fraction == 1 else f"{percent(setting.fraction)} of the data"
    last = "; ".join(f"{row} {table[:, 0].mean():.2f} to {table[:, -1].mean():.2f}" for row, table in energies.items())
    return FigureSection(
        title=f"Over-smoothing on {task_name(setting.task)}",
        figure=energy_lines(energies, grid.methods),
        alt=f"Dirichlet energy by layer of the coordinator. From the input to the last layer: {last}.",
        caption=(
            f"{task_name(setting.task)}, r = {setting.rank}, {data}. Dirichlet energy of the features inside the "
            "coordinator at the end of training, divided by their squared norm: 0 where joined adapters have the same "
            "features (up to their degree), and without edges. Mean and one standard deviation over seeds."
        ),
        name=f"{name}-{re.sub('[^A-Za-z0-9]+', '-', setting.task)}-smoothing",
    )
