"""The runs of a folder of results: found by what their outcome depends on, and made by one process at a time.

A folder of results holds ``runs/<key>.json``, what a run gave. The key is a hash of what the run depends on, so grids
that share a folder share runs, and any number of processes, on any machines, can work on one at once. A run is taken by
a lock on a file of its own, which the operating system releases when its owner ends, however that happens: a run whose
owner was killed is taken up by whoever looks next. `call_each` makes them, on this machine or on a cluster of Ray, Dask
or Slurm.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import joblib
from filelock import FileLock, Timeout

from structlora_pyg.checks import ConfigError, not_one_of, replace_file, require
from structlora_pyg.config import SECTIONS
from structlora_pyg.study.config import RunConfig, flat, parse_config
from structlora_pyg.study.methods import METHODS
from structlora_pyg.study.report.records import damage_named, read_record
from structlora_pyg.study.run_folder import config_to_dict

Version = tuple[int, int]  # of a file: when it was written, and its inode


def run_key(config: RunConfig) -> str:
    """Return 16 hexadecimal digits for what the outcome of a run depends on.

    Where it writes is left out; so is what a method does not read of the adapter, so that a baseline is run once,
    whatever the StructLoRA beside it, and a method without rank once for all ranks.
    """
    method = METHODS[config.method.name]
    unread = {"alarms"} if method.is_structlora else {"alarms", *SECTIONS}
    unread |= set() if method.ranked else {"r", "lora_alpha"}
    kept = {
        key: value
        for key, value in flat(config_to_dict(config)).items()
        if key not in ("train.output_dir", "train.keep_checkpoints")
        and not (key.startswith("adapter.") and key.split(".")[1] in unread)
    }
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


class RunStore:
    """The runs of a folder of results.

    A stored configuration is read by the code of today before it is compared, so that a setting that has been added
    since, at the default that keeps the old behavior, does not separate a run from its file.

    Args:
        folder: The folder of results, on a file system whose locks reach all its machines (NFS 4, Lustre with
            ``flock``, any local disk).

    Attributes:
        first_seen: The version that each run's file had when this store was opened.

    Raises:
        RecordError: If a file is damaged or was written by another version.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.first_seen: dict[str, Version | None] = {}
        self._records: dict[str, dict[str, Any]] = {}
        for file in sorted((folder / "runs").glob("*.json")):
            self.first_seen[file.stem] = _version(file)
            record = read_record(file)
            with damage_named(file):
                config, problems = parse_config(RunConfig, dict(record["config"]))
            if not problems and config.method.name in METHODS:
                self._records[run_key(config)] = record

    def get(self, config: RunConfig) -> dict[str, Any] | None:
        """Return what a run gave; None if it has not been run."""
        return self._records.get(run_key(config))

    def is_done(self, config: RunConfig) -> bool:
        """Tell whether a run has succeeded; a failed one is tried again."""
        record = self.get(config)
        return record is not None and record["status"] == "done"

    def is_made(self, key: str) -> bool:
        """Tell whether anybody has written the file of a run since this store was opened."""
        return _version(_file(self.folder, key)) != self.first_seen.get(key)

    def is_free(self, key: str) -> bool:
        """Tell whether a run is still to be made and nobody is making it at the moment."""
        with take(self.folder, key, self.first_seen.get(key)) as free:
            return free

    def reload(self, key: str) -> dict[str, Any]:
        """Read the file of a run that somebody has written, and return what it holds."""
        self._records[key] = read_record(_file(self.folder, key))
        return self._records[key]


@contextlib.contextmanager
def take(folder: Path, key: str, first_seen: Version | None) -> Iterator[bool]:
    """Take a run for as long as the context lasts, and tell whether it was free and is still to be made.

    Args:
        folder: The folder of results.
        key: See `run_key`.
        first_seen: See `RunStore.first_seen`; a file of another version means that the run has been made since.
    """
    file = folder / "work" / f"{key}.lock"
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(file, timeout=0):
            yield _version(_file(folder, key)) == first_seen
            if _version(_file(folder, key)) != first_seen:
                file.unlink(missing_ok=True)  # nobody needs it now: whoever has it open looks for the run first
    except Timeout:
        yield False


def write_run(folder: Path, key: str, record: dict[str, Any]) -> None:
    """Write the file of a run into a folder of results."""
    replace_file(_file(folder, key), json.dumps(record, allow_nan=False) + "\n")


def _file(folder: Path, key: str) -> Path:
    return folder / "runs" / f"{key}.json"


def _version(file: Path) -> Version | None:
    with contextlib.suppress(FileNotFoundError):
        found = file.stat()
        return found.st_mtime_ns, found.st_ino
    return None


DAY = 24 * 60
BACKENDS = ("loky", "ray", "dask", "slurm")
Function = Callable[..., None]
Calls = Sequence[tuple[Any, ...]]


