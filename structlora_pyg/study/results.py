"""``results.json``: what a finished run leaves to be read by tables and figures."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from structlora_pyg.analysis.inspect import inspect_adapter
from structlora_pyg.analysis.structure import gate_summary
from structlora_pyg.study.methods import Method
from structlora_pyg.study.run_config import RunConfig
from structlora_pyg.study.run_folder import config_hash, config_to_dict
from structlora_pyg.study.tasks.registry import Task
from structlora_pyg.tuner.model import StructLoraModel

PACKAGES = ("structlora-pyg", "torch", "torch-geometric", "peft", "transformers", "timm", "accelerate")
CURVE_POINTS = 100  # a longer curve is averaged over stretches of equal length


def results(
    config: RunConfig,
    accelerator: Accelerator,
    task: Task,
    method: Method,
    base_parameters: int,
    lines: Sequence[dict[str, Any]],
    metrics: dict[str, float],
    exported: dict[str, float],
    importance: dict[str, float | None] | None,
) -> dict[str, Any]:
    """Return the content of ``results.json``, see `structlora_pyg.study.schema.Results`.

    Args:
        config: Configuration of the run.
        accelerator: What it ran on.
        task: What was learned.
        method: Its model is exported already, to ``train.output_dir``.
        base_parameters: Parameters of the base model.
        lines: The lines of ``metrics.jsonl``.
        metrics: The final evaluation.
        exported: What the export reported.
        importance: Rank correlations, see `structlora_pyg.analysis.importance`; None if not measured.
    """
    steps = [line for line in lines if "seconds" in line]
    seconds = [line["seconds"] for line in steps]
    cuda = accelerator.device.type == "cuda"
    device = torch.cuda.get_device_name() if cuda else f"{accelerator.device.type}, {torch.get_num_threads()} threads"
    names, ends = ("loss", "task", "auxiliary"), [steps[0], steps[-1]] if steps else []
    return {
        "method": config.method.name,
        "metric": task.metric,
        "higher_is_better": task.higher_is_better,
        "metrics": metrics,
        "steps": len(steps),
        "parameters": {**method.parameter_counts(), "base": base_parameters},
        "losses": {when: {n: line[n] for n in names} for when, line in zip(("first", "last"), ends, strict=False)},
        "seconds": {"per_step_median": statistics.median(seconds) if seconds else None, "training": sum(seconds)},
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if cuda else None,
        "curves": _curves(lines, steps),
        "structure": _structure(Path(config.train.output_dir) / method.folder),
        "gates": _gates(method),
        "importance": importance,
        "export": exported,
        "device": device,
        "processes": accelerator.num_processes,
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "config": config_to_dict(config),
        "config_hash": config_hash(config),
    }


def _curves(lines: Sequence[dict[str, Any]], steps: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the task loss, averaged over stretches, at the last step of each; and the looks at the structure."""
    width = -(-len(steps) // CURVE_POINTS) or 1
    stretches = [steps[i : i + width] for i in range(0, len(steps), width)]
    return {
        "step": [stretch[-1]["step"] for stretch in stretches],
        "loss": [_mean([line["task"] for line in stretch]) for stretch in stretches],
        "structure": [{"step": line["step"], **line["structure"]} for line in lines if "structure" in line],
    }


def _mean(values: Sequence[float | None]) -> float | None:
    """Return the mean over steps that were not skipped."""
    known = [value for value in values if value is not None]
    return round(statistics.fmean(known), 6) if known else None


def _structure(folder: Path) -> dict[str, Any] | None:
    """Return the structure of an exported LoRA; None for full fine-tuning and VeRA."""
    file = folder / "adapter_config.json"
    if not file.is_file() or json.loads(file.read_text(encoding="utf-8"))["peft_type"] != "LORA":
        return None
    found = inspect_adapter(folder).structure
    return {
        "names": found.names,
        "similarity": [[round(value, 5) for value in row] for row in found.similarity.tolist()],
        **{n: _defined(getattr(found, n)) for n in ("adjacent_cosine", "drift_energy", "relative_drift")},
    }


def _gates(method: Method) -> dict[str, Any] | None:
    """Return the final gates, a row an adapter; None without a filter."""
    if not method.is_structlora or not isinstance(method.model, StructLoraModel):
        return None
    summary = gate_summary(method.model)
    gate = method.model.adapter_graph().gate
    values = [[round(value, 5) for value in row] for row in gate.tolist()]
    return {"open": summary["open_gates"], "mean": summary["mean_gate"], "values": values}


def _defined(value: float) -> float | None:
    return value if value == value else None


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
