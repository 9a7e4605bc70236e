"""The report of comparisons: a page, LaTeX and figures of scores, differences and the course of training."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from numpy.typing import NDArray

from structlora_pyg.analysis.plots import COLORS, GRID, INK, MUTED, PAGE, style_axes, training_curves
from structlora_pyg.checks import replace_file
from structlora_pyg.study.report.page import LATEX_HEAD, Section, count_of, latex_table, percent, save_report
from structlora_pyg.study.report.records import Grid, Setting, read_comparison
from structlora_pyg.study.report.summary import (
    FORMS,
    MEAN,
    SHARES,
    TESTED,
    Summary,
    dimensions,
    heads,
    summarize,
    task_name,
)
from structlora_pyg.study.report.tables import (
    cost_table,
    difference_table,
    other_metrics_table,
    score_table,
    structure_table,
)

TITLE = "Comparison of fine-tuning methods"
CURVES = {
    "Training loss": "loss",
    "Adjacent-layer cosine": "adjacent_cosine",
    "Drift energy, relative": "relative_drift",
    "Cosine of the gradients": "gradient_cosine",
    "Dirichlet energy, relative": "dirichlet",
}
MARKERS = "osD^vPX*"
Runs = list[Mapping[str, Any]]  # what each run of a cell measured over its course


def write_comparison(folders: Sequence[str | Path], output_dir: str | Path) -> dict[str, Path]:
    """Write the report of one or several comparisons.

    Args:
        folders: What `structlora compare` or `structlora_pyg.study.report.records.pack` wrote.
        output_dir: Where ``report.html``, ``report.tex``, ``report.csv`` (a row for every method in a setting: mean,
            difference from the baseline, p-values, verdict) and the folder ``figures`` go.

    Returns:
        ``{name: path}`` of all files, by their names in the folder: ``report.html``, ``figures/ranks-data.svg``, ...

    Raises:
        RecordError: A folder cannot be read; nothing is written then.
        ValueError: No folder.
        OSError: The output cannot be written.
    """
    if not folders:
        raise ValueError("give at least one folder that `structlora compare` wrote")
    grids = [grid for folder in folders for grid in read_comparison(folder)]
    summaries = [summarize(grid) for grid in grids]
    chapters = [_chapter(name, summary) for name, summary in zip(_names(grids), summaries, strict=True)]
    latex = [LATEX_HEAD]
    for name, chapter in zip(_names(grids), chapters, strict=True):
        tables = [section for section in chapter.sections if section.table is not None]
        latex += [latex_table(table, f"{name}-{k}", chapter.title) for k, table in enumerate(tables, start=1)]
    runs = pd.concat([grid.done() for grid in grids])
    columns = ["device", *(column for column in runs if column.startswith("versions."))]
    versions = runs[columns].drop_duplicates().rename(columns=lambda name: name.removeprefix("versions."))
    sections = [
        *chapters,
        Section(title="Devices and versions", code=versions.to_string(index=False) if len(runs) else "", fold=True),
    ]
    written = save_report(output_dir, "report", TITLE, sections, _lead(summaries), _facts(grids))
    columns = ["method", *Setting._fields, "state", "planned", "shared", "mean", "sd", *TESTED, "p", "verdict"]
    cells = pd.concat([summary.results.assign(comparison=summary.grid.name) for summary in summaries])
    csv = cells[["comparison", *columns]].to_csv(index=False)  # numbers as they are, for other programs
    texts = {"report.tex": "\n\n".join(latex) + "\n", "report.csv": csv}
    return {**written, **{name: replace_file(Path(output_dir) / name, text) for name, text in texts.items()}}


def _names(grids: Sequence[Grid]) -> list[str]:
    """Return names that make good file names; where folders share a name, folder and number stand before it."""
    count = Counter(grid.name for grid in grids)
    names = [g.name if count[g.name] == 1 else f"{g.folder.resolve().name}-{k}-{g.name}" for k, g in enumerate(grids)]
    return [re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-") or "grid" for name in names]


def _chapter(name: str, summary: Summary) -> Section:
    grid = summary.grid
    sections = [
        score_table(summary),
        *line_figures(summary, name),
        difference_table(summary),
        *forest_figures(summary, name),
        other_metrics_table(grid),
        cost_table(grid),
        structure_table(grid),
        training_figure(grid, name),
    ]
    return Section(title=grid.title, text=grid.note, sections=[section for section in sections if section is not None])


def _facts(grids: Sequence[Grid]) -> dict[str, str]:
    cells = pd.concat([grid.cells.assign(folder=str(grid.folder)) for grid in grids])
    ran = cells[cells["device"].notna() | (cells["state"] == "failed") & cells["lr"].notna()]
    ran = ran.drop_duplicates(["folder", "key"])  # a run that grids share counts once
    done = int((ran["state"] == "done").sum())
    waiting = int((cells["state"] == "not run yet").sum())
    without = int(((cells["state"] == "failed") & cells["lr"].isna()).sum())
    failed = len(ran) - done
    left = "".join(f", {n} {what}" for n, what in ((failed, "failed"), (without, "cannot be made")) if n)
    facts = {
        "runs": f"{done} of {len(ran) + waiting + without} done{left}",
        "methods": str(len({method for grid in grids for method in grid.methods})),
        "tasks": str(len({setting.task for grid in grids for setting in grid.settings})),
        "device": "; ".join(ran["device"].dropna().unique()),
    }
    return {name: text for name, text in facts.items() if text}


def _lead(summaries: Sequence[Summary]) -> str:
    """Return what may be claimed, grid by grid."""
    sentences = []
    for summary in summaries:
        grid, compared = summary.grid, summary.results[summary.results["verdict"] != ""]
        if compared.empty:
            continue
        tested = compared[compared["paired"].notna()]
        if tested.empty:
            sentences.append(f"{grid.title}: no comparison has the two seeds yet that a test needs.")
            continue
        said = []
        for verdict, rows in tested.groupby("verdict"):
            named = ", ".join(f"{method} ({count})" for method, count in Counter(rows["method"]).items())
            shown = verdict in ("better", "worse")
            said.append(
                f"{verdict} than {grid.baseline} in {len(rows)}: {named}" if shown else f"{verdict} in {len(rows)}"
            )
        where = " (means over tasks among them)" if summary.averaged else ""
        where += " on validation data" if grid.validation else ""
        sentences.append(f"{grid.title}: of {count_of(len(tested), 'tested comparison')}{where}, {'; '.join(said)}.")
    return " ".join(sentences)


def line_figures(summary: Summary, name: str) -> list[Section]:
    """Return scores against rank and against the share of the data, where these vary."""
    grid, found = summary.grid, []
    units = "; ".join(f"{task_name(task)}: {unit}" for task, unit in summary.units.items() if task != MEAN)
    for of, other, xlabel, short in (
        ("rank", "fraction", "rank r", "rank"),
        ("fraction", "rank", "share of the training data", "data"),
    ):
        xs = sorted({getattr(setting, of) for setting in grid.settings})
        if len(xs) < 2 or not summary.units:
            continue
        panels: dict[str, dict[float, Setting]] = {}
        several = other in dimensions(grid)
        for setting in sorted(summary.columns, key=attrgetter(of)):
            title = task_name(setting.task) + (f", {FORMS[other](getattr(setting, other))}" if several else "")
            panels.setdefault(title, {})[getattr(setting, of)] = setting
        figure = training_curves(
            {
                title: {method: (list(points), _seeds(summary, method, points.values())) for method in grid.methods}
                for title, points in panels.items()
            },
            xlabel,
        )
        for ax in figure.axes:
            ax.set_xscale("log")
            ax.xaxis.set_minor_locator(NullLocator())
            ax.set_xticks(xs, [percent(x) if of == "fraction" else f"{x}" for x in xs])
        found.append(
            Section(
                title=f"Scores against {'the rank' if of == 'rank' else 'the amount of data'}",
                figure=figure,
                alt=f"Mean score against {xlabel}: {'; '.join(panels)}. The tables give the numbers.",
                caption=f"Mean and one standard deviation over seeds. {units}.",
                name=f"{name}-{short}",
            )
        )
    return found


def forest_figures(summary: Summary, name: str) -> list[Section]:
    """Return forest plots of the differences from the baseline, one per unit."""
    grid = summary.grid
    tested = summary.results[summary.results["paired"].notna()]
    units = [summary.units[task] for task in tested["task"]]
    tested = tested.assign(
        kind=["points" if unit.metric in (*SHARES, MEAN) else str(unit) for unit in units],
        group=[", ".join(heads(grid, row)) for row in tested.itertuples()],
        shown=tested["verdict"].isin(["better", "worse"]),
    )
    kinds = dict(list(tested.groupby("kind", sort=False)))
    return [
        Section(
            title=f"Differences with their intervals{f', {kind}' if len(kinds) > 1 else ''}",
            figure=_forest_plot(rows, grid.methods, f"difference from {grid.baseline}, {kind}"),
            alt=(
                f"Forest plot of {len(rows)} paired differences from {grid.baseline} with 95 % confidence intervals. "
                f"After correction a difference is shown for {rows['shown'].sum()} of them."
            ),
            caption=(
                "Mean paired difference and 95 % confidence interval (not corrected). Filled: p < 0.05 after Holm's "
                f"correction over {count_of(summary.tests, 'comparison')}; empty: no difference shown."
            ),
            name=f"{name}-differences{f'-{k}' if k else ''}",
        )
        for k, (kind, rows) in enumerate(kinds.items())
    ]


def training_figure(grid: Grid, name: str) -> Section | None:
    """Return how loss and updates develop, in the setting with most measurements; of equals that with most data."""
    cells = {setting: _runs(grid, setting) for setting in grid.settings}
    measured = {s: sum("looks" in run or "names" in run for run in chain(*c.values())) for s, c in cells.items()}
    setting = max(cells, key=lambda s: (measured[s], s.fraction, s.rank))
    panels = {}
    for title, key in CURVES.items():
        curves = {method: c for method, runs in cells[setting].items() if (c := _curve(runs, key)) is not None}
        if curves:
            panels[title] = curves
    if not panels or not measured[setting]:
        return None
    data = "all data" if setting.fraction == 1 else f"{percent(setting.fraction)} of the data"
    ends = [
        f"{title}: {', '.join(f'{method} {np.mean(y[:, -1]):.3g}' for method, (_, y) in curves.items())}"
        for title, curves in panels.items()
    ]
    return Section(
        title=f"Training on {task_name(setting.task)}",
        figure=training_curves(panels),
        alt=f"Curves by optimizer step. At the end: {'; '.join(ends)}.",
        caption=(
            f"{task_name(setting.task)}, r = {setting.rank}, {data}. Mean and one standard deviation over seeds. "
            "Cosine and drift compare the updates of one role at consecutive depths; drift is relative to the mean "
            "squared norm of an update. Dirichlet energy: of the features that leave the coordinator, relative to "
            "their squared norm; 0 where joined adapters have the same features (up to their degree)."
        ),
        name=f"{name}-training",
    )


def _seeds(summary: Summary, method: str, settings: Iterable[Setting]) -> NDArray:
    """Return the scores of a method (seeds, settings), NaN where there is none."""
    scores = (summary.at(method, setting)["scores"] for setting in settings)
    return np.array([[found.get(seed, math.nan) for seed in summary.grid.seeds] for found in scores]).T


def _forest_plot(rows: pd.DataFrame, methods: Sequence[str], xlabel: str) -> Figure:
    """Draw differences from a baseline with their intervals, one below the other; rows of a group stand together."""
    first = rows["group"] != rows["group"].shift()
    rows = rows.assign(at=np.arange(len(rows)) + first.cumsum())  # the name of a group takes a line
    names = dict(zip(rows["at"][first] - 1, rows["group"][first], strict=True))
    lines = {**names, **dict(zip(rows["at"], rows["method"], strict=True))}
    width, height = 7.4, 0.19 * len(lines) + 0.75
    figure = Figure(figsize=(width, height))
    left = (0.057 * max(map(len, lines.values())) + 0.2) / width  # a layout engine would draw everything twice
    figure.subplots_adjust(left=left, right=1 - 0.1 / width, bottom=0.5 / height, top=1 - 0.08 / height)
    ax = figure.subplots()
    style_axes(ax, spines=("bottom",))
    ax.axvline(0, color=MUTED, linewidth=1, zorder=1)
    ax.grid(axis="x", color=GRID, linewidth=0.7)
    ax.set_axisbelow(True)
    for (method, shown), d in rows.groupby(["method", "shown"], sort=False):
        k = methods.index(method)
        color = COLORS[k % len(COLORS)]
        ax.hlines(d["at"], d["low"], d["high"], color=color, linewidth=1.6, zorder=2)
        style: dict[str, Any] = {"marker": MARKERS[k % len(MARKERS)], "markersize": 5.5, "markeredgewidth": 1.4}
        style |= {"color": color, "markerfacecolor": color if shown else PAGE}
        ax.plot(d["difference"], d["at"], linestyle="", zorder=3, **style)
    between = [at - 0.5 for at in names]
    ax.hlines(between, 0, 1, transform=ax.get_yaxis_transform(), color=GRID, linewidth=0.7)
    ax.set_ylim(len(lines) - 0.5, -0.5)
    ax.set_yticks([*lines], [*lines.values()])
    for label, at in zip(ax.get_yticklabels(), lines, strict=True):
        label.set(fontweight="bold" if at in names else "normal", color=INK)
    ax.tick_params(axis="y", length=0)
    ax.margins(x=0.04)
    ax.set_xlabel(xlabel, fontsize=9, color=MUTED)
    return figure


def _runs(grid: Grid, setting: Setting) -> dict[str, Runs]:
    """Return what the finished runs of each method measured over their course, with ``seed`` and ``system``."""
    found: dict[str, Runs] = {}
    for method in grid.methods:
        runs = grid.done(method, setting)[["key", "seed", "system"]].to_dict("records")
        found[method] = [{**run, **grid.curves.get(run["key"], {})} for run in runs]
    return {method: runs for method, runs in found.items() if runs}


def _curve(runs: Runs, name: str) -> tuple[NDArray, NDArray] | None:
    """Return steps (points,) and values (seeds, points) where all runs have a finite value; None without any."""
    series: list[dict[int, float]] = []
    for run in runs:
        points = [(look["step"], look.get(name)) for look in run.get("looks") or []]
        if name == "dirichlet":  # a number per layer
            points = [(step, energies and energies[-1]) for step, energies in points]
        if name == "loss":
            points = list(zip(run.get("step", []), run.get("loss", []), strict=False))
        series.append({step: value for step, value in points if value is not None and math.isfinite(value)})
    series = [points for points in series if points]
    steps = sorted(set.intersection(*map(set, series))) if series else []
    if len(steps) < 2:
        return None
    return np.array(steps), np.array([[points[step] for step in steps] for points in series])
