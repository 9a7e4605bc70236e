"""Statistics of repeated runs: two methods on the same seeds, and what may be said about their difference."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

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
    n, d = len(x), _without_rounding_noise(x - y, max(np.abs(x).max(), np.abs(y).max()))
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


def _without_rounding_noise(d: np.ndarray, scale: float) -> np.ndarray:
    """Make differences equal that are equal on paper: ranks and zeros must not depend on the last bit."""
    return np.round(d / scale, 12) * scale if scale > 0 else d
