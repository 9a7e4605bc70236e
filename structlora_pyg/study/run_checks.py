"""What a run is refused for: before anything is loaded, before the first step, and before its export."""

from __future__ import annotations

import torch
from peft import PeftModel
from torch import nn

from structlora_pyg.checks import ConfigError
from structlora_pyg.config import StructLoraConfig
from structlora_pyg.study.methods import METHODS, Method, method_problems
from structlora_pyg.study.run_config import RunConfig
from structlora_pyg.study.tasks.registry import Task
from structlora_pyg.study.tracking import tracker_problems
from structlora_pyg.tuner.fingerprint import changed, fingerprint


def run_problems(config: RunConfig) -> list[str]:
    """Return what is wrong with a configuration beyond single values: settings that do not go together."""
    found = [f"{name}.{p}" for name in ("model", "data", "method", "train") for p in getattr(config, name).problems()]
    if config.train.mixed_precision == "fp16" and not torch.cuda.is_available():
        found.append("train.mixed_precision=fp16 needs a GPU; use bf16 or no")
    found += method_problems(config.adapter, config.method)
    kind, settings = METHODS.get(config.method.name, Method), config.train
    if settings.watch_every and not kind.has_updates:
        found.append(f"train.watch_every has no effect with method.name={kind.name}, which has no LoRA updates")
    if settings.record_every and not kind.is_structlora:
        found.append(f"train.record_every has no effect with method.name={kind.name}, which has no adapter graph")
    found += [f"train.trackers: {problem}" for problem in tracker_problems(settings.trackers)]
    if settings.importance_examples and not kind.is_structlora:
        found.append(f"train.importance_examples needs a structlora method, not method.name={kind.name}")
    return found


def schedule_problems(adapter: StructLoraConfig, total: int) -> list[str]:
    """Return what is wrong with a schedule for a training of `total` optimizer steps."""
    acts = adapter.filter.kind != "none" or adapter.coordinator.conv not in (None, "none")
    if not acts or total > adapter.schedule.warmup_steps:
        return []
    return [
        f"adapter.schedule.warmup_steps={adapter.schedule.warmup_steps}, but training has {total} optimizer steps: "
        "filter and coordinator would never act. Lower it, or train longer"
    ]


def check_run(config: RunConfig) -> None:
    """Raise a `ConfigError` with everything that `run_problems` finds."""
    if found := run_problems(config):
        raise ConfigError(found)


def check_against_task(config: RunConfig, method: Method, task: Task, total: int) -> None:
    """Refuse what could only be noticed after hours: settings that do not fit the task or the length of the run."""
    if not method.is_structlora:
        return
    found, labels = schedule_problems(config.adapter, total), config.adapter.filter.num_labels
    if labels is not None and labels != task.num_labels:
        found.append(f"adapter.filter.num_labels={labels}, but {config.data.task} has {task.num_labels}")
    if found:
        raise ConfigError(found)


def check_trainable(model: nn.Module) -> None:
    """Refuse parameters of a type that the optimizer cannot train."""
    half = [name for name, p in model.named_parameters() if p.requires_grad and p.dtype == torch.float16]
    if half:
        raise ConfigError(
            [f"model.dtype=float16 would train {half[0]} in float16, which AdamW cannot; use float32 or bfloat16"]
        )


def check_frozen(method: Method, base: dict[str, str]) -> None:
    """Refuse to export an adapter whose base is no longer the one that everybody else has."""
    model = method.model.get_base_model() if isinstance(method.model, PeftModel) else method.model
    if wrong := changed(base, fingerprint(model, frozen=True, gather=True)):
        raise RuntimeError(
            f"{len(wrong)} frozen weights of the base model changed in training, first {wrong[0]}: the adapter would "
            "not fit the base that others load. Something other than the optimizer writes into the model; the "
            "checkpoints are kept"
        )
