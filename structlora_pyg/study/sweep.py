"""Run a grid: choose learning rates, make the runs that are missing, write the table.

A folder of results holds ``grids/<name>.json`` (the table: which run stands where) and ``runs/<key>.json`` (what each
run gave, see `structlora_pyg.study.runs`). A sweep that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import shutil
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import transformers
from tqdm.auto import tqdm

from structlora_pyg.checks import ConfigError, read, replace_file, short
from structlora_pyg.study.grid import Cell, Choice, GridConfig, Trial
from structlora_pyg.study.report.records import SCHEMA
from structlora_pyg.study.run_folder import RESULTS_FILE, CheckpointError, checkpoints, config_to_dict, to_json
from structlora_pyg.study.runs import RunStore, Version, call_each, run_key, take, write_run
from structlora_pyg.study.tasks import load_task
from structlora_pyg.study.train import train

WAIT = 2.0  # seconds between looks for what other processes have made


def run_grid(
    grid: GridConfig,
    folder: str | Path,
    jobs: int | None = None,
    backend: str = "loky",
    backend_options: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Choose learning rates, run what has not been run yet, and write the grid.

    Any number of processes may do this at once in one folder, on all machines that share it: every run is made by one
    of them, and each ends when all runs of its grid are there.

    Args:
        grid: What to compare.
        folder: Folder of results; other grids and processes may share it.
        jobs: Runs side by side, >= 1; default: 1 on this machine, as many as it takes on a cluster.
        backend: Where the runs are made, see `structlora_pyg.study.runs.call_each`.
        backend_options: What the backend takes besides, see there.
        progress: Show a progress bar with the time left.

    Returns:
        What ``grids/<name>.json`` holds: the grid's settings, ``learning_rates`` (``{task: {method: lr}}``), ``cells``
        with the ``key`` of their run or ``why`` none can be made, and ``failed``, the reasons of failed runs by key.

    Raises:
        ConfigError: With every problem of every run; if `jobs` is no positive number, or the backend is unknown or not
            installed.
        RecordError: If the folder holds damaged files, or some of another version.
        DataError, ModelError: If data or model of a task cannot be loaded; nothing has been run then.
        CheckpointError: If the disk is full; finished runs and the last checkpoint of the others stay.
        OSError: If the folder cannot be written.
    """
    found = [] if jobs is None or jobs >= 1 else [f"jobs must be >= 1, got {jobs}"]
    found += read(backend_options or {}, dict, "backend_options")[1]
    if found := found + grid.problems():  # it may have been changed since it was read
        raise ConfigError(found)
    folder = Path(folder).resolve()  # other machines start elsewhere
    for name in ("grids", "runs"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    store = RunStore(folder)
    call = functools.partial(
        call_each, jobs=jobs, backend=backend, options=dict(backend_options or {}), logs=folder / "slurm"
    )
    tuning = list(grid.tuning_trials())
    if undone := [trial for trial in tuning if not store.is_done(trial.config)]:
        _load_tasks(grid)
        _load_tasks(grid, tuning=True)
        _make_all(undone, store, call, "choosing learning rates", progress)
    rates, reasons = choose_rates(grid, store, tuning)
    trials = [grid.trial(cell, rates[cell.task][cell.method]) for cell in grid.cells()]
    _write_table(grid, store, rates, trials, reasons)
    missing = [t for t in trials if (t.cell.task, t.cell.method) not in reasons and not store.is_done(t.config)]
    if missing and not undone:
        _load_tasks(grid)
    _make_all(missing, store, call, grid.name, progress)
    with contextlib.suppress(OSError):  # another process may be at work
        (folder / "work").rmdir()
    return _write_table(grid, store, rates, trials, reasons)


def failed_cells(table: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the cells of what `run_grid` returned that were tried and failed; unavailable tasks are not tried."""
    tasks = table["settings"]["tasks"]
    tried = (cell for cell in table["cells"] if "unavailable" not in tasks[cell["task"]])
    return [cell for cell in tried if cell["why"] or cell["key"] in table["failed"]]


def choose_rates(
    grid: GridConfig, store: RunStore, tuning: Sequence[Trial]
) -> tuple[dict[str, dict[str, Choice]], dict[tuple[str, str], str]]:
    """Choose rates and settings with the best mean metric on the part cut from train; among equals the lower loss.

    Args:
        grid: What to choose for.
        store: Holds what the runs gave.
        tuning: The `GridConfig.tuning_trials`.

    Returns:
        ``{task: {method: choice}}``, and ``{(task, method): reason}`` of what cannot be run: the task is known to be
        unavailable, or every run that was to choose a rate has failed. A single failed run puts its rate out.
    """
    tried: dict[tuple[str, str], list[tuple[Choice, Any]]] = defaultdict(list)
    for trial in tuning:
        tried[trial.cell.task, trial.cell.method].append((trial.choice, store.get(trial.config)))
    rates = {task: {method: grid.choices(task, method)[0] for method in grid.methods} for task in grid.tasks}
    unavailable = {task: entry["unavailable"] for task, entry in grid.tasks.items() if "unavailable" in entry}
    reasons = {(task, method): reason for task, reason in unavailable.items() for method in grid.methods}
    for (task, method), runs in tried.items():
        scores = [_mean_score([r for c, r in runs if c == choice]) for choice in grid.choices(task, method)]
        rates[task][method] = grid.choices(task, method)[scores.index(max(scores))]
        failures = [record and record["reason"] for _, record in runs]
        if all(failures):
            reasons[task, method] = f"no learning rate could be chosen: {failures[0]}"
    return rates, reasons


def _mean_score(records: Sequence[dict[str, Any] | None]) -> tuple[float, float]:
    scores = []
    for record in records:
        if record is None or record["status"] != "done":
            return -math.inf, -math.inf
        sign = 1 if record["higher_is_better"] else -1
        scores.append((sign * record["metrics"][record["metric"]], -record["metrics"].get("loss", 0.0)))
    metric, loss = zip(*scores, strict=True)
    return fmean(metric), fmean(loss)


def _load_tasks(grid: GridConfig, tuning: bool = False) -> None:
    """Load data and model of every task once, so that what is wrong with them is said before anything has run."""
    first = next(iter(grid.methods))
    for task in grid.available_tasks():
        config = grid.run(Cell(first, task, grid.ranks[0], max(grid.fractions), 0), 1e-4, tuning=tuning)
        load_task(config.model, config.data, config.train.seed)


def _make_all(
    trials: Sequence[Trial], store: RunStore, call: Callable[..., Iterator[None]], title: str, progress: bool
) -> None:
    """Make the runs that nobody else makes, and wait for those of others."""
    left = {run_key(trial.config): trial for trial in trials}
    with tqdm(total=len(left), desc=title, unit="run", disable=None if progress and left else True) as bar:

        def collect() -> None:
            for key in [key for key in left if store.is_made(key)]:
                bar.set_postfix_str(_outcome(left.pop(key).cell, store.reload(key), progress))
                bar.update()

        collect()
        while left:
            free = [(left[key], store.folder, key, store.first_seen.get(key)) for key in left if store.is_free(key)]
            for _ in call(_make, free):
                collect()
            collect()
            if left and not free:
                time.sleep(WAIT)


def _outcome(cell: Cell, record: dict[str, Any], progress: bool) -> str:
    """Return one line about a run; that of a failed one is printed above the bar as well."""
    if record["status"] == "done":
        return f"{cell.method} on {cell.task} {record['metric']} {record['metrics'][record['metric']]:.3f}"
    where = f"{cell.method} on {cell.task}, rank {cell.rank}, seed {cell.seed}"
    if progress:
        tqdm.write(f"could not run {where}: {record['reason']}")
    return f"{where} failed"


def _make(trial: Trial, folder: Path, key: str, first_seen: Version | None) -> None:
    """Make a run and write its file, unless somebody else makes it or has made it."""
    with take(folder, key, first_seen) as free:
        if free:
            write_run(folder, key, _run(trial, folder / "work" / key, key))
            shutil.rmtree(folder / "work" / key, ignore_errors=True)


def _run(trial: Trial, work: Path, key: str) -> dict[str, Any]:
    """Make one run, or go on with it from its newest checkpoint, and return what its file will hold.

    An error does not stop the sweep: the file says what happened, and the table says it in the place of a number.

    Raises:
        CheckpointError: If the disk is full.
    """
    config, began = trial.config, time.perf_counter()
    stored = config_to_dict(config)
    del stored["train"]["output_dir"]
    # One run may stand in several tables, under other labels: its file has the name of the method.
    place = {"schema": SCHEMA, "key": key, **trial.cell._asdict(), "method": config.method.name, "lr": config.train.lr}
    transformers.utils.logging.disable_progress_bar()  # of loading and saving, hundreds of times
    try:
        if not (resume := bool(checkpoints(work))):  # nothing to go on from
            shutil.rmtree(work, ignore_errors=True)
        finished = work / RESULTS_FILE  # there if only its record was not written any more
        if resume and finished.exists():
            found = json.loads(finished.read_text())
        else:
            settings = dataclasses.replace(config.train, output_dir=str(work))
            found = train(dataclasses.replace(config, train=settings), resume=resume, progress=False)
    except CheckpointError:  # the disk, not the method: what is on it stays, to go on from
        raise
    except Exception as error:  # noqa: BLE001 (whatever it is, the other runs go on and the file keeps it)
        reason = f"{type(error).__name__}: {short(error)}"
        failed = {"status": "failed", "reason": reason, "traceback": traceback.format_exc()}
        return {**place, **failed, "config": stored}
    seconds = {**found["seconds"], "total": time.perf_counter() - began}
    kept = {name: value for name, value in found.items() if name != "losses"}
    return {**kept, **place, "status": "done", "reason": None, "seconds": seconds, "config": stored}


def _write_table(
    grid: GridConfig,
    store: RunStore,
    rates: dict[str, dict[str, Choice]],
    trials: Sequence[Trial],
    reasons: Mapping[tuple[str, str], str],
) -> dict[str, Any]:
    cells, failed = [], {}
    for config, cell, _ in trials:
        record = store.get(config)
        why = None if store.is_done(config) else reasons.get((cell.task, cell.method))
        kept = None if why else record
        cells.append({**cell._asdict(), "key": kept and kept["key"], "why": why})
        if kept and kept["status"] == "failed":
            failed[kept["key"]] = kept["reason"]
    table = {
        "schema": SCHEMA,
        **dataclasses.asdict(grid),
        "methods": list(grid.methods),
        "tasks": list(grid.tasks),
        "seeds": list(range(grid.seeds)),
        "learning_rates": {task: {method: choice.lr for method, choice in row.items()} for task, row in rates.items()},
        "tuned": {task: {method: c.tuned for method, c in row.items() if c.tuned} for task, row in rates.items()},
        "settings": {"all": grid.settings, "methods": grid.methods, "tasks": grid.tasks},
        "cells": cells,
        "failed": failed,
    }
    replace_file(store.folder / "grids" / f"{grid.name}.json", to_json(table))
    return table
