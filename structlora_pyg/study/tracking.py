"""Experiment trackers (TensorBoard, Weights & Biases, ...) through Accelerate: ``train.trackers: [tensorboard]``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import LoggerType

from structlora_pyg.checks import nearest
from structlora_pyg.study.run_folder import flat

PROJECT = "structlora"  # name of the project, where a tracker groups runs
LOGS_FOLDER = "logs"


def tracker_problems(names: Sequence[str]) -> list[str]:
    """Return what is wrong with names of trackers, empty if nothing is."""
    available, built_in = set(map(str, get_available_trackers())), set(map(str, LoggerType.list()))
    found = []
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            known = ", ".join(LOGGER_TYPE_TO_CLASS)
            hint = nearest(name, LOGGER_TYPE_TO_CLASS)
            found.append(f"{name!r} is no tracker that Accelerate knows; allowed: {known}.{hint}")
        elif name in built_in and name not in available:
            found.append(f"{name!r} is not installed; pip install {name.replace('_', '-')}, or leave it out")
    return found


@contextmanager
def tracking(accelerator: Accelerator, folder: Path, config: Mapping[str, Any], first: int) -> Iterator[None]:
    """Start the trackers of an accelerator, and finish them at the end of the ``with`` block, also after an error.

    Args:
        accelerator: Made with ``log_with``.
        folder: Folder of the run; its name becomes the run's name where a tracker has one.
        config: The configuration, nested.
        first: Steps that are finished; TensorBoard drops what an interrupted run has logged after them.
    """
    if not accelerator.log_with:
        yield
        return
    logs = folder / LOGS_FOLDER
    logs.mkdir(parents=True, exist_ok=True)
    arguments: dict[str, dict[str, Any]] = {
        "tensorboard": {"purge_step": first + 1},
        "wandb": {"name": folder.name, "dir": str(logs)},
        "mlflow": {"run_name": folder.name},
    }
    plain = (bool, int, float, str)
    values = {k: v if isinstance(v, plain) else str(v) for k, v in flat(config).items()}
    accelerator.init_trackers(PROJECT, values, arguments)
    try:
        yield
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()


def scalars(values: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a line of ``metrics.jsonl`` by their path: ``evaluation/accuracy``, ``dirichlet/0``, ..."""
    found: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, (list, tuple)):
            value = dict(enumerate(value))
        if isinstance(value, Mapping):
            found |= {f"{key}/{inner}": number for inner, number in scalars(value).items()}
        elif isinstance(value, (int, float)):
            found[str(key)] = value
    return found
