"""The tables of a comparison: scores, paired differences, costs, structure, and one row a cell for all of them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from itertools import product

from structlora_pyg.study.report.cells import (
    Footnotes,
    constants,
    contrast_texts,
    decimals,
    difference_text,
    dimensions,
    heads,
    mean_text,
    p_text,
    percent,
    score_text,
    seeds_planned,
    times,
    validation_note,
)
from structlora_pyg.study.report.contrasts import MEAN, METRICS, SHARES, Summary, task_name
from structlora_pyg.study.report.measures import measured, on_gpu, pairs, step_ratio
from structlora_pyg.study.report.records import Grid, Setting
from structlora_pyg.study.report.sortable import Cell, SortableTable
from structlora_pyg.study.report.tables import NONE, Table

# What is shown of a run's structure: where it stands in its file, digits, factor.
STRUCTURE: dict[str, tuple[tuple[str, str], int, float]] = {
    "adjacent cosine": (("structure", "adjacent_cosine"), 3, 1.0),
    "relative drift": (("structure", "relative_drift"), 2, 1.0),
    "open gates, %": (("gates", "open"), 1, 100.0),
    "removal ~ gate": (("importance", "removal_gate"), 2, 1.0),
    "removal ~ norm": (("importance", "removal_norm"), 2, 1.0),
    "removal ~ first order": (("importance", "removal_first_order"), 2, 1.0),
    "gate ~ first order": (("importance", "gate_first_order"), 2, 1.0),
}
CONTRASTED = ("adjacent cosine", "relative drift")


def score_table(summary: Summary) -> Table:
    """Return mean ± standard deviation of every cell; bold is only what is shown to be better than the baseline."""
    grid, columns, notes = summary.grid, summary.columns, Footnotes()
    rows, strong = [], set()
    for i, method in enumerate(grid.methods):
        cells = [method]
        for j, column in enumerate(columns, start=1):
            score, contrast = summary.scores[method, column], summary.contrast(method, column)
            cells.append(score_text(score, summary.units.get(column.task)) + notes.mark(score.remarks))
            if contrast and contrast.verdict == "better":
                strong.add((i, j))
        rows.append(cells)
    units = [f"{task_name(task)}: {unit}" for task, unit in summary.units.items() if task != MEAN]
    said = [f"Mean ± standard deviation over {seeds_planned(grid)}.", constants(grid)]
    said.append(f"{'; '.join(units)}." if units else "")
    if summary.averaged:
        said.append(f"The mean is that of {', '.join(map(task_name, summary.averaged))}, seed by seed.")
    if grid.baseline is not None:
        said.append(f"Bold: better than {grid.baseline}, p < 0.05 after correction; see the differences.")
    headings = [heads(grid, column) for column in columns]
    return Table(
        title="Scores",
        columns=["", *map(", ".join, headings)],
        levels=list(zip([""] * len(headings[0]), *headings, strict=True)),
        rows=rows,
        strong=strong,
        footnotes=notes.texts,
        note=_sentences(*said, validation_note(grid)),
    )


def difference_table(summary: Summary) -> Table | None:
    """Return every method against the baseline, one row a comparison; None where there is nothing to compare."""
    grid, notes, strong = summary.grid, Footnotes(), set()
    # Where the baseline failed there is no difference; the table of scores says why.
    shown = [c for c in summary.contrasts if summary.scores[str(grid.baseline), c.setting].state != "failed"]
    if not shown:
        return None
    rows = []
    for i, c in enumerate(shown):
        scores = summary.scores[c.method, c.setting], summary.scores[str(grid.baseline), c.setting]
        remarks = [remark for score in scores for remark in score.remarks]
        rows.append([c.method, *heads(grid, c.setting), *contrast_texts(c), c.verdict + notes.mark(remarks)])
        if c.verdict == "better":
            strong.add((i, len(rows[-1]) - 1))
    least = f"{2 / 2 ** len(grid.seeds):.3g} for {len(grid.seeds)}"
    return Table(
        title=f"Differences from {grid.baseline}",
        columns=[
            "", *dimensions(grid), "seeds", "difference [95 % CI]", "p, t-test", "p, Wilcoxon", "p, Holm", "d_z",
            "verdict",
        ],
        rows=rows,
        strong=strong,
        footnotes=notes.texts,
        note=_sentences(
            "Paired differences on equal seeds, in the unit of the scores, with Student's t interval.",
            constants(grid),
            f"p, Holm: the paired t-test, corrected over the {summary.tests} comparisons of this table; the verdict is "
            f"better or worse only where it is below 0.05. Wilcoxon's signed-rank test cannot be below 2/2^n for n "
            f"seeds ({least}). d_z is Cohen's: the mean difference divided by the standard deviation of the "
            "differences.",
            validation_note(grid),
        ),
    )  # fmt: skip


def cost_table(grid: Grid) -> Table | None:
    """Return parameters, learning rates, step time and memory, a row a method, task and rank; None without a run."""
    rows, gpu = [], any(map(on_gpu, grid.all_done()))
    recorded = any(math.isfinite(run.value("peak_memory_bytes")) for run in grid.all_done())
    for (task, rank), method in product(dict.fromkeys((s.task, s.rank) for s in grid.settings), grid.methods):
        settings = [s for s in grid.settings if (s.task, s.rank) == (task, rank)]
        runs = [run for s in settings for run in grid.done(method, s).values()]
        if not runs:
            continue
        adapter, head, training_only, base = (
            statistics.median(run.value("parameters", kind) for run in runs)
            for kind in ("adapter", "heads", "training_only", "base")
        )
        memory = [m for run in runs if math.isfinite(m := run.value("peak_memory_bytes"))]
        row = [method, *heads(grid, settings[0], data=False)]
        row += [f"{n:,.0f}" if math.isfinite(n) else NONE for n in (adapter, head, training_only)]
        row.append(f"{100 * adapter / base:.2f}" if base > 0 else NONE)
        row += [_rates(grid, method, settings), times(step_ratio(grid, method, settings))]
        if gpu:
            row.append(decimals(1000 * statistics.median(r.value("seconds", "per_step_median") for r in runs), 1))
        if recorded:
            row.append(f"{max(memory) / 2**20:,.0f}" if memory else NONE)
        rows.append(row)
    if not rows:
        return None
    most = max((n for run in grid.all_done() if math.isfinite(n := run.value("processes"))), default=1)
    devices = "; ".join(dict.fromkeys(str(run.data.get("device", "an unknown device")) for run in grid.all_done()))
    return Table(
        title="Costs",
        columns=[
            "", *dimensions(grid, data=False), "adapter", "heads", "training only", "% of base", "learning rate",
            "step time", *(["ms a step"] if gpu else []), *(["peak memory, MiB"] if recorded else []),
        ],
        rows=rows,
        note=_sentences(
            "Numbers of parameters: trained in the adapter (and their share of the base model), trained in heads (in "
            "full fine-tuning, all), and those that exist in training only. The learning rate is the one chosen for "
            "the setting. Step time: median "
            f"over seeds of the ratio to {grid.baseline or 'the first method'} in the same setting. Measured on "
            f"{devices}.",
            f"A run used up to {most:.0f} processes." if most > 1 else "",
            "" if gpu else "Runs side by side on a loaded CPU make the ratio rough.",
            "" if recorded else "Peak memory: not measured on CPU.",
        ),
    )  # fmt: skip


def other_metrics_table(grid: Grid) -> Table | None:
    """Return the metrics that were recorded beside the primary one; None without any."""
    primary = {setting.task: run.metric for setting in grid.settings for run in grid.of_task(setting.task)}
    names = dict.fromkeys(n for run in grid.all_done() for n in run.data["metrics"] if n != run.metric)
    rows = []
    for setting, method in product(grid.settings, grid.methods):
        texts = []
        for name in names:
            factor, digits = (100.0, 1) if name in SHARES else (1.0, 3)
            found = measured(grid, method, setting, ("metrics", name), factor)
            texts.append(NONE if primary.get(setting.task) == name else mean_text(list(found.values()), digits))
        if set(texts) - {NONE}:
            rows.append([method, *heads(grid, setting), *texts])
    if not rows:
        return None
    return Table(
        title="Other metrics",
        columns=["", *dimensions(grid), *(METRICS.get(name, name) for name in names)],
        rows=rows,
        note=_sentences(
            f"Mean ± standard deviation over {seeds_planned(grid)}; no test is made of them.",
            constants(grid),
            "Loss: that of the evaluation." if "loss" in names else "",
            validation_note(grid),
        ),
    )


def structure_table(grid: Grid) -> Table | None:
    """Return the structure of the updates, gates and importance of directions; None if nothing was measured."""
    found = {
        name: {(m, s): measured(grid, m, s, path, factor) for m in grid.methods for s in grid.settings}
        for name, (path, _, factor) in STRUCTURE.items()
    }
    shown = [name for name in STRUCTURE if any(found[name].values())]
    if not shown:
        return None
    contrasted = [name for name in CONTRASTED if name in shown and grid.baseline is not None]
    rows = []
    for setting, method in product(grid.settings, grid.methods):
        if not any(found[name][method, setting] for name in shown):
            continue
        row = [method, *heads(grid, setting)]
        for name in shown:
            values, digits = found[name][method, setting], STRUCTURE[name][1]
            row.append(mean_text(list(values.values()), digits))
            if name in contrasted:
                both = pairs(values, found[name][str(grid.baseline), setting])
                row.append("" if method == grid.baseline else difference_text(*both, digits=digits))
        rows.append(row)
    return Table(
        title="Structure of the updates",
        columns=[
            "",
            *dimensions(grid),
            *(c for name in shown for c in ([name, "difference [95 % CI]"] if name in contrasted else [name])),
        ],
        rows=rows,
        note=_sentences(
            f"Mean ± standard deviation over {seeds_planned(grid)}.",
            constants(grid),
            "Adjacent cosine: mean cosine of the updates of one role at consecutive depths. Relative drift: squared "
            "distance of the same pairs, divided by the mean squared norm of an update. The columns with ~ are "
            "Spearman correlations over the rank-one directions: removal is the measured increase of the loss when a "
            "direction is removed, first order its first-order estimate; they are measured at the first seed alone."
            if any("~" in name for name in shown)
            else "Adjacent cosine: mean cosine of the updates of one role at consecutive depths. Relative drift: "
            "squared distance of the same pairs, divided by the mean squared norm of an update.",
            f"Differences are from {grid.baseline} on equal seeds; they describe, and are not tested."
            if contrasted
            else "",
        ),
    )


def long_table(summaries: Sequence[Summary]) -> SortableTable:
    """Return all cells of all grids, one a row, to sort and to filter."""
    several = ["comparison"] if len(summaries) > 1 else []
    return SortableTable(
        title="All results",
        columns=[
            "method", *several, "task", "rank", "data", "seeds", "mean", "sd", "difference", "95 % CI", "p, Holm",
            "d_z", "adapter parameters", "learning rate", "step time",
        ],
        rows=[
            _long_row(summary, method, column, several=bool(several))
            for summary in summaries
            for column, method in product(summary.columns, summary.grid.methods)
            if summary.scores[method, column].state != "not planned"
        ],
        filters=[*several, "method", "task", "rank", "data"],
        note=(
            "One row a cell of the tables above, in their units. Differences, p-values (corrected within each "
            "comparison) and step times are relative to the baseline of the comparison."
        ),
    )  # fmt: skip


def _long_row(summary: Summary, method: str, column: Setting, several: bool) -> list[Cell]:
    grid, score, c = summary.grid, summary.scores[method, column], summary.contrast(method, column)
    paired, p, effect = (c.paired, c.p, c.effect) if c else (None, math.nan, math.nan)
    runs = list(grid.done(method, column).values())
    adapter = statistics.median(run.value("parameters", "adapter") for run in runs) if runs else math.nan
    rates = sorted({float(run.data["lr"]) for run in runs})
    ratio, difference = step_ratio(grid, method, [column]), paired.difference if paired else math.nan
    state = NONE if score.state == "failed" else score.state
    return [
        method,
        *([grid.title] if several else []),
        task_name(column.task),
        (str(column.rank), column.rank),
        (percent(column.fraction), column.fraction),
        (str(len(score.values)), len(score.values)),
        (f"{score.mean:.2f}" if score.values else state, score.mean),
        (decimals(score.sd, 2), score.sd),
        (decimals(difference, 2, "+"), difference),
        f"[{paired.low:+.2f}, {paired.high:+.2f}]" if paired else NONE,
        (p_text(p), p),
        (decimals(effect, 2, "+"), effect),
        (f"{adapter:,.0f}" if math.isfinite(adapter) else NONE, adapter),
        (", ".join(f"{rate:g}" for rate in rates) or NONE, rates[0] if rates else math.nan),
        (times(ratio), ratio),
    ]


def _rates(grid: Grid, method: str, settings: Sequence[Setting]) -> str:
    """Return the learning rates of a method, by share of the data where they differ."""
    rates = {s: sorted({float(run.data["lr"]) for run in grid.done(method, s).values()}) for s in settings}
    texts = {s: " / ".join(f"{rate:g}" for rate in found) for s, found in rates.items() if found}
    if len(set(texts.values())) == 1:
        return next(iter(texts.values()))
    return ", ".join(f"{text} ({percent(s.fraction)})" for s, text in texts.items())


def _sentences(*texts: str) -> str:
    return " ".join(text for text in texts if text)
