"""What a run measures: around single steps of its training, and at its end, for ``results.json``."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

from structlora_pyg.analysis.structure import Structure, StructureRecorder
from structlora_pyg.study.config import TrainConfig
from structlora_pyg.study.methods import Method
from structlora_pyg.study.run_folder import GRAPHS_FOLDER
from structlora_pyg.study.tasks import Task
from structlora_pyg.tuner.recorder import GraphRecorder

PACKAGES = ("structlora-pyg", "torch", "torch-geometric", "peft", "transformers", "timm", "accelerate")
CURVE_POINTS = 100  # a longer curve is averaged over stretches of equal length


class StepMeasure(NamedTuple):
    """What is measured around single steps of the training.

    Attributes:
        every: Optimizer steps between two measurements; the last step is always measured.
        before: Prepares, before the first forward of the step.
        after: Measures, after the optimizer step; takes its number and returns what belongs into the log.
    """

    every: int
    before: Callable[[], object]
    after: Callable[[int], dict[str, Any]]


def step_measures(model: Any, settings: TrainConfig, main: bool) -> list[StepMeasure]:
    """Return what a configuration asks for; graphs are recorded by the main process alone."""
    found = []
    if settings.watch_every:
        structure = StructureRecorder(model)
        found.append(StepMeasure(settings.watch_every, structure.open, lambda _: {"structure": structure.read()}))
    if settings.record_every and main:
        graphs = GraphRecorder(model, Path(settings.output_dir) / GRAPHS_FOLDER)

        def record(step: int) -> dict[str, Any]:
            graphs.record(step)
            return {}  # the log gets nothing

        found.append(StepMeasure(settings.record_every, dict, record))
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
    names, ends = ("loss", "auxiliary", "total"), [steps[0], steps[-1]] if steps else []
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
        "device": torch.cuda.get_device_name() if cuda else f"{device.type}, threads: {torch.get_num_threads()}",
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "config": stored,
    }


def _curves(lines: Sequence[Mapping[str, Any]], steps: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the loss, averaged over stretches, at the last step of each; and the looks at the structure."""
    width = -(-len(steps) // CURVE_POINTS) or 1
    stretches = [steps[i : i + width] for i in range(0, len(steps), width)]
    return {
        "step": [stretch[-1]["step"] for stretch in stretches],
        "loss": [round(statistics.fmean(line["loss"] for line in stretch), 6) for stretch in stretches],
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
