"""The figures of a comparison: scores over rank and data, differences, and how coherent the layers' updates are."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from structlora_pyg.analysis.plots import gate_heatmap, similarity_heatmaps, training_curves
from structlora_pyg.study.report.cells import heads, percent
from structlora_pyg.study.report.contrasts import MEAN, SHARES, Summary, task_name
from structlora_pyg.study.report.page import FigureSection
from structlora_pyg.study.report.records import Grid, Run, Setting, number
from structlora_pyg.study.report.score_plots import Difference, forest_plot, score_lines

CURVES = {
    "Training loss": "loss",
    "Adjacent-layer cosine": "adjacent_cosine",
    "Drift energy, relative": "relative_drift",
    "Cosine of the gradients": "gradient_cosine",
}
ROWS = 40  # of a forest plot; more go into further figures


def line_figures(summary: Summary, name: str) -> list[FigureSection]:
    """Return scores against rank and against the share of the data, where these vary."""
    ranks = _lines(summary, name, "rank", lambda s: s.rank, lambda s: percent(s.fraction), str)
    shares = _lines(summary, name, "data", lambda s: s.fraction, lambda s: f"r = {s.rank}", percent)
    return [section for section in (ranks, shares) if section is not None]


def forest_figures(summary: Summary, name: str) -> list[FigureSection]:
    """Return forest plots of the differences from the baseline: one a unit, in pieces if there are many."""
    grid, found = summary.grid, []
    kinds: dict[str, list[Difference]] = {}
    for c in summary.contrasts:
        if c.paired is not None:
            metric = summary.units[c.setting.task].metric
            kind = "points" if metric in (*SHARES, MEAN) else str(summary.units[c.setting.task])
            shown = c.verdict in ("better", "worse")
            group = ", ".join(heads(grid, c.setting))
            row = Difference(group, c.method, c.paired.difference, c.paired.low, c.paired.high, shown)
            kinds.setdefault(kind, []).append(row)
    pieces = [(kind, piece) for kind, rows in kinds.items() for piece in _pieces(rows)]
    for k, (kind, rows) in enumerate(pieces, start=1):
        number_of = f" ({k} of {len(pieces)})" if len(pieces) > 1 else ""
        xlabel, sure = f"difference from {grid.baseline}, {kind}", sum(row.shown for row in rows)
        found.append(
            FigureSection(
                title=f"Differences with their intervals{number_of}",
                figure=forest_plot(rows, grid.methods, xlabel),
                alt=(
                    f"Forest plot of {len(rows)} paired differences from {grid.baseline} with 95 % confidence "
                    f"intervals. After correction a difference is shown for {sure} of them."
                ),
                caption=(
                    f"Mean paired difference and 95 % confidence interval (not corrected). Filled: p < 0.05 after "
                    f"Holm's correction over {summary.tests} comparisons; empty: no difference shown."
                ),
                name=f"{name}-differences{f'-{k}' if len(pieces) > 1 else ''}",
            )
        )
    return found


def coherence_figures(grid: Grid, name: str) -> list[FigureSection]:
    """Return, task by task, how the structure of the updates develops, how alike they end up, and the gates."""
    sections: list[FigureSection] = []
    for task in dict.fromkeys(s.task for s in grid.settings):
        setting = _measured_most(grid, task)
        if setting is None:
            continue
        data = "all data" if setting.fraction == 1 else f"{percent(setting.fraction)} of the data"
        where = f"{task_name(task)}, r = {setting.rank}, {data}"
        for draw in (_development, _likeness, _gates):
            section = draw(grid, setting, where, f"{name}-{re.sub('[^A-Za-z0-9]+', '-', task)}")
            sections += [section] if section is not None else []
    return sections


def _lines(
    summary: Summary,
    name: str,
    what: str,
    x_of: Callable[[Setting], float],
    other_of: Callable[[Setting], str],
    label: Callable[[float], str],
) -> FigureSection | None:
    grid = summary.grid
    xs = sorted({x_of(setting) for setting in grid.settings})
    if len(xs) < 2:
        return None
    others = len({other_of(setting) for setting in grid.settings}) > 1
    panels: dict[str, dict[str, dict[float, list[float]]]] = {}
    for setting in sorted(summary.columns, key=lambda s: summary.columns.index(s)):
        title = task_name(setting.task) + (f", {other_of(setting)}" if others else "")
        for method in grid.methods:
            if values := list(summary.scores[method, setting].values.values()):
                panels.setdefault(title, {}).setdefault(method, {})[x_of(setting)] = values
    if not panels:
        return None
    xlabel = {"rank": "rank r", "data": "share of the training data"}[what]
    ticks = {x: label(int(x) if what == "rank" else x) for x in xs}
    units = "; ".join(f"{task_name(task)}: {unit}" for task, unit in summary.units.items() if task != MEAN)
    return FigureSection(
        title=f"Scores against {'the rank' if what == 'rank' else 'the amount of data'}",
        figure=score_lines(panels, grid.methods, xlabel, ticks),
        alt=f"Mean score against {xlabel}, {len(panels)} panels: {'; '.join(panels)}. The tables give the numbers.",
        caption=f"Mean and one standard deviation over seeds. {units}.",
        name=f"{name}-{what}",
    )


def _pieces(rows: Sequence[Difference]) -> Iterator[list[Difference]]:
    """Yield the rows in pieces of at most about `ROWS`, groups undivided."""
    piece: list[Difference] = []
    for _, group in groupby(rows, key=lambda row: row.group):
        together = list(group)
        if piece and len(piece) + len(together) > ROWS:
            yield piece
            piece = []
        piece += together
    if piece:
        yield piece


def _measured_most(grid: Grid, task: str) -> Setting | None:
    """Return the setting of a task with most measured structures; of equals that with most data, then highest rank."""
    counts = {
        setting: sum(
            bool(run.data.get("structure") or run.data.get("curves", {}).get("structure"))
            for method in grid.methods
            for run in grid.done(method, setting).values()
        )
        for setting in grid.settings
        if setting.task == task
    }
    best = max(counts, key=lambda s: (counts[s], s.fraction, s.rank))
    return best if counts[best] else None


def _development(grid: Grid, setting: Setting, where: str, name: str) -> FigureSection | None:
    panels = {}
    for title, key in CURVES.items():
        curves = {m: c for m in grid.methods if (c := _curve(list(grid.done(m, setting).values()), key)) is not None}
        if curves:
            panels[title] = curves
    if not panels:
        return None
    ends = {
        title: ", ".join(f"{method} {np.mean(y[:, -1]):.3g}" for method, (_, y) in curves.items())
        for title, curves in panels.items()
    }
    return FigureSection(
        title=f"Training on {task_name(setting.task)}",
        figure=training_curves(panels),
        alt=f"Curves by optimizer step. At the end: {'; '.join(f'{title}: {text}' for title, text in ends.items())}.",
        caption=(
            f"{where}. Mean and one standard deviation over seeds. Cosine and drift compare the updates of one role at "
            "consecutive depths; drift is relative to the mean squared norm of an update."
        ),
        name=f"{name}-training",
    )


def _curve(runs: Sequence[Run], name: str) -> tuple[NDArray, NDArray] | None:
    """Return steps (points,) and values (seeds, points) where all runs have a finite value; None without any."""
    series: list[Mapping[int, float]] = []
    for run in runs:
        curves = run.data.get("curves") or {}
        if name == "loss":
            pairs = list(zip(curves.get("step", []), curves.get("loss", []), strict=False))
        else:
            pairs = [(point["step"], point.get(name)) for point in curves.get("structure") or []]
        points = {int(step): number(value) for step, value in pairs}
        series.append({step: value for step, value in points.items() if math.isfinite(value)})
    series = [points for points in series if points]
    steps = sorted(set.intersection(*map(set, series))) if series else []
    if len(steps) < 2:
        return None
    return np.array(steps), np.array([[points[step] for step in steps] for points in series])


def _likeness(grid: Grid, setting: Setting, where: str, name: str) -> FigureSection | None:
    """Return heat maps of the baseline and the coordinated method, means over seeds."""
    means: dict[str, NDArray] = {}
    counts: dict[str, int] = {}
    names: list[str] = []
    for method in _pair(grid, setting):
        found = [s for run in grid.done(method, setting).values() if (s := run.data.get("structure"))]
        if found and (not names or found[0]["names"] == names):
            names = found[0]["names"]
            same = [s for s in found if s["names"] == names]
            means[method] = np.mean([np.array(s["similarity"], dtype=float) for s in same], axis=0)
            counts[method] = len(same)
    if not means:
        return None
    roles = list(dict.fromkeys(_role(name) for name in names))
    order = sorted(range(len(names)), key=lambda i: roles.index(_role(names[i])))
    means = {method: mean[np.ix_(order, order)] for method, mean in means.items()}
    shown = [names[i] for i in order]
    least, most = min(counts.values()), max(counts.values())
    count = str(most) if least == most else f"{least} to {most}"
    return FigureSection(
        title=f"How alike the layers' updates are, {task_name(setting.task)}",
        figure=similarity_heatmaps(means, shown),
        alt=f"Heat maps of cosines between the updates of {len(names)} adapters: {', '.join(means)}.",
        caption=f"{where}. Cosines between the updates of all adapters after training, mean over {count} seeds.",
        name=f"{name}-likeness",
    )


def _gates(grid: Grid, setting: Setting, where: str, name: str) -> FigureSection | None:
    for method in reversed(_pair(grid, setting)):
        for seed, run in sorted(grid.done(method, setting).items()):
            gates = run.data.get("gates") or {}
            names = (run.data.get("structure") or {}).get("names") or []
            values = gates.get("values") or []
            if not values or len({len(row) for row in values}) > 1:
                continue
            if len(names) != len(values):
                names = [f"adapter {i}" for i in range(len(values))]
            closed, total = sum(v == 0 for row in values for v in row), sum(map(len, values))
            size = f"{len(values)} adapters by {len(values[0])} directions"
            return FigureSection(
                title=f"Gates of {method}, {task_name(setting.task)}",
                figure=gate_heatmap(values, names),
                alt=f"Heat map of {size}; {closed} of {total} are closed.",
                caption=(
                    f"{where}. Gates of the rank-one directions after training, seed {seed}; {closed} of {total} are "
                    "closed. Gates are folded into the exported adapter."
                ),
                name=f"{name}-gates",
            )
    return None


def _pair(grid: Grid, setting: Setting) -> list[str]:
    """Return the baseline and the first row of StructLoRA; where these are one or lack, the first rows with any."""
    having = [m for m in grid.methods if any(r.data.get("structure") for r in grid.done(m, setting).values())]
    ours = [m for m in having if any(r.method == "structlora" for r in grid.done(m, setting).values())]
    named = sorted(ours, key=lambda m: m != "StructLoRA")[:1]
    others = [m for m in having if m not in ours] if grid.baseline in named else [grid.baseline]
    chosen = [m for m in having if m in others[:1] and m not in named] + named
    return chosen or having[:2]


def _role(name: str) -> str:
    return "".join(c for c in name if not c.isdigit())
