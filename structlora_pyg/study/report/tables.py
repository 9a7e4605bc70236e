"""The tables of a comparison: scores, paired differences, costs, structure."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import pandas as pd

from structlora_pyg.study.report.page import Notes, Section, count_of, percent, text_table
from structlora_pyg.study.report.records import Grid, Setting
from structlora_pyg.study.report.summary import (
    FORMS,
    MEAN,
    METRICS,
    SHARES,
    Summary,
    did_the_same,
    dimensions,
    heads,
    mean_sd,
    pairs,
    task_name,
)

STRUCTURE = {  # what is shown of a run's structure: its column, digits, factor
    "adjacent cosine": ("structure.adjacent_cosine", 3, 1.0),
    "relative drift": ("structure.relative_drift", 2, 1.0),
    "noise level": ("gates.noise_level", 2, 1.0),
    "filter moves, %": ("gates.filter_moves", 2, 100.0),
    "coordinator moves, %": ("gates.coordinator_moves", 2, 100.0),
    "open gates, %": ("gates.open", 1, 100.0),
    "removal ~ gate": ("importance.removal_gate", 2, 1.0),
    "removal ~ level": ("importance.removal_level", 2, 1.0),
    "removal ~ norm": ("importance.removal_norm", 2, 1.0),
    "removal ~ first order": ("importance.removal_first_order", 2, 1.0),
    "gate ~ first order": ("importance.gate_first_order", 2, 1.0),
}
VALIDATION = (
    "Every score was measured on a part cut from the training data, to choose settings: this is no result on the test "
    "data."
)
NONE = "\u2013"  # an empty cell


def score_table(summary: Summary) -> Section:
    """Return mean ± standard deviation of every cell; bold is only what is shown to be better than the baseline."""
    grid, columns, notes = summary.grid, summary.columns, Notes()
    rows, bold = [], set()
    for i, method in enumerate(grid.methods):
        rows.append([method])
        for j, column in enumerate(columns, start=1):
            r, unit = summary.at(method, column), summary.units.get(column.task)
            none = {"not run yet": "not run yet", "failed": NONE}.get(r["state"], "")
            text = mean_text(r["scores"].values(), unit.digits) if unit and r["scores"] else none
            rows[-1].append(text + notes.mark(r["remarks"]))
            if r["verdict"] == "better":
                bold.add((i, j))
    units = [f"{task_name(task)}: {unit}" for task, unit in summary.units.items() if task != MEAN]
    headings = [heads(grid, column) for column in columns]
    levels = list(zip([""] * len(headings[0]), *headings, strict=True))
    return text_table(
        "Scores",
        pd.DataFrame(rows, columns=pd.MultiIndex.from_arrays(levels) if len(levels) > 1 else levels[0]),
        f"Mean ± standard deviation over {_seeds(grid)}.",
        _constants(grid),
        f"{'; '.join(units)}." if units else "",
        f"The mean is that of {', '.join(map(task_name, summary.averaged))}, seed by seed." if summary.averaged else "",
        f"Bold: better than {grid.baseline}, p < 0.05 after correction; see the differences." if grid.baseline else "",
        _same_rows(summary),
        VALIDATION * grid.validation,
        bold=bold,
        notes=notes,
    )


def difference_table(summary: Summary) -> Section | None:
    """Return every method against the baseline, one row per comparison; None where there is nothing to compare."""
    grid, notes, results = summary.grid, Notes(), summary.results
    base = results[(results["method"] == grid.baseline) & (results["state"] != "failed")]
    # Where the baseline failed there is no difference; the table of scores says why.
    shown = results[results["verdict"] != ""].merge(base[[*Setting._fields]])
    if shown.empty:
        return None
    frame = _placed(grid, shown).assign(
        **{
            "seeds": shown["shared"].map(str),
            "difference [95 % CI]": [f"{c.difference:+.2f} [{c.low:+.2f}, {c.high:+.2f}]" if c else NONE
                                     for c in shown["paired"]],
            "p, t-test": shown["p_t"].map(p_text),
            "p, Holm": shown["p"].map(p_text),
            "d_z": shown["effect"].map(number("{:+.2f}")),
            "verdict": [v + notes.mark(r) for v, r in zip(shown["verdict"], shown["unsure"], strict=True)],
        }
    )  # fmt: skip
    return text_table(
        f"Differences from {grid.baseline}",
        frame,
        "Paired differences on equal seeds, in the unit of the scores, with Student's t interval.",
        _constants(grid),
        f"p, Holm: the paired t-test, corrected over {count_of(summary.tests, 'comparison')}; the verdict is "
        "better or worse only where it is below 0.05. d_z is Cohen's: the mean difference divided by the standard "
        "deviation of the differences.",
        VALIDATION * grid.validation,
        bold={(i, len(frame.columns) - 1) for i in shown.index[shown["verdict"] == "better"]},
        notes=notes,
    )


def cost_table(grid: Grid) -> Section | None:
    """Return parameters, learning rates, step time and memory per method, task and rank; None without a run."""
    runs = grid.done()
    if runs.empty:
        return None
    groups = runs.groupby(["task", "rank", "method"], sort=False)
    found = groups.median(numeric_only=True).reset_index()
    places = found[["task", "rank"]].itertuples(index=False, name=None)
    settings = [[s for s in grid.settings if (s.task, s.rank) == key] for key in places]
    gpu, recorded = not on_cpu(runs).all(), runs["peak_memory_bytes"].notna().any()
    base, memory = found["parameters.base"], groups["peak_memory_bytes"].max().reset_index(drop=True)
    times = [step_ratio(grid, *of) for of in zip(found["method"], settings, strict=True)]
    columns = {
        "adapter": (found["parameters.adapter"], number("{:,.0f}")),
        "heads": (found["parameters.heads"], number("{:,.0f}")),
        "training only": (found["parameters.training_only"], number("{:,.0f}")),
        "% of base": (100 * found["parameters.adapter"] / base, number("{:.2f}")),
        "learning rate": (groups[["lr", "fraction"]].apply(_rates).reset_index(drop=True), str),
        "step time": (pd.Series(times), number("{:.2f} x")),
        **({"ms per step": (1000 * found["seconds.per_step_median"], number("{:.1f}"))} if gpu else {}),
        **({"peak memory, MiB": (memory / 2**20, number("{:,.0f}"))} if recorded else {}),
    }
    most = runs["processes"].max()
    return text_table(
        "Costs",
        _placed(grid, found, data=False).assign(**{name: values.map(form) for name, (values, form) in columns.items()}),
        "Numbers of parameters: trained in the adapter (and their share of the base model), trained in heads (in full "
        "fine-tuning, all), and those that exist in training only. The learning rate is the one chosen for the "
        f"setting. Step time: median over seeds of the ratio to {grid.baseline or 'the first method'} in the same "
        f"setting. Measured on {'; '.join(runs['device'].unique())}.",
        f"A run used up to {most:.0f} processes." if most > 1 else "",
        "" if gpu else "Runs side by side on a loaded CPU make the ratio rough.",
        "" if recorded else "Peak memory: not measured on CPU.",
    )


def other_metrics_table(grid: Grid) -> Section | None:
    """Return the metrics that were recorded beside the primary one; None without any."""
    runs, columns = grid.done(), {}
    names = [column.partition(".")[2] for column in runs if column.startswith("metrics.")]
    for name in sorted(names, key=[*METRICS, *names].index):
        factor, digits = (100.0, 1) if name in SHARES else (1.0, 3)
        columns[METRICS.get(name, name)] = factor * runs[f"metrics.{name}"].where(runs["metric"] != name), digits
    no_test = f"Mean ± standard deviation over {_seeds(grid)}; no test is made of them."
    of_loss = "Loss: that of the evaluation." if "loss" in columns else ""
    return _means(grid, "Other metrics", columns, no_test, of_loss, VALIDATION * grid.validation)


def structure_table(grid: Grid) -> Section | None:
    """Return the structure of the updates, gates and importance of directions; None if nothing was measured."""
    runs = grid.done()
    columns = {name: (factor * runs[c], digits) for name, (c, digits, factor) in STRUCTURE.items() if c in runs}
    return _means(
        grid,
        "Structure of the updates",
        columns,
        f"Mean ± standard deviation over {_seeds(grid)}; they describe, and are not tested.",
        "Adjacent cosine: mean cosine of the updates of one role at consecutive depths. Relative drift: squared "
        "distance of the same pairs, divided by the mean squared norm of an update. Filter and coordinator move an "
        "update by a share of its norm, in the mean over adapters. Columns with ~ are Spearman correlations over the "
        "rank-one directions: removal is the measured increase of the loss when a direction is removed, first order "
        "its first-order estimate; they are measured at the first seed alone.",
    )


def step_ratio(grid: Grid, method: str, settings: Sequence[Setting]) -> float:
    """Return the median over seeds and settings of a method's step time divided by the baseline's; NaN without any."""
    ratios: list[float] = []
    for setting in settings:
        times = [grid.done(m, setting)["seconds.per_step_median"] for m in (method, grid.baseline or grid.methods[0])]
        ratios += [a / b for a, b in zip(*pairs(*times), strict=True) if b > 0 and math.isfinite(a)]
    return float(np.median(ratios)) if ratios else math.nan


def on_cpu(runs: pd.DataFrame) -> pd.Series:
    """Return which runs were made without an accelerator; their seconds mean little to others."""
    return runs["device"].fillna("cpu").astype(str).str.lower().str.startswith("cpu")


def number(form: str) -> Callable[[float], str]:
    """Return a function that writes a number in a form such as ``{:+.2f}``, and NaN as a dash."""
    return lambda value: form.format(value) if math.isfinite(value) else NONE


def p_text(p: float) -> str:
    """Return a p-value with three digits, or a dash where there is none."""
    return NONE if math.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


def mean_text(values: Iterable[float], digits: int) -> str:
    """Return ``71.2 ± 0.4`` for finite values, the mean alone for a single one, a dash for none."""
    if not (values := list(values)):
        return NONE
    mean, sd = mean_sd(values)
    return f"{mean:.{digits}f} ± {sd:.{digits}f}" if len(values) > 1 else f"{mean:.{digits}f}"


def _placed(grid: Grid, frame: pd.DataFrame, data: bool = True) -> pd.DataFrame:
    """Return the first columns of a table with one row per method and setting: the method, and what varies."""
    columns = {"": frame["method"].astype(str)}
    for name in dimensions(grid):
        if data or name != "fraction":
            columns["data" if name == "fraction" else name] = frame[name].map(FORMS[name])
    return pd.DataFrame(columns)


def _means(
    grid: Grid, title: str, columns: Mapping[str, tuple[pd.Series, int]], about: str, *sentences: str
) -> Section | None:
    """Return mean ± standard deviation of some values of the runs, one row per setting and method that has any."""
    runs, place = grid.done(), ["method", *Setting._fields]
    values = pd.DataFrame({name: found.where(np.isfinite(found)).to_numpy() for name, (found, _) in columns.items()})
    values = values.dropna(axis="columns", how="all")
    if values.empty:
        return None
    groups = dict(list(values.groupby([runs[name].to_numpy() for name in place])))
    some = {at for at, group in groups.items() if group.notna().any(axis=None)}
    order = [at for setting in grid.settings for method in grid.methods if (at := (method, *setting)) in some]
    frame = _placed(grid, pd.DataFrame(order, columns=place))
    for name in values:
        frame[name] = [mean_text(groups[at][name].dropna(), columns[name][1]) for at in order]
    return text_table(title, frame, about, _constants(grid), *sentences)


def _rates(runs: pd.DataFrame) -> str:
    """Return the learning rates of some runs, by share of the data where they differ."""
    rates = {
        percent(fraction): " / ".join(f"{rate:g}" for rate in sorted(group["lr"].unique()))
        for fraction, group in runs.groupby("fraction")
    }
    if len(set(rates.values())) == 1:
        return next(iter(rates.values()))
    return ", ".join(f"{text} ({share})" for share, text in rates.items())


def _same_rows(summary: Summary) -> str:
    """Return which rows did the same thing, column by column."""
    found = []
    for column in summary.columns:
        groups: list[tuple[dict[int, float], list[str]]] = []
        for method in summary.grid.methods:
            scores = summary.at(method, column)["scores"]
            alike = [g for g in groups if g[0].keys() == scores.keys() and did_the_same(*pairs(g[0], scores))]
            if not alike:
                groups.append((scores, []))
            (alike or groups[-1:])[0][1].append(method)
        found += [f"{' '.join(heads(summary.grid, column))}: {', '.join(rows)}" for _, rows in groups if len(rows) > 1]
    return f"These rows did the same thing, all their scores agree to rounding: {'; '.join(found)}." if found else ""


def _seeds(grid: Grid) -> str:
    """Return ``5 seeds (0, 1, 2, 3, 4)``."""
    return f"{count_of(len(grid.seeds), 'seed')} ({', '.join(map(str, sorted(grid.seeds)))})"


def _constants(grid: Grid) -> str:
    """Return a sentence of what the headings leave out, as it is the same in every column."""
    first = grid.settings[0]
    texts = {
        "task": task_name(first.task),
        "rank": f"rank {first.rank}",
        "fraction": "all training data" if first.fraction == 1 else f"{percent(first.fraction)} of the training data",
    }
    found = [text for name, text in texts.items() if name not in dimensions(grid)]
    return f"All columns: {', '.join(found)}." if found else ""