def call_each(
    function: Function, calls: Calls, jobs: int | None, backend: str, options: dict[str, Any], logs: Path
) -> Iterator[None]:
    """Call a function with each tuple of arguments, and yield whenever a call has ended.

    Args:
        function: A function of a module. Each call has a process to itself, because random seeds are global.
        calls: Its arguments.
        jobs: Calls side by side; default: 1 with ``loky``, as many as the cluster takes otherwise.
        backend: ``loky``: processes of this machine, each with its share of the cores; they end with this one.
            ``ray``: the cluster at ``$RAY_ADDRESS``, or this machine. ``dask``: the cluster at
            ``$DASK_SCHEDULER_ADDRESS``, its workers with one thread each, or this machine. ``slurm``: job arrays
            submitted through submitit, which run on when this process ends, and again when Slurm preempts them.
        options: With ``ray`` those of a remote function, such as ``num_gpus``; with ``slurm`` those of
            ``submitit.AutoExecutor.update_parameters``, such as ``slurm_partition`` and ``timeout_min`` (a day), and
            ``cluster: local`` to try it without Slurm; with ``dask`` those of ``distributed.Client``; with ``loky``
            those of ``joblib.Parallel``.
        logs: Folder for what Slurm's jobs print.

    Raises:
        ConfigError: If the backend is unknown or not installed, or cannot give each call a process to itself.
    """
    if backend not in BACKENDS:
        raise ConfigError(not_one_of("backend", backend, BACKENDS))
    if backend == "loky":
        parallel = joblib.Parallel(jobs or 1, "loky", return_as="generator_unordered", batch_size=1, **options)
        yield from parallel(joblib.delayed(_owned)(os.getpid(), function, *call) for call in calls)
    elif calls:
        run = {"ray": _on_ray, "dask": _on_dask}.get(backend)
        yield from run(function, calls, jobs, options) if run else _on_slurm(function, calls, jobs, options, logs)


def _on_ray(function: Function, calls: Calls, jobs: int | None, options: dict[str, Any]) -> Iterator[None]:
    # Tasks of Ray itself: its joblib backend cannot tell when a call ends, nor give each call a GPU.
    ray = require("ray", "ray")
    if not ray.is_initialized():
        ray.init(include_dashboard=False, log_to_driver=False, logging_level="error")
    remote = ray.remote(max_retries=0, **options)(function)
    waiting = (remote.remote(*call) for call in calls)
    running = list(itertools.islice(waiting, jobs))
    try:
        while running:
            ended, running = ray.wait(running)
            ray.get(ended)
            running += itertools.islice(waiting, 1)
            yield
    finally:
        for task in running:
            ray.cancel(task, force=True)


def _on_dask(function: Function, calls: Calls, jobs: int | None, options: dict[str, Any]) -> Iterator[None]:
    distributed = require("distributed", "dask")
    if not require("dask", "dask").config.get("scheduler-address", None):
        options = {"n_workers": jobs, "threads_per_worker": 1, "dashboard_address": None, **options}
    with distributed.Client(**options) as client:
        if any(threads != 1 for threads in client.nthreads().values()):
            raise ConfigError("backend=dask: each worker makes one run at a time; start workers with --nthreads 1")
        waiting = (client.submit(function, *call, pure=False) for call in calls)
        running = distributed.as_completed(itertools.islice(waiting, jobs))
        for ended in running:
            ended.result()
            running.update(itertools.islice(waiting, 1))
            yield


def _on_slurm(
    function: Function, calls: Calls, jobs: int | None, options: dict[str, Any], logs: Path
) -> Iterator[None]:
    submitit = require("submitit", "slurm")
    limit = {"slurm_array_parallelism": jobs} if jobs else {}
    options = {"cluster": "slurm", "timeout_min": DAY, **limit, **options}  # submitit's own limit is five minutes
    cluster = options.pop("cluster")
    if cluster == "slurm" and shutil.which("sbatch") is None:
        raise ConfigError("backend=slurm: there is no sbatch here; start the sweep where jobs are submitted")
    executor = submitit.AutoExecutor(logs, cluster=cluster)
    executor.update_parameters(**options)
    with executor.batch():
        submitted = [executor.submit(_Requeued(function), *call) for call in calls]
    failures = []
    for job in submitit.helpers.as_completed(submitted):
        failures += [error] if (error := job.exception()) else []
        yield
    if failures:
        raise failures[0]


class _Requeued:
    """A function whose job Slurm queues again after it has preempted it or its time was up; the run then resumes."""

    def __init__(self, function: Function) -> None:
        self.function = function

    def __call__(self, *arguments: Any) -> None:
        self.function(*arguments)

    def checkpoint(self, *arguments: Any) -> Any:
        """Return what submitit submits in the place of the job."""
        return require("submitit", "slurm").helpers.DelayedSubmission(self, *arguments)


def _owned(owner: int, function: Function, *arguments: Any) -> None:
    if os.getpid() != owner:
        _end_with(owner)
    function(*arguments)


@functools.cache
def _end_with(owner: int) -> None:
    """Let this process end when the one that started it does, which may have been killed: a run can take hours."""

    def watch() -> None:
        while os.getppid() == owner:
            time.sleep(1.0)
        os._exit(1)  # a run is on disk or not at all

    threading.Thread(target=watch, daemon=True).start()
