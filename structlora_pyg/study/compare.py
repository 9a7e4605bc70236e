"""Run a grid of methods, tasks, ranks, data fractions and seeds; every run is one JSON file that is never made twice.

A folder of results holds ``grids/<name>.json`` (the table: which run stands where) and ``runs/<key>.json`` (what a run
gave). The key is a hash of what the run depends on, so grids that share a folder share runs, a comparison that was
interrupted goes on where it stopped, and several processes or machines can work on one at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import multiprocessing
import os
import shutil
import threading
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import transformers
from tqdm.auto import tqdm

from structlora_pyg.checks import ConfigError
from structlora_pyg.files import replace_file, short
from structlora_pyg.study.checkpoints import CheckpointError, newest_checkpoint
from structlora_pyg.study.claims import Claims
from structlora_pyg.study.grid import Cell, GridConfig
from structlora_pyg.study.run_config import RunConfig
from structlora_pyg.study.run_folder import RESULTS_FILE, config_to_dict, to_json
from structlora_pyg.study.run_store import Runs, run_key, write_run
from structlora_pyg.study.schema import SCHEMA
from structlora_pyg.study.tasks.registry import load_task
from structlora_pyg.study.train import train
from structlora_pyg.study.tuning import Trial, chosen_rates, tuning_trials, without_runs

WAIT = 2.0  # seconds between looks for what other processes have made


def compare(grid: GridConfig, output_dir: str | Path, jobs: int = 1, progress: bool = True) -> dict[str, Any]:
    """Choose learning rates, run what has not been run yet, and write the grid.

    Any number of processes may do this at once in one folder, on all machines that share it: every run is made by one
    of them, and each ends when all runs of its grid are there.

    Args:
        grid: What to compare.
        output_dir: Folder of results; other grids and processes may share it.
        jobs: Runs side by side, >= 1, each in a process of its own with its share of the processor's cores.
        progress: Show a progress bar with the time left.

    Returns:
        What ``grids/<name>.json`` holds: the grid's settings, ``learning_rates`` (``{task: {method: lr}}``), ``cells``
        with the ``key`` of their run or ``why`` none can be made, and ``failed``, the reasons of failed runs by key.

    Raises:
        ConfigError: If `jobs` is no positive number.
        RecordError: If the folder holds damaged files, or some of another version.
        DataError, ModelError: If data or model of a task cannot be loaded; nothing has been run then.
        CheckpointError: If the disk is full; finished runs and the last checkpoint of the others stay.
        OSError: If the folder cannot be written.
    """
    if jobs < 1:
        raise ConfigError([f"jobs must be >= 1, got {jobs}"])
    folder = Path(output_dir)
    for name in ("grids", "runs"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    store = Runs(folder)
    tuning = [trial for trial in tuning_trials(grid) if not store.done(trial.config)]
    if tuning:
        _load_tasks(grid)
        _load_tasks(grid, tuning=True)
        _run_all(tuning, store, "choosing learning rates", jobs, progress)
    rates = chosen_rates(grid, store)
    trials = [Trial(grid.run(cell, rates[cell.task][cell.method]), cell) for cell in grid.cells()]
    without = without_runs(grid, store)
    _write_grid(grid, store, rates, trials, without)
    wanted = (t for t in trials if (t.cell.task, t.cell.method) not in without and not store.done(t.config))
    missing = list({run_key(trial.config): trial for trial in wanted}.values())
    if missing and not tuning:
        _load_tasks(grid)
    _run_all(missing, store, grid.name, jobs, progress)
    with contextlib.suppress(OSError):  # another process may be at work
        (folder / "work").rmdir()
    return _write_grid(grid, store, rates, trials, without)


def failed_cells(table: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the cells of what `compare` returned that were tried and failed; tasks known to be unavailable are not."""
    tasks = table["settings"]["tasks"]
    tried = (cell for cell in table["cells"] if "unavailable" not in tasks[cell["task"]])
    return [cell for cell in tried if cell["why"] or cell["key"] in table["failed"]]


