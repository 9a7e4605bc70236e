"""Where the runs of a sweep are made: processes of this machine, or a cluster of Ray, Dask or Slurm."""

from __future__ import annotations

import functools
import itertools
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import joblib

from structlora_pyg.checks import ConfigError, not_one_of, require

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
        raise ConfigError([not_one_of("backend", backend, BACKENDS)])
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
            raise ConfigError(["backend=dask: each worker makes one run at a time; start workers with --nthreads 1"])
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
        raise ConfigError(["backend=slurm: there is no sbatch here; start the sweep where jobs are submitted"])
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
