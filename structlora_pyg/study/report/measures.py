"""Numbers of a grid's runs, seed by seed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from structlora_pyg.study.report.records import Grid, Run, Setting


def measured(grid: Grid, method: str, setting: Setting, path: Sequence[str], factor: float = 1.0) -> dict[int, float]:
    """Return a number of every finished run of a cell by seed, for instance ``("gates", "open")``; finite ones only."""
    found = {seed: factor * run.value(*path) for seed, run in sorted(grid.done(method, setting).items())}
    return {seed: value for seed, value in found.items() if math.isfinite(value)}


def pairs(first: Mapping[int, float], second: Mapping[int, float]) -> tuple[list[float], list[float]]:
    """Return the values of the seeds that both have, in the same order."""
    shared = sorted(set(first) & set(second))
    return [first[s] for s in shared], [second[s] for s in shared]


def step_ratio(grid: Grid, method: str, settings: Sequence[Setting]) -> float:
    """Return the median over seeds and settings of a method's step time divided by the baseline's; NaN without any."""
    path, ratios = ("seconds", "per_step_median"), []
    for setting in settings:
        both = pairs(
            measured(grid, method, setting, path), measured(grid, grid.baseline or grid.methods[0], setting, path)
        )
        ratios += [a / b for a, b in zip(*both, strict=True) if b > 0]
    return float(np.median(ratios)) if ratios else math.nan


def on_gpu(run: Run) -> bool:
    """Return whether a run was made on an accelerator, where seconds mean something to others."""
    return not str(run.data.get("device", "cpu")).lower().startswith("cpu")
