"""The numbers of a table: scores per cell, every method against the baseline on the same seeds, and what they show."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from structlora_pyg.study.report.page import percent
from structlora_pyg.study.report.records import PLACE, Grid, Setting

MEAN = "mean"  # the mean over tasks, as a task
METRICS = {  # those in % or x 100 are recorded between 0 and 1
    "accuracy": "accuracy, %",
    "accuracy_mismatched": "accuracy on mismatched genres, %",
    "top5": "top-5 accuracy, %",
    "f1": "F1, %",
    "matthews": "Matthews correlation x 100",
    "pearson": "Pearson correlation x 100",
    "spearman": "Spearman correlation x 100",
    "vqa_accuracy": "VQA accuracy, %",
    "cider": "CIDEr",
}
SHARES = {name for name, text in METRICS.items() if text.endswith(("%", "100"))}
TASKS = {
    "stsb": "STS-B", "cola": "CoLA", "mrpc": "MRPC", "rte": "RTE", "wnli": "WNLI", "boolq": "BoolQ", "piqa": "PIQA",
    "cifar100": "CIFAR-100", "mnli": "MNLI", "sst2": "SST-2", "qnli": "QNLI", "qqp": "QQP",
    "imagenet": "ImageNet", "coco": "COCO captions", "vqav2": "VQAv2", "image_folder": "image folder", "vqa": "VQA",
}  # fmt: skip
TESTED = ("difference", "low", "high", "p_t", "effect")


class Unit(NamedTuple):
    """How the scores of a task are printed."""

    metric: str  # its name
    higher: bool  # whether a higher score is better

    @property
    def factor(self) -> float:
        """What a recorded score is multiplied by: 100 for one between 0 and 1."""
        return 100.0 if self.metric in SHARES else 1.0

    @property
    def digits(self) -> int:
        """Digits behind the point of a mean."""
        return 1 if self.metric in (*SHARES, "cider", MEAN) else 2

    def __str__(self) -> str:
        name = METRICS.get(self.metric, self.metric)
        return name if self.higher else f"{name} (lower is better)"


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The numbers of a grid.

    Attributes:
        grid: The grid.
        units: ``{task: unit}`` of the tasks with a finished run, and of the mean.
        averaged: Tasks in the mean; empty if there is none.
        results: One row per method in a setting (``method``, ``task``, ``rank``, ``fraction``), setting by setting:
            ``scores`` (finite ones by seed, in the printed unit), their ``mean`` and ``sd``, ``planned`` seeds,
            ``state`` (``done`` if there is any score, else ``failed``, ``not run yet`` or ``not planned``),
            ``remarks`` on missing scores; then against the baseline: ``shared`` seeds, the
            `Paired` comparison as ``paired`` and its numbers, ``p`` corrected after Holm
            over all comparisons of the grid, ``verdict`` (empty where nothing is compared), and ``unsure``, the
            remarks on both.
        tests: How many comparisons the correction counts.
    """

    grid: Grid
    units: Mapping[str, Unit]
    averaged: Sequence[str]
    results: pd.DataFrame = field(repr=False)
    tests: int

    @property
    def columns(self) -> list[Setting]:
        """The settings of the grid, then those of the mean over tasks."""
        places = self.results[list(Setting._fields)].itertuples(index=False, name=None)
        return [Setting(*place) for place in dict.fromkeys(places)]

    def at(self, method: str, setting: Setting) -> pd.Series:
        """Return the row of a method in a setting."""
        return self.results.loc[self._rows[(method, *setting)]]

    @cached_property
    def _rows(self) -> dict[tuple, Any]:
        places = self.results[["method", *Setting._fields]].itertuples(name=None)
        return {tuple(place): row for row, *place in places}


