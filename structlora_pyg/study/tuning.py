"""Which learning rate a method of a grid gets, chosen on a part cut from train; and what cannot be run at all."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from statistics import fmean
from typing import NamedTuple

from structlora_pyg.study.grid import Cell, GridConfig
from structlora_pyg.study.run_config import RunConfig
from structlora_pyg.study.run_store import Runs

TUNING_SEED = 1000  # first seed of the runs that choose learning rates: none of those that are reported


class Trial(NamedTuple):
    """A run that may have to be made.

    Attributes:
        config: Its configuration.
        cell: Its place in the table.
    """

    config: RunConfig
    cell: Cell


def tuning_trials(grid: GridConfig) -> Iterator[Trial]:
    """Yield the runs that choose learning rates: at the first rank, on the largest fraction.

    There are none where there is a single rate, and none for tasks that are not available.
    """
    tasks = [task for task, entry in grid.tasks.items() if "unavailable" not in entry]
    for seed in range(TUNING_SEED, TUNING_SEED + grid.tuning_seeds):
        for task in tasks:
            for method in grid.methods:
                rates = grid.rates(task, method)
                for lr in rates if len(rates) > 1 else ():
                    cell = Cell(method, task, grid.ranks[0], max(grid.fractions), seed)
                    yield Trial(grid.run(cell, lr, tuning=True), cell)


def chosen_rates(grid: GridConfig, store: Runs) -> dict[str, dict[str, float]]:
    """Return the learning rates ``{task: {method: lr}}`` with the best mean metric on the part cut from train.

    Among equals the lower loss decides. A rate at which a run failed is out; where all failed, see `without_runs`, the
    first one stands for them.
    """
    scores: dict[tuple[str, str], dict[float, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for trial in tuning_trials(grid):
        record = store.get(trial.config)
        score = (-math.inf, -math.inf)
        if record is not None and record["status"] == "done":
            sign = 1 if record["higher_is_better"] else -1
            score = (sign * record["metrics"][record["metric"]], -record["metrics"].get("loss", 0.0))
        scores[trial.cell.task, trial.cell.method][trial.config.train.lr].append(score)

    def best(task: str, method: str) -> float:
        tried = scores.get((task, method))
        if tried is None:  # a single rate, or nothing to run
            return grid.rates(task, method)[0]
        return max(tried, key=lambda lr: [fmean(values) for values in zip(*tried[lr], strict=True)])

    return {task: {method: best(task, method) for method in grid.methods} for task in grid.tasks}


def without_runs(grid: GridConfig, store: Runs) -> dict[tuple[str, str], str]:
    """Return ``{(task, method): reason}`` of what cannot be run.

    The task is known to be unavailable, or every run that was to choose a learning rate has failed.
    """
    outcomes: dict[tuple[str, str], list[str | None]] = defaultdict(list)
    for trial in tuning_trials(grid):
        record = store.get(trial.config)
        outcomes[trial.cell.task, trial.cell.method].append(None if record is None else record["reason"])
    known = {task: entry["unavailable"] for task, entry in grid.tasks.items() if "unavailable" in entry}
    return {
        **{(task, method): reason for task, reason in known.items() for method in grid.methods},
        **{at: f"no learning rate could be chosen: {found[0]}" for at, found in outcomes.items() if all(found)},
    }