def _load_tasks(grid: GridConfig, tuning: bool = False) -> None:
    """Load data and model of every task once, so that what is wrong with them is said before anything has run."""
    first = next(iter(grid.methods))
    for task in (label for label, entry in grid.tasks.items() if "unavailable" not in entry):
        config = grid.run(Cell(first, task, grid.ranks[0], max(grid.fractions), 0), 1e-4, tuning)
        found = [f"{task}: {name}.{p}" for name in ("model", "data") for p in getattr(config, name).problems()]
        if found:
            raise ConfigError(found)
        load_task(config.model, config.data, config.train.seed)


def _run_all(trials: Sequence[Trial], store: Runs, title: str, jobs: int, progress: bool) -> None:
    """Make the runs that nobody else makes, and wait for those of others."""
    left = {run_key(trial.config): trial for trial in trials}
    claims = Claims(store.folder, left)
    with _Progress(trials, title, jobs, progress) as bar:

        def done(key: str) -> None:
            trial = left.pop(key)
            bar.done(trial, store.added(trial.config))

        for key in [key for key, trial in left.items() if claims.began_with(key) and store.made_since(trial.config)]:
            done(key)  # between the first look at the folder and these claims
        while left:
            free = [trial for key, trial in left.items() if claims.free(key)]
            for key in _outcomes(free, claims, jobs):
                done(key)
            for key in [key for key in left if claims.made(key)]:
                done(key)
            if left and not free:
                time.sleep(WAIT)


def _outcomes(trials: Sequence[Trial], claims: Claims, jobs: int) -> Iterator[str]:
    """Yield the keys of runs as they finish; those that others have taken meanwhile are left out."""
    if jobs == 1 or not trials:
        yield from (key for trial in trials if (key := _make(trial, claims)))
        return
    threads = max(1, (os.cpu_count() or 1) // jobs)
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_start_worker, initargs=(threads,)) as pool:
        running = [pool.submit(_make, trial, claims) for trial in trials]
        try:
            yield from (key for future in as_completed(running) if (key := future.result()))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _make(trial: Trial, claims: Claims) -> str | None:
    """Make a run, write its file and return its key; None if somebody else makes it or has made it."""
    key = run_key(trial.config)
    with claims.take(key) as free:
        if not free:
            return None
        write_run(claims.folder, key, run_trial(trial, claims.folder))
        shutil.rmtree(claims.folder / "work" / key, ignore_errors=True)
    return key


def _start_worker(threads: int) -> None:
    """Prepare a process of the pool: its share of the cores, and an end together with the process that started it."""
    torch.set_num_threads(threads)

    def end_with_parent() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)  # the runs are on disk or not at all; a pool whose owner was killed would work on for hours

    threading.Thread(target=end_with_parent, daemon=True).start()


def run_trial(trial: Trial, folder: Path) -> dict[str, Any]:
    """Make one run, or go on with it from its newest checkpoint, and return what its file will hold.

    An error does not stop the comparison: the file says what happened, and the table says it in the place of a number.

    Raises:
        CheckpointError: If the disk is full.
    """
    config, cell, began = trial.config, trial.cell, time.perf_counter()
    key = run_key(config)
    work = folder / "work" / key
    where = {**cell._asdict(), "method": config.method.name}  # one run may stand in several tables, under other labels
    place = {"schema": SCHEMA, "key": key, **where, "lr": config.train.lr}
    transformers.utils.logging.disable_progress_bar()  # of loading and saving, hundreds of times
    try:
        resume = _can_go_on(work)
        results = work / RESULTS_FILE  # there if only its record was not written any more
        settings = dataclasses.replace(config.train, output_dir=str(work))
        there = resume and results.exists()
        whole = dataclasses.replace(config, train=settings)
        found = json.loads(results.read_text()) if there else train(whole, resume=resume, progress=False)
    except CheckpointError:  # the disk, not the method: what is on it stays, to go on from
        raise
    except Exception as error:  # noqa: BLE001 (whatever it is, the other runs go on and the file keeps it)
        reason = f"{type(error).__name__}: {short(error)}"
        failed = {"status": "failed", "reason": reason, "traceback": traceback.format_exc()}
        return {**place, **failed, "config": _stored(config)}
    seconds = {**found["seconds"], "total": time.perf_counter() - began}
    left_out = ("losses", "config_hash")
    kept = {name: value for name, value in found.items() if name not in left_out}
    return {**kept, **place, "status": "done", "reason": None, "seconds": seconds, "config": _stored(config)}