def summarize(grid: Grid) -> Summary:
    """Return the scores of a grid and its comparisons."""
    first = grid.done().drop_duplicates("task").set_index("task")[["metric", "higher_is_better"]]
    units = {
        task: Unit(*first.loc[task]) for task in dict.fromkeys(s.task for s in grid.settings) if task in first.index
    }
    planned: dict[tuple, list[dict[str, Any]]] = {}
    for cell in grid.cells[[*PLACE, "state", "reason", "score"]].to_dict("records"):
        planned.setdefault((cell["method"], Setting(cell["task"], cell["rank"], cell["fraction"])), []).append(cell)
    found = {
        (method, setting): _scores(planned.get((method, setting), []), units.get(setting.task))
        for setting in grid.settings
        for method in grid.methods
    }
    averaged = [task for task, unit in units.items() if unit.metric in SHARES]
    means: list[Setting] = []
    if len(averaged) > 1:
        units[MEAN] = Unit(MEAN, True)
        others = dict.fromkeys((s.rank, s.fraction) for s in grid.settings)
        means = [Setting(MEAN, *o) for o in others if all(Setting(task, *o) in grid.settings for task in averaged)]
    for setting in means:
        for method in grid.methods:
            parts = {task: found[method, setting._replace(task=task)] for task in averaged}
            found[method, setting] = _mean_scores(parts)
    rows = []
    for (method, setting), row in found.items():
        mean, sd = mean_sd([*row["scores"].values()]) if row["scores"] else (math.nan, math.nan)
        base = None if grid.baseline in (None, method) else found[str(grid.baseline), setting]
        against = _against(row, base)
        tested = {name: getattr(against["paired"], name, math.nan) for name in TESTED}
        place = {"method": method, **setting._asdict(), "mean": mean, "sd": sd, "p": math.nan}
        rows.append({**place, **row, **tested, **against})
    results = pd.DataFrame(rows)
    # Comparisons that are still to come count, so that a p-value does not grow when they arrive.
    counted = ~results["verdict"].isin(["", "failed"])
    results.loc[counted, "p"] = holm(results.loc[counted, "p_t"].tolist())
    for i in results.index[results["verdict"] == "to be judged"]:
        higher = units[str(results.at[i, "task"])].higher
        results.at[i, "verdict"] = judge(results.at[i, "paired"], results.at[i, "p"], higher)
    return Summary(
        grid=grid, units=units, averaged=averaged if means else [], results=results, tests=int(counted.sum())
    )


def task_name(task: str) -> str:
    """Return a task as its authors write it: ``STS-B`` for ``stsb``."""
    return TASKS.get(task, task)


FORMS: dict[str, Callable[[Any], str]] = {"task": task_name, "rank": "r = {}".format, "fraction": percent}


def dimensions(grid: Grid) -> list[str]:
    """Return which of task, rank and fraction vary in a grid; the task if none does."""
    return [name for name in FORMS if len({getattr(s, name) for s in grid.settings}) > 1] or ["task"]


def heads(grid: Grid, setting: Any) -> list[str]:
    """Return the headings of a setting: of task, rank and data those that vary in the grid."""
    return [FORMS[name](getattr(setting, name)) for name in dimensions(grid)]


def _scores(cells: Sequence[Mapping[str, Any]], unit: Unit | None) -> dict[str, Any]:
    """Return the scores of a method in a setting, and why there are fewer than planned."""
    factor, planned = unit.factor if unit else 1.0, len(cells)
    done = {cell["seed"]: factor * cell["score"] for cell in cells if cell["state"] == "done"}
    scores = {seed: score for seed, score in sorted(done.items()) if math.isfinite(score)}
    reasons: dict[str, list[int]] = {}
    for cell in cells:
        if cell["state"] == "failed":
            reasons.setdefault(cell["reason"], []).append(cell["seed"])
    remarks = [r if len(seeds) == planned else f"{_seeds_text(seeds)}: {r}" for r, seeds in reasons.items()]
    if lost := done.keys() - scores.keys():
        remarks.append(f"{_seeds_text(lost)}: the score is not finite, the training diverged")
    waiting = any(cell["state"] == "not run yet" for cell in cells)
    if waiting:
        there = f": {', '.join(map(str, scores))}" if scores else ""
        remarks.append(f"not run yet ({len(scores)} of {planned} seeds{there})")
    state = "done" if scores else "not run yet" if waiting else "failed" if planned else "not planned"
    return {"scores": scores, "planned": planned, "state": state, "remarks": remarks}


