"""What a run measures: around single steps of its training, and at its end, for ``results.json``."""

from __future__ import annotations

import functools
import platform
import statistics
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from structlora_pyg.analysis.structure import Structure, StructureRecorder
from structlora_pyg.study.config import TrainConfig
from structlora_pyg.study.config_files import config_hash
from structlora_pyg.study.methods import Method
from structlora_pyg.study.run_folder import GRAPHS_FOLDER
from structlora_pyg.study.tasks import Task
from structlora_pyg.tuner.recorder import GraphRecorder

PACKAGES = ("structlora-pyg", "torch", "torch-geometric", "peft", "transformers", "timm", "accelerate")
CURVE_POINTS = 100  # a longer curve is averaged over stretches of equal length


class StepMeasure(Protocol):
    """What is measured around single steps of the training.

    Attributes:
        every: Optimizer steps between two measurements; the last step is always measured.
    """

    every: int

    def before(self) -> None:
        """Prepare, before the first forward of the step."""

    def after(self, step: int) -> dict[str, Any]:
        """Measure, after the optimizer step; return what belongs into the log."""


class StructureMeasure:
    """Measures the structure of updates and gradients."""

    def __init__(self, model: Any, every: int) -> None:
        self.model, self.every = model, every

    @functools.cached_property
    def recorder(self) -> StructureRecorder:
        """What measures, made when it is first due."""
        return StructureRecorder(self.model)

    def before(self) -> None:
        """Collect gradients from now on."""
        self.recorder.open()

    def after(self, step: int) -> dict[str, Any]:
        """Return the structure."""
        return {"structure": self.recorder.read()}


class GraphMeasure:
    """Records the adapter graph in a folder."""

    def __init__(self, model: nn.Module, every: int, folder: Path) -> None:
        self.model, self.every, self.folder = model, every, folder

    @functools.cached_property
    def recorder(self) -> GraphRecorder:
        """What writes, made when it is first due."""
        return GraphRecorder(self.model, self.folder)

    def before(self) -> None:
        """Do nothing."""

    def after(self, step: int) -> dict[str, Any]:
        """Write the graph; the log gets nothing."""
        self.recorder.record(step)
        return {}


def step_measures(model: Any, settings: TrainConfig, main: bool) -> list[StepMeasure]:
    """Return what a configuration asks for; graphs are recorded by the main process alone."""
    found: list[StepMeasure] = []
    if settings.watch_every:
        found.append(StructureMeasure(model, settings.watch_every))
    if settings.record_every and main:
        found.append(GraphMeasure(model, settings.record_every, Path(settings.output_dir) / GRAPHS_FOLDER))
    return found


def results(
    stored: Mapping[str, Any], task: Task, method: Method, device: torch.device, lines: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Return what `structlora_pyg.study.train.train` returns, but for what it knows itself.

    Args:
        stored: Configuration of the run as plain values.
        task: What was learned.
        method: Its model is trained.
        device: What the run ran on.
        lines: The lines of ``metrics.jsonl``.
    """
    steps = [line for line in lines if "seconds" in line]
    seconds = [line["seconds"] for line in steps]
    cuda, gates = device.type == "cuda", method.gates()
    names, ends = ("loss", "task", "auxiliary"), [steps[0], steps[-1]] if steps else []
    return {
        "method": method.name,
        "metric": task.metric,
        "higher_is_better": task.higher_is_better,
        "steps": len(steps),
        "losses": {when: {n: line[n] for n in names} for when, line in zip(("first", "last"), ends, strict=False)},
        "seconds": {"per_step_median": statistics.median(seconds) if seconds else None, "training": sum(seconds)},
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if cuda else None,
        "curves": _curves(lines, steps),
        "structure": _structure(method.structure()),
        "gates": gates and {**gates, "values": _rounded(gates["values"])},
        "device": torch.cuda.get_device_name() if cuda else f"{device.type}, {torch.get_num_threads()} threads",
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "config": stored,
        "config_hash": config_hash(stored),
    }


def _curves(lines: Sequence[Mapping[str, Any]], steps: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the task loss, averaged over stretches, at the last step of each; and the looks at the structure."""
    width = -(-len(steps) // CURVE_POINTS) or 1
    stretches = [steps[i : i + width] for i in range(0, len(steps), width)]
    return {
        "step": [stretch[-1]["step"] for stretch in stretches],
        "loss": [round(statistics.fmean(line["task"] for line in stretch), 6) for stretch in stretches],
        "structure": [{"step": line["step"], **line["structure"]} for line in lines if "structure" in line],
    }


def _structure(found: Structure | None) -> dict[str, Any] | None:
    if found is None:
        return None
    names = ("adjacent_cosine", "drift_energy", "relative_drift")
    numbers = {n: None if (value := getattr(found, n)) != value else value for n in names}
    return {"names": found.names, "similarity": _rounded(found.similarity.tolist()), **numbers}


def _rounded(matrix: list[list[float]]) -> list[list[float]]:
    return [[round(value, 5) for value in row] for row in matrix]


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
