"""Scores of a grid, averaged over seeds, and every method against the baseline on equal seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import stats

from structlora_pyg.study.report.measures import pairs
from structlora_pyg.study.report.records import Grid, RecordError, Run, Setting
from structlora_pyg.study.stats import Paired, compare, holm, judge, mean_sd

MEAN = "mean"  # the column of the mean over tasks, as a task
# Recorded between 0 and 1, printed between 0 and 100.
SHARES = {"accuracy", "accuracy_mismatched", "top5", "f1", "matthews", "pearson", "spearman", "vqa_accuracy"}
METRICS = {
    "accuracy": "accuracy, %",
    "accuracy_mismatched": "accuracy on mismatched genres, %",
    "top5": "top-5 accuracy, %",
    "f1": "F1, %",
    "matthews": "Matthews correlation x 100",
    "pearson": "Pearson correlation x 100",
    "spearman": "Spearman correlation x 100",
    "cider": "CIDEr",
    "vqa_accuracy": "VQA accuracy, %",
    "perplexity": "perplexity",
}
TASKS = {
    "stsb": "STS-B", "cola": "CoLA", "mrpc": "MRPC", "rte": "RTE", "wnli": "WNLI", "boolq": "BoolQ", "piqa": "PIQA",
    "cifar100": "CIFAR-100", "mnli": "MNLI", "sst2": "SST-2", "qnli": "QNLI", "qqp": "QQP",
    "imagenet": "ImageNet", "coco": "COCO captions", "vqav2": "VQAv2",
    "image_folder": "image folder", "captions": "captions", "vqa": "VQA", "text": "text",
}  # fmt: skip


class Unit(NamedTuple):
    """How the scores of a task are printed.

    Attributes:
        metric: Name of the metric.
        factor: What the recorded score is multiplied by: 100 for one between 0 and 1.
        higher: Whether a higher score is better.
    """

    metric: str
    factor: float
    higher: bool

    @property
    def digits(self) -> int:
        """Digits behind the point of a mean."""
        return 2 if self.metric not in (*SHARES, "cider", MEAN) else 1

    def __str__(self) -> str:
        name = METRICS.get(self.metric, self.metric)
        return name if self.higher else f"{name} (lower is better)"


@dataclass(frozen=True, kw_only=True)
class Score:
    """A method in a setting.

    Attributes:
        values: Finite scores by seed, in the printed unit.
        mean: Their mean; NaN without any.
        sd: Their sample standard deviation; NaN for fewer than two.
        planned: How many seeds were planned.
        remarks: Why there are fewer than that.
        state: ``done`` if there is any value, else ``failed``, ``not run yet`` or ``not planned``.
    """

    values: Mapping[int, float]
    mean: float
    sd: float
    planned: int
    remarks: Sequence[str]
    state: str


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """A method against the baseline in a setting.

    Attributes:
        method: Label of the method.
        setting: The setting.
        n: Number of seeds that both have.
        paired: Difference, interval and tests; None for fewer than two seeds.
        p: Paired t-test, corrected after Holm over all comparisons of the grid; NaN without a test.
        effect: Cohen's d_z.
        verdict: ``better``, ``worse``, ``no difference shown``, or why nothing can be said.
    """

    method: str
    setting: Setting
    n: int
    paired: Paired | None
    p: float
    effect: float
    verdict: str


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The numbers of a grid.

    Attributes:
        grid: The grid.
        columns: Its settings, then those of the mean over tasks.
        units: ``{task: unit}`` of the tasks with a finished run, and of the mean.
        averaged: Tasks in the mean; empty if there is none.
        scores: ``{(method, column): score}``.
        contrasts: Comparisons with the baseline, method by method within a column.
        tests: How many comparisons the correction counts.
    """

    grid: Grid
    columns: Sequence[Setting]
    units: Mapping[str, Unit]
    averaged: Sequence[str]
    scores: Mapping[tuple[str, Setting], Score]
    contrasts: Sequence[Contrast]
    tests: int

    def contrast(self, method: str, setting: Setting) -> Contrast | None:
        """Return the comparison of a method in a setting, or None for the baseline or without one."""
        return next((c for c in self.contrasts if (c.method, c.setting) == (method, setting)), None)


def summarize(grid: Grid) -> Summary:
    """Return the scores of a grid and its comparisons.

    Raises:
        RecordError: A score that is meant to be a fraction and is none.
    """
    units = _units(grid)
    scores = {(m, s): _score(grid, m, s, units) for m in grid.methods for s in grid.settings}
    averaged = [task for task in units if units[task].metric in SHARES]
    means: list[Setting] = []
    if len(averaged) >= 2:
        units[MEAN] = Unit(MEAN, 1.0, True)
        others = dict.fromkeys((s.rank, s.fraction) for s in grid.settings)
        means = [
            Setting(MEAN, *other) for other in others if all(Setting(t, *other) in grid.settings for t in averaged)
        ]
        for method in grid.methods:
            for setting in means:
                scores[method, setting] = _mean_score(scores, method, setting, averaged)
    columns = [*grid.settings, *means]
    contrasts = _contrasts(grid, columns, scores, units)
    return Summary(
        grid=grid,
        columns=columns,
        units=units,
        averaged=averaged if means else [],
        scores=scores,
        contrasts=contrasts,
        tests=sum(c.verdict != "failed" for c in contrasts),
    )


def effect_size(paired: Paired) -> float:
    """Return Cohen's d_z: the mean difference divided by the standard deviation of the differences.

    It equals t / sqrt(n) of the paired t-test. NaN if all differences are equal, 0 if they are 0.
    """
    if paired.difference == 0:
        return 0.0
    error = (paired.high - paired.low) / 2 / float(stats.t.ppf(0.5 + paired.confidence / 2, paired.n - 1))
    return paired.difference / error / math.sqrt(paired.n) if error > 0 and not math.isnan(paired.p_t) else math.nan