def _mean_scores(parts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the mean over tasks, seed by seed, of the seeds that have all of them."""
    planned = min(part["planned"] for part in parts.values())
    seeds = sorted(set.intersection(*(set(part["scores"]) for part in parts.values())))
    scores = {seed: float(np.mean([part["scores"][seed] for part in parts.values()])) for seed in seeds}
    remarks = []
    if 0 < len(scores) < planned:
        those = ", ".join(map(str, seeds))
        remarks.append(f"mean over the {len(scores)} of {planned} seeds that have all tasks: {those}")
    lacking = [task_name(task) for task, part in parts.items() if not part["scores"]]
    if not scores and planned:
        remarks.append(f"no mean without {', '.join(lacking)}" if lacking else "no mean: no seed has all tasks yet")
    states = {part["state"] for part in parts.values()}
    state = next((s for s in ("not planned", "failed", "not run yet") if s in states), "not run yet")
    return {"scores": scores, "planned": planned, "state": "done" if scores else state, "remarks": remarks}


def _against(row: Mapping[str, Any], base: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the comparison of a method with the baseline, where both are planned."""
    if base is None or "not planned" in (row["state"], base["state"]):
        return {"shared": 0, "paired": None, "verdict": "", "unsure": []}
    both = pairs(row["scores"], base["scores"])
    shared, missing = len(both[0]), "failed" if "failed" in (row["state"], base["state"]) else "not run yet"
    return {
        "shared": shared,
        "paired": compare(*both) if shared > 1 else None,
        "verdict": "to be judged" if shared > 1 else "one seed: no test" if shared else missing,
        "unsure": [*row["remarks"], *base["remarks"]],
    }


def _seeds_text(seeds: Iterable[int]) -> str:
    """Return ``seed 3`` or ``seeds 0, 1, 2``."""
    seeds = sorted(seeds)
    return f"seed{'s' * (len(seeds) != 1)} {', '.join(map(str, seeds))}"


ALPHA = 0.05
ROUNDING = 1e-4  # relative: what the order of sums makes, over a training, of things that are equal on paper


@dataclass(frozen=True, kw_only=True)
class Paired:
    """A method against a baseline on the same seeds.

    Attributes:
        n: Number of seeds.
        difference: Mean of method minus baseline, in the unit of the values.
        low: Lower end of the 95 % confidence interval of the mean difference (Student's t).
        high: Upper end of it.
        p_t: Two-sided paired t-test. NaN where it is not defined: all differences equal and not 0.
        effect: Cohen's d_z, the mean difference divided by the standard deviation of the differences. 0 where all
            are 0, NaN where they are equal otherwise.
        same: Whether the values agree to rounding, seed by seed: both did the same thing.
    """

    n: int
    difference: float
    low: float
    high: float
    p_t: float
    effect: float
    same: bool


def mean_sd(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and sample standard deviation (n - 1 in the denominator; NaN for one value) of one value or more."""
    x = np.asarray(values, dtype=np.float64)
    return float(x.mean()), float(x.std(ddof=1)) if len(x) > 1 else math.nan


def pairs(first: Mapping[int, float], second: Mapping[int, float]) -> tuple[list[float], list[float]]:
    """Return the values of the seeds that both have, in the same order."""
    shared = sorted(set(first.keys()) & set(second.keys()))
    return [first[s] for s in shared], [second[s] for s in shared]


def compare(method: Sequence[float], baseline: Sequence[float]) -> Paired:
    """Compare two methods whose runs are paired: value i of both comes from seed i.

    Args:
        method: One value per seed, at least two.
        baseline: As many values, in the same order of seeds.

    Raises:
        ValueError: Different lengths.
    """
    x, y = np.asarray(method, dtype=np.float64), np.asarray(baseline, dtype=np.float64)
    n, scale = len(x), max(np.abs(x).max(), np.abs(y).max()) or 1.0
    d = np.round((x - y) / scale, 12) * scale  # equal on paper must be equal: zeros do not depend on the last bit
    mean, sd = float(d.mean()), float(d.std(ddof=1))
    half = float(stats.t.ppf(1 - ALPHA / 2, n - 1)) * sd / math.sqrt(n)
    same, zero = np.ptp(d) == 0, bool(np.all(d == 0))
    return Paired(
        n=n,
        difference=mean,
        low=mean - half,
        high=mean + half,
        p_t=1.0 if zero else math.nan if same else float(2 * stats.t.sf(abs(mean) / sd * math.sqrt(n), n - 1)),
        effect=0.0 if zero else math.nan if same else mean / sd,
        same=did_the_same(x, y),
    )


def did_the_same(first: Sequence[float] | np.ndarray, second: Sequence[float] | np.ndarray) -> bool:
    """Return whether two methods agree to rounding (1 part in 10,000) on every seed, of which there are two or more."""
    return len(first) == len(second) > 1 and bool(np.allclose(first, second, rtol=ROUNDING, atol=0))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm-adjusted p-values, in the order given: compare them with 0.05 as they are.

    They bound the chance of a single false "better" among all comparisons of a table. An undefined p (NaN) stays NaN
    and still counts as a comparison.
    """
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")[: int((~np.isnan(p)).sum())]  # NaN is last
    adjusted = np.full(len(p), math.nan)
    adjusted[order] = np.maximum.accumulate(np.minimum(1.0, (len(p) - np.arange(len(order))) * p[order]))
    return adjusted.tolist()


def judge(comparison: Paired, p: float | None = None, higher_is_better: bool = True) -> str:
    """Return what may be said of the method: ``better``, ``worse``, ``no difference shown``, or ``did the same thing``.

    Args:
        comparison: From `compare`.
        p: The p-value that counts, for instance Holm-adjusted; default: the paired t-test.
        higher_is_better: Direction of the metric.
    """
    if comparison.same:
        return "did the same thing"
    p = comparison.p_t if p is None else p
    if not p < ALPHA:  # NaN shows nothing either
        return "no difference shown"
    return "better" if (comparison.difference > 0) == higher_is_better else "worse"