def _stored(config: RunConfig) -> dict[str, Any]:
    """Return a configuration without the folder it was run in."""
    values = config_to_dict(config)
    del values["train"]["output_dir"]
    return values


def _can_go_on(work: Path) -> bool:
    """Tell whether an interrupted run left a checkpoint to go on from; remove what is left if not."""
    try:
        newest_checkpoint(work)
        return True
    except (CheckpointError, FileNotFoundError):
        shutil.rmtree(work, ignore_errors=True)
        return False


def _write_grid(
    grid: GridConfig,
    store: Runs,
    rates: dict[str, dict[str, float]],
    trials: Sequence[Trial],
    without: Mapping[tuple[str, str], str],
) -> dict[str, Any]:
    def place(trial: Trial) -> dict[str, Any]:
        why = None if store.done(trial.config) else without.get((trial.cell.task, trial.cell.method))
        return {**trial.cell._asdict(), "key": None if why else store.key(trial.config), "why": why}

    cells = [place(trial) for trial in trials]
    records = [store.get(trial.config) for trial, cell in zip(trials, cells, strict=True) if cell["key"]]
    table = {
        "schema": SCHEMA,
        **dataclasses.asdict(grid),
        "methods": list(grid.methods),
        "tasks": list(grid.tasks),
        "seeds": list(range(grid.seeds)),
        "learning_rates": rates,
        "settings": {"all": grid.settings, "methods": grid.methods, "tasks": grid.tasks},
        "cells": cells,
        "failed": {r["key"]: r["reason"] for r in records if r is not None and r["status"] == "failed"},
    }
    replace_file(store.folder / "grids" / f"{grid.name}.json", to_json(table))
    return table


class _Progress:
    """A progress bar over runs that knows that tasks differ in cost."""

    def __init__(self, trials: Sequence[Trial], title: str, jobs: int, shown: bool) -> None:
        form = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} runs [{elapsed}{postfix}]"
        self.bar = tqdm(total=len(trials), desc=title, bar_format=form, disable=not shown or not trials)
        self.jobs, self.shown = jobs, shown
        self.waiting = Counter(trial.cell.task for trial in trials)
        self.seconds: dict[str, list[float]] = defaultdict(list)

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def done(self, trial: Trial, record: dict[str, Any]) -> None:
        """Count a run and say what it gave."""
        cell = trial.cell
        said = f"{cell.method} on {cell.task}"
        self.waiting[cell.task] -= 1
        if record["status"] == "failed":
            if self.shown:
                self.bar.write(f"could not run {said}, rank {cell.rank}, seed {cell.seed}: {record['reason']}")
        else:
            self.seconds[cell.task].append(record["seconds"]["total"])
            metric = record["metric"]
            said += f" {metric} {record['metrics'][metric]:.3f}"
        self.bar.set_postfix_str(f"{self._left()} left; {said}")
        self.bar.update()

    def _left(self) -> str:
        known = [seconds for values in self.seconds.values() for seconds in values]
        if not known:
            return "?"
        mean = {task: fmean(self.seconds.get(task, known)) for task in self.waiting}
        seconds = sum(count * mean[task] for task, count in self.waiting.items()) / self.jobs
        return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