def task_name(task: str) -> str:
    """Return a task as its authors write it: ``STS-B`` for ``stsb``."""
    return TASKS.get(task, task)


def seeds_text(seeds: Sequence[int]) -> str:
    """Return ``seed 3`` or ``seeds 0, 1, 2``."""
    return f"seed{'s' if len(seeds) != 1 else ''} {', '.join(map(str, sorted(seeds)))}"


def _units(grid: Grid) -> dict[str, Unit]:
    tasks = dict.fromkeys(setting.task for setting in grid.settings)
    return {task: _unit(grid, runs) for task in tasks if (runs := grid.of_task(task))}


def _unit(grid: Grid, runs: Sequence[Run]) -> Unit:
    metric, higher = runs[0].metric, bool(runs[0].data["higher_is_better"])
    finite = {run.key: abs(run.score) for run in runs if math.isfinite(run.score)}
    largest = max(finite, key=finite.__getitem__, default="")
    if metric in SHARES and finite and finite[largest] > 1.0:
        raise RecordError(
            f"{grid.folder / 'runs' / largest}.json has {metric} {finite[largest]:g}, which is at most 1; delete the "
            "file and start the same `structlora compare` again"
        )
    return Unit(metric, 100.0 if metric in SHARES else 1.0, higher)


def _score(grid: Grid, method: str, setting: Setting, units: Mapping[str, Unit]) -> Score:
    done, failed, missing = grid.done(method, setting), grid.failed(method, setting), grid.missing(method, setting)
    planned = len(grid.planned.get((method, setting), []))
    values = {seed: run.score * units[setting.task].factor for seed, run in sorted(done.items())}
    lost = [seed for seed, value in values.items() if not math.isfinite(value)]
    values = {seed: value for seed, value in values.items() if math.isfinite(value)}
    remarks = []
    for reason in dict.fromkeys(failed.values()):
        seeds = [seed for seed, why in failed.items() if why == reason]
        remarks.append(reason if len(seeds) == planned else f"{seeds_text(seeds)}: {reason}")
    if lost:
        remarks.append(f"{seeds_text(lost)}: the score is not finite, the training diverged")
    if missing:
        there = f": {', '.join(map(str, values))}" if values else ""
        remarks.append(f"not run yet ({len(values)} of {planned} seeds{there})")
    state = "done" if values else "not run yet" if missing else "failed" if planned else "not planned"
    return _scored(values, planned, remarks, state)


def _mean_score(
    scores: Mapping[tuple[str, Setting], Score], method: str, setting: Setting, tasks: Sequence[str]
) -> Score:
    """Return the mean over tasks, seed by seed, of the seeds that have all of them."""
    parts = {task: scores[method, setting._replace(task=task)] for task in tasks}
    planned = min(part.planned for part in parts.values())
    seeds = sorted(set.intersection(*(set(part.values) for part in parts.values())))
    values = {seed: float(np.mean([part.values[seed] for part in parts.values()])) for seed in seeds}
    remarks = []
    if 0 < len(values) < planned:
        remarks.append(
            f"mean over the {len(values)} of {planned} seeds that have all tasks: {', '.join(map(str, seeds))}"
        )
    lacking = [task_name(task) for task, part in parts.items() if not part.values]
    if not values and planned:
        remarks.append(f"no mean without {', '.join(lacking)}" if lacking else "no mean: no seed has all tasks yet")
    states = {part.state for part in parts.values()}
    state = next((s for s in ("not planned", "failed", "not run yet") if s in states), "not run yet")
    return _scored(values, planned, remarks, "done" if values else state)


def _scored(values: Mapping[int, float], planned: int, remarks: Sequence[str], state: str) -> Score:
    mean, sd = mean_sd(list(values.values())) if values else (math.nan, math.nan)
    return Score(values=values, mean=mean, sd=sd, planned=planned, remarks=remarks, state=state)


def _contrasts(
    grid: Grid,
    columns: Sequence[Setting],
    scores: Mapping[tuple[str, Setting], Score],
    units: Mapping[str, Unit],
) -> list[Contrast]:
    """Compare every method with the baseline where both are planned, then correct all p-values together."""
    if grid.baseline is None:
        return []
    found: list[tuple[str, Setting, int, Paired | None, str]] = []
    for setting in columns:
        base = scores[grid.baseline, setting]
        for method in grid.methods:
            score = scores[method, setting]
            if method == grid.baseline or "not planned" in (score.state, base.state):
                continue
            values = pairs(score.values, base.values)
            n = len(values[0])
            missing = "failed" if "failed" in (score.state, base.state) else "not run yet"
            why = "" if n > 1 else "one seed: no test" if n else missing
            found.append((method, setting, n, compare(*values) if n > 1 else None, why))
    # Comparisons that are still to come count, so that a p-value does not grow when they arrive.
    counted = [i for i, (*_, why) in enumerate(found) if why != "failed"]
    adjusted = dict(zip(counted, holm([_p(found[i][3]) for i in counted]), strict=True))
    return [
        Contrast(
            method=method,
            setting=setting,
            n=n,
            paired=paired,
            p=adjusted.get(i, math.nan),
            effect=effect_size(paired) if paired else math.nan,
            verdict=judge(paired, adjusted[i], units[setting.task].higher) if paired else why,
        )
        for i, (method, setting, n, paired, why) in enumerate(found)
    ]


def _p(paired: Paired | None) -> float:
    return paired.p_t if paired else math.nan
