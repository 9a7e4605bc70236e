"""What is learned: a pretrained model with a head, two data sets, a loss and a metric.

`load_task` gives a `Task`. Every module of this package is imported, and registers its tasks (see `register`); to add
one, add a file. A task works with the bare model, with a stock PEFT model and with a StructLoRA model alike, so that
every method is trained and measured by the same code.
"""

from __future__ import annotations

import importlib
import pkgutil

import torch

from structlora_pyg.checks import ConfigError, not_one_of
from structlora_pyg.study.config import DataConfig, ModelConfig
from structlora_pyg.study.tasks.base import TASKS, Batch, ScoringTask, Task, TaskKind, register
from structlora_pyg.study.tasks.data import DataError
from structlora_pyg.study.tasks.loading import ModelError

__all__ = [
    "TASKS", "Batch", "DataError", "ModelError", "ScoringTask", "Task", "TaskKind", "load_task", "register",
    "task_problems",
]  # fmt: skip

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")


def task_problems(model: ModelConfig, data: DataConfig) -> list[str]:
    """Return an unknown task, a library that cannot serve it and options of other tasks; empty if all is well."""
    if data.task not in TASKS:
        return [not_one_of("data.task", data.task, TASKS)]
    found = []
    if TASKS[data.task].brings_data and data.path:
        found.append(
            f"data.path={data.path!r} has no effect with data.task={data.task}, which brings its data; remove it"
        )
    elif not TASKS[data.task].brings_data and not data.path:
        found.append("data.path is missing; give a folder, a file or a hub id")
    if model.library not in TASKS[data.task].libraries:
        right = " or ".join(f"model.library={name}" for name in TASKS[data.task].libraries)
        found.append(f"model.library={model.library} cannot serve data.task={data.task}; set {right}")
    for option in sorted({option for kind in TASKS.values() for option in kind.options}):
        if getattr(data, option) is not None and option not in TASKS[data.task].options:
            users = ", ".join(name for name, kind in TASKS.items() if option in kind.options)
            found.append(f"data.{option} has no effect with data.task={data.task}; it belongs to {users}")
    if data.prompt is not None and ("{question}" in data.prompt) != (data.task == "vqa") and not found:
        place = "needs {question} where the question goes" if data.task == "vqa" else "has no {question}"
        found.append(f"data.prompt={data.prompt!r}: the prompt of data.task={data.task} {place}")
    return found


def load_task(model: ModelConfig, data: DataConfig, seed: int) -> Task:
    """Read the data, then the pretrained weights, and put them together.

    Args:
        model: Which model; its path is looked up like that of the data, see `structlora_pyg.study.tasks.data.resolve`.
        data: Which task and data.
        seed: Seed of the new head and of the examples drawn.

    Raises:
        DataError: If the data are missing or malformed.
        ModelError: If model or tokenizer are missing, damaged, or not made for the task.
        ConfigError: If the task is unknown or does not go with the options, or needs a program or package that is
            missing.
    """
    if found := task_problems(model, data):
        raise ConfigError(found)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return TASKS[data.task].load(model, data, seed)
