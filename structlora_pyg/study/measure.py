"""What a finished run leaves in ``results.json``, to be read by tables and figures."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

import torch

from structlora_pyg.analysis.importance import direction_importance
from structlora_pyg.analysis.structure import adapter_structure, gate_summary
from structlora_pyg.study.batches import moved_to
from structlora_pyg.study.config import RunConfig
from structlora_pyg.study.config_files import config_hash, config_to_dict
from structlora_pyg.study.distributed import reshard
from structlora_pyg.study.methods import Method
from structlora_pyg.study.tasks import Task

PACKAGES = ("structlora-pyg", "torch", "torch-geometric", "peft", "transformers", "timm", "accelerate")
CURVE_POINTS = 100  # a longer curve is averaged over stretches of equal length


def results(
    config: RunConfig, task: Task, method: Method, device: torch.device, lines: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Return what `structlora_pyg.study.train.train` returns, but for what it knows itself.

    Args:
        config: Configuration of the run.
        task: What was learned.
        method: Its model is trained.
        device: What the run ran on.
        lines: The lines of ``metrics.jsonl``.
    """
    steps = [line for line in lines if "seconds" in line]
    seconds = [line["seconds"] for line in steps]
    cuda = device.type == "cuda"
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
        "structure": _structure(method),
        "gates": _gates(method),
        "device": torch.cuda.get_device_name() if cuda else f"{device.type}, {torch.get_num_threads()} threads",
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "config": config_to_dict(config),
        "config_hash": config_hash(config),
    }


def importance(method: Method, task: Task, count: int, device: torch.device) -> dict[str, float | None] | None:
    """Return how gates, norms and first-order estimates rank directions against their removal; None if not asked.

    Args:
        method: A trained StructLoRA.
        task: Evaluation examples and loss.
        count: Number of examples; 0: do not measure.
        device: Where the model is.
    """
    if not count:
        return None
    batch = moved_to(task.collate([task.eval_set[i] for i in range(min(count, len(task.eval_set)))]), device)
    found = direction_importance(method.model, lambda: task.loss(method.model, batch)).correlations()
    reshard(method.model)
    return found


def _curves(lines: Sequence[Mapping[str, Any]], steps: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the task loss, averaged over stretches, at the last step of each; and the looks at the structure."""
    width = -(-len(steps) // CURVE_POINTS) or 1
    stretches = [steps[i : i + width] for i in range(0, len(steps), width)]
    return {
        "step": [stretch[-1]["step"] for stretch in stretches],
        "loss": [round(statistics.fmean(line["task"] for line in stretch), 6) for stretch in stretches],
        "structure": [{"step": line["step"], **line["structure"]} for line in lines if "structure" in line],
    }


def _structure(method: Method) -> dict[str, Any] | None:
    """Return the structure of the updates; None for methods without LoRA updates."""
    if not method.has_updates:
        return None
    found = adapter_structure(method.model)
    names = ("adjacent_cosine", "drift_energy", "relative_drift")
    return {
        "names": found.names,
        "similarity": _rounded(found.similarity),
        **{n: None if (value := getattr(found, n)) != value else value for n in names},
    }


def _gates(method: Method) -> dict[str, Any] | None:
    """Return the final gates, a row for each adapter; None without a filter."""
    if not method.is_structlora:
        return None
    summary = gate_summary(method.model)
    gates = _rounded(method.model.adapter_graph().gate)
    return {"open": summary["open_gates"], "mean": summary["mean_gate"], "values": gates}


def _rounded(matrix: torch.Tensor) -> list[list[float]]:
    return [[round(value, 5) for value in row] for row in matrix.tolist()]


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
