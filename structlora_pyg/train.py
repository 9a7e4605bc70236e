"""The training loop: `train` runs a configuration to its exported adapter; the rest of the file is its tools.

A run is a folder: ``config.json``, ``metrics.jsonl`` (a line for every step and evaluation), ``checkpoint-<step>/``,
and at the end ``results.json`` and ``adapter/``. An interrupted run that is resumed ends with the same adapter, bit for
bit, as one that was left alone; on a GPU as far as its kernels are deterministic.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import json
import math
import os
import pickle
import platform
import random
import re
import shutil
import statistics
import time
import warnings
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState
from accelerate.utils import extract_model_from_parallel, set_seed
from peft import LoraConfig
from safetensors import SafetensorError
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import get_scheduler

from structlora_pyg.config import ConfigError, RunConfig, StructLoraConfig, nearest
from structlora_pyg.files import replace_file
from structlora_pyg.model import StructLoraModel, get_structlora_model
from structlora_pyg.optim import parameter_groups
from structlora_pyg.tasks import Task, load_task

CONFIG_FILE = "config.json"
METRICS_FILE = "metrics.jsonl"
RESULTS_FILE = "results.json"
STATE_FILE = "trainer.pt"
MANIFEST_FILE = "manifest.json"
ADAPTER_FOLDER = "adapter"

# Schedules that need nothing but the number of steps.
SCHEDULES = (
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt",
)  # fmt: skip
PARALLEL = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
START_BATCHES = 8  # micro-batches whose mean gradient init_lora_weights=gradient aligns the start with
PACKAGES = ("structlora-pyg", "torch", "torch-geometric", "peft", "transformers", "timm", "accelerate")


class CheckpointError(RuntimeError):
    """A checkpoint that is missing, damaged, cannot be written, or does not belong to this run."""


def train(config: RunConfig, resume: bool = False) -> dict[str, Any]:
    """Train, evaluate and export an adapter.

    Under ``accelerate launch`` every process takes an equal share of each batch of
    ``batch_size * gradient_accumulation_steps * processes`` examples, and evaluates the whole evaluation set.

    Args:
        config: What to train, see `structlora_pyg.config.load_config`.
        resume: Continue the unfinished run in ``config.train.output_dir`` from its newest checkpoint.

    Returns:
        The content of ``results.json``: ``metrics`` of the final evaluation, ``metric`` (the primary one's name),
        ``parameters``, ``seconds``, ``losses``, ``export``, ``versions``, ``config``.

    Raises:
        ConfigError: If the configuration has problems, or differs from that of the run to be resumed.
        FileExistsError: If the folder holds a run and `resume` is False, or a finished one.
        CheckpointError: If there is no checkpoint to resume from, or the newest one is damaged.
        DataError, ModelError: See `structlora_pyg.tasks.load_task`.
        FloatingPointError: If loss or gradient stop being finite; the checkpoints written so far stay.
    """
    settings = config.train
    _check(config)
    folder = Path(settings.output_dir)
    _check_folder(folder, config, resume)
    checkpoint = _newest_checkpoint(folder) if resume else None

    accelerator = _accelerator(settings.mixed_precision)
    accelerator.wait_for_everyone()  # nobody writes before everybody has looked
    task = load_task(config.model, config.data, settings.seed)
    order = Order(
        len(task.train_set),
        settings.batch_size * settings.gradient_accumulation_steps * accelerator.num_processes,
        settings.seed,
    )
    total = settings.max_steps or math.ceil(settings.epochs * order.steps_per_epoch)
    _check_against_task(config, task, total)

    if settings.gradient_checkpointing:
        task.enable_gradient_checkpointing()
    set_seed(settings.seed)
    task.model.to(accelerator.device)
    start = _start_batches(task, order, settings.batch_size) if _aligned(config) else None
    core = get_structlora_model(task.model, with_head(config.adapter, task.head), train_step=start)
    _check_trainable(core)
    optimizer: Any = torch.optim.AdamW(parameter_groups(core, settings.lr, settings.weight_decay))
    scheduler = get_scheduler(settings.lr_scheduler, optimizer, math.ceil(settings.warmup_ratio * total), total)
    model, optimizer = accelerator.prepare(core, optimizer)
    # A loader draws a number for its workers; from a generator of its own, evaluating leaves training as it is.
    eval_loader: DataLoader = DataLoader(
        task.eval_set, settings.eval_batch_size, collate_fn=task.collate, generator=torch.Generator()
    )
    parts: dict[str, Any] = {"model": core, "optimizer": optimizer, "scheduler": scheduler}

    set_seed(settings.seed, device_specific=True)
    first = 0 if checkpoint is None else _load_checkpoint(checkpoint, accelerator, **parts)
    if checkpoint is None and accelerator.is_main_process:
        _start_run(folder, config)
    log = _Log(folder, accelerator.is_main_process, keep=first)
    metrics: dict[str, float] | None = None
    quiet = not accelerator.is_main_process
    with tqdm(total=total, initial=first, desc="training", unit="step", disable=quiet) as bar:
        for step in range(first, total):
            model.train()
            began = time.perf_counter()
            examples = order.share(step, accelerator.process_index, accelerator.num_processes)
            losses = _accumulate_gradients(task, model, accelerator, examples, settings.batch_size)
            norm = float(accelerator.clip_grad_norm_(core.parameters(), settings.max_grad_norm))
            done, rate = step + 1, optimizer.param_groups[0]["lr"]
            _check_finite(losses["loss"], norm, done, accelerator, folder)
            optimizer.step()
            if not optimizer.step_was_skipped:
                scheduler.step()
            optimizer.zero_grad()

            log.write(
                step=done,
                epoch=done / order.steps_per_epoch,
                **losses,
                grad_norm=norm if math.isfinite(norm) else None,
                lr=rate,
                seconds=time.perf_counter() - began,
            )
            bar.set_postfix({name: f"{value:.4f}" for name, value in losses.items()}, refresh=False)
            bar.update()
            if _due(done, settings.eval_every, total):
                metrics = _evaluate(task, model, eval_loader, done, folder)
                log.write(step=done, evaluation=metrics)
            if _due(done, settings.save_every, total):
                _save_checkpoint(folder, done, accelerator, settings.keep_checkpoints, **parts)

    if metrics is None:  # resumed from the last checkpoint: the loop had nothing left to do
        metrics = _evaluate(task, model, eval_loader, total, folder)
    accelerator.wait_for_everyone()
    results: dict[str, Any] = {}
    if accelerator.is_main_process:
        exported = core.export(folder / ADAPTER_FOLDER)
        task.save_extras(folder / ADAPTER_FOLDER)
        results = _results(config, accelerator, task, core, total, metrics, log.lines(), exported)
        replace_file(folder / RESULTS_FILE, _json(results))
        score = f"{task.metric} {metrics[task.metric]:.4f}"
        accelerator.print(f"{score} after {total} steps")
        accelerator.print(f"results: {folder / RESULTS_FILE}")
        accelerator.print(f"adapter: {folder / ADAPTER_FOLDER}")
    accelerator.wait_for_everyone()
    return results


class Order:
    """Which examples every optimizer step sees: a function of the seed and the step alone.

    Args:
        count: Number of training examples.
        per_step: Examples an optimizer step; the last step of an epoch takes what is left.
        seed: Each epoch is shuffled with ``seed + epoch``.
    """

    def __init__(self, count: int, per_step: int, seed: int) -> None:
        self.count, self.per_step, self.seed = count, per_step, seed
        self.steps_per_epoch = math.ceil(count / per_step)
        self._epoch = -1
        self._shuffled: list[int] = []

    def step(self, index: int) -> list[int]:
        """Return the examples of a step, over all processes."""
        epoch, position = divmod(index, self.steps_per_epoch)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed + epoch)
            self._shuffled, self._epoch = torch.randperm(self.count, generator=generator).tolist(), epoch
        return self._shuffled[position * self.per_step : (position + 1) * self.per_step]

    def share(self, index: int, rank: int, processes: int) -> list[int]:
        """Return the examples of one process; the shares of all are equally long, by repeating the first examples."""
        examples = self.step(index)
        missing = -len(examples) % processes
        examples = examples + [examples[i % len(examples)] for i in range(missing)]
        return examples[rank::processes]


def config_to_dict(config: RunConfig) -> dict[str, Any]:
    """Return a configuration as plain values; of PEFT's own settings only those that are not the default."""
    default, lora = LoraConfig(), config.adapter.to_lora_config()
    names = [f.name for f in dataclasses.fields(LoraConfig) if f.init]
    changed = {n: getattr(lora, n) for n in names if getattr(lora, n) != getattr(default, n)}
    sections = {name: dataclasses.asdict(getattr(config, name)) for name in ("model", "data", "train")}
    return json.loads(_json({**sections, "adapter": {**changed, **config.adapter.own_fields()}}))


def config_hash(config: RunConfig) -> str:
    """Return 16 hexadecimal digits that two runs share if they differ in nothing but ``train.output_dir``."""
    values = {k: v for k, v in _flat(config_to_dict(config)).items() if k != "train.output_dir"}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def _check(config: RunConfig) -> None:
    found = [f"{name}.{p}" for name in ("model", "data", "train") for p in getattr(config, name).problems()]
    name = config.train.lr_scheduler
    if name not in SCHEDULES and not any("lr_scheduler" in p for p in found):
        found.append(
            f"train.lr_scheduler={name!r} needs arguments of its own; available: {', '.join(SCHEDULES)}."
            + nearest(name, SCHEDULES)
        )
    if config.train.mixed_precision == "fp16" and not torch.cuda.is_available():
        found.append("train.mixed_precision=fp16 needs a GPU; use bf16 or no")
    if found:
        raise ConfigError(found)


def _check_against_task(config: RunConfig, task: Task, total: int) -> None:
    """Refuse what could only be noticed after hours: settings that do not fit the task or the length of the run."""
    adapter, found = config.adapter, []
    coordinated = adapter.filter.kind != "none" or adapter.coordinator.conv not in (None, "none")
    if coordinated and total <= adapter.schedule.warmup_steps:
        found.append(
            f"adapter.schedule.warmup_steps={adapter.schedule.warmup_steps}, but training has {total} optimizer steps: "
            "filter and coordinator would never act. Lower it, or train longer"
        )
    labels = adapter.filter.num_labels
    if labels is not None and labels != task.num_labels:
        found.append(f"adapter.filter.num_labels={labels}, but {config.data.task} has {task.num_labels}")
    if found:
        raise ConfigError(found)


def _check_trainable(model: StructLoraModel) -> None:
    half = [name for name, p in model.named_parameters() if p.requires_grad and p.dtype == torch.float16]
    if half:
        raise ConfigError(
            [f"model.dtype=float16 would train {half[0]} in float16, which AdamW cannot; use float32 or bfloat16"]
        )


def _check_finite(loss: float, norm: float, step: int, accelerator: Accelerator, folder: Path) -> None:
    # The loss scaling of fp16 overflows now and then: the step is skipped and the scale halved, until it cannot be.
    scaling = accelerator.scaler is not None and accelerator.scaler.get_scale() > 1
    if not math.isfinite(loss):
        raise _diverged(f"the loss is {loss}", step, folder)
    if not math.isfinite(norm) and not scaling:
        raise _diverged(f"the gradient norm is {norm}", step, folder)


def _evaluate(task: Task, model: torch.nn.Module, loader: DataLoader, step: int, folder: Path) -> dict[str, float]:
    try:
        return task.evaluate(model, loader)
    except FloatingPointError as error:
        raise _diverged(str(error), step, folder) from error


def _diverged(what: str, step: int, folder: Path) -> FloatingPointError:
    kept = _checkpoints(folder)
    last = f"the last checkpoint is {kept[-1]}" if kept else "no checkpoint was written yet"
    return FloatingPointError(
        f"optimizer step {step}: {what}; {last}. Lower train.lr, raise train.warmup_ratio, or use "
        "model.dtype=float32 with train.mixed_precision=no"
    )


def _accelerator(mixed_precision: str) -> Accelerator:
    # Accelerate keeps one state a process and refuses to change its precision; a second run may need another one.
    AcceleratorState._reset_state()
    accelerator = Accelerator(mixed_precision=mixed_precision)
    if accelerator.distributed_type not in PARALLEL:
        raise ConfigError(
            [f"accelerate is set up for {accelerator.distributed_type}; this loop supports data parallelism (DDP) only"]
        )
    return accelerator


def with_head(adapter: StructLoraConfig, head: tuple[str, ...]) -> StructLoraConfig:
    """Return a copy that also trains and saves the head."""
    changed = copy.copy(adapter)
    changed.modules_to_save = list(dict.fromkeys([*(adapter.modules_to_save or []), *head])) or None
    return changed


def _aligned(config: RunConfig) -> bool:
    return config.adapter.init_lora_weights == "gradient"


def _start_batches(task: Task, order: Order, batch_size: int) -> Any:
    """Return the function that accumulates the gradients a gradient-aligned start is computed from."""

    def run() -> None:
        device = next(task.model.parameters()).device
        for step in range(START_BATCHES):
            batch = task.collate([task.train_set[i] for i in order.step(step)[:batch_size]])
            with warnings.catch_warnings():
                # PEFT's hooks only read the gradients of outputs, which this warning is not about.
                warnings.filterwarnings("ignore", message="Full backward hook is firing")
                task.loss(task.model, _moved(batch, device)).backward()

    return run


def _moved(batch: Mapping[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    return {name: tensor.to(device) for name, tensor in batch.items()}


def _accumulate_gradients(
    task: Task, model: torch.nn.Module, accelerator: Accelerator, examples: list[int], batch_size: int
) -> dict[str, float]:
    """Add the gradients of one optimizer step and return its loss, whole and in parts.

    A micro-batch is weighted by its share of the examples, so that any split of a batch gives the same gradient.
    """
    losses = {"loss": 0.0, "task": 0.0, "auxiliary": 0.0}
    for at in range(0, len(examples), batch_size):
        chosen = examples[at : at + batch_size]
        batch = _moved(task.collate([task.train_set[i] for i in chosen]), accelerator.device)
        share = len(chosen) / len(examples)
        last = at + batch_size >= len(examples)
        with contextlib.nullcontext() if last else accelerator.no_sync(model):
            loss = task.loss(model, batch)
            accelerator.backward(loss * share)
        for name, value in _parts_of_loss(model, loss).items():
            losses[name] += value * share
    return losses


def _parts_of_loss(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, float]:
    value, known = loss.item(), extract_model_from_parallel(model).losses()
    auxiliary = known.get("auxiliary", 0.0)
    return {"loss": value, "task": known.get("task", value - auxiliary), "auxiliary": auxiliary}


def _due(step: int, every: int, total: int) -> bool:
    return step == total or (every > 0 and step % every == 0)


# -- the run's folder ---------------------------------------------------------------------------------------------


def _check_folder(folder: Path, config: RunConfig, resume: bool) -> None:
    """Refuse before any work what would overwrite a run or continue another one.

    Raises:
        FileExistsError, NotADirectoryError, PermissionError, CheckpointError, ConfigError: As `train` says.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"train.output_dir={str(folder)!r} is a file; give a folder")
    finished, begun = (folder / RESULTS_FILE).exists(), (folder / CONFIG_FILE).exists() or _checkpoints(folder)
    if finished:
        raise FileExistsError(f"{folder} holds a finished run ({RESULTS_FILE}); choose another train.output_dir")
    if not resume:
        if begun:
            raise FileExistsError(
                f"{folder} holds an unfinished run; continue it with resume=true, or choose another train.output_dir"
            )
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(f"{folder} cannot be written to; choose another train.output_dir")
        return
    if not begun:
        raise CheckpointError(f"{folder} holds no run to resume; start without resume")
    _compare_config(folder / CONFIG_FILE, config)


def _compare_config(file: Path, config: RunConfig) -> None:
    try:
        before = _flat(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{file} cannot be read ({_short(error)}); start without resume, in another train.output_dir"
        ) from error
    now = _flat(config_to_dict(config))
    keys = sorted(k for k in before.keys() | now.keys() if before.get(k) != now.get(k) and k != "train.output_dir")
    if keys:
        raise ConfigError(
            [f"{k}: the run in {file.parent} was started with {before.get(k)!r}, not {now.get(k)!r}" for k in keys]
        )


def _start_run(folder: Path, config: RunConfig) -> None:
    """Write the configuration; the exclusive creation settles a race of two runs for one folder."""
    try:
        with (folder / CONFIG_FILE).open("x", encoding="utf-8") as stream:
            stream.write(_json(config_to_dict(config)))
    except FileExistsError:
        raise FileExistsError(f"another run has just started in {folder}; choose another train.output_dir") from None


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested keys joined by dots."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
    return flat


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, allow_nan=False, default=_plain) + "\n"


def _plain(value: Any) -> Any:
    """Return what JSON has no form for: sets as sorted lists, the rest as text."""
    return sorted(value) if isinstance(value, (set, frozenset)) else str(value)


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


class _Log:
    """``metrics.jsonl``: one line a step and one an evaluation, on disk at once.

    Args:
        folder: Folder of the run.
        active: Whether this process writes.
        keep: Lines of later steps, written after the checkpoint the run continues from, are dropped.
    """

    def __init__(self, folder: Path, active: bool, keep: int) -> None:
        self.file, self.active = folder / METRICS_FILE, active
        kept = [line for line in self.lines() if line["step"] <= keep]
        if active:
            replace_file(self.file, "".join(json.dumps(line) + "\n" for line in kept))

    def write(self, **values: Any) -> None:
        if self.active:
            with self.file.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(values, allow_nan=False) + "\n")

    def lines(self) -> list[dict[str, Any]]:
        """Return the lines; one that a crash cut short can only be the last and is left out."""
        if not self.file.exists():
            return []
        found: list[dict[str, Any]] = []
        for line in self.file.read_text(encoding="utf-8").splitlines():
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return found


def _results(
    config: RunConfig,
    accelerator: Accelerator,
    task: Task,
    model: StructLoraModel,
    total: int,
    metrics: dict[str, float],
    lines: list[dict[str, Any]],
    exported: dict[str, float],
) -> dict[str, Any]:
    steps = [line for line in lines if "seconds" in line]
    seconds = [line["seconds"] for line in steps]
    cuda = accelerator.device.type == "cuda"
    device = torch.cuda.get_device_name() if cuda else f"{accelerator.device.type}, {torch.get_num_threads()} threads"
    names, ends = ("loss", "task", "auxiliary"), [steps[0], steps[-1]] if steps else []
    return {
        "metric": task.metric,
        "higher_is_better": task.higher_is_better,
        "metrics": metrics,
        "steps": total,
        "parameters": {**model.parameter_counts(), "base": _base_parameters(model)},
        "losses": {when: {n: line[n] for n in names} for when, line in zip(("first", "last"), ends, strict=False)},
        "seconds": {"per_step_median": statistics.median(seconds) if seconds else None, "training": sum(seconds)},
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if cuda else None,
        "export": exported,
        "device": device,
        "processes": accelerator.num_processes,
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "config": config_to_dict(config),
        "config_hash": config_hash(config),
    }


def _base_parameters(model: StructLoraModel) -> int:
    """Return the parameters of the model as it was loaded, head included."""
    extra = ("lora_", "original_module")  # adapters, and the untrained copy that PEFT keeps of a head
    named = model.get_base_model().named_parameters()
    return sum(p.numel() for name, p in named if not any(part in name for part in extra))


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


# -- checkpoints --------------------------------------------------------------------------------------------------


def _checkpoints(folder: Path) -> list[Path]:
    """Return the finished checkpoints, oldest first."""
    found = [(int(m[1]), p) for p in folder.glob("checkpoint-*") if (m := re.fullmatch(r"checkpoint-(\d+)", p.name))]
    return [path for _, path in sorted(found)]


def _newest_checkpoint(folder: Path) -> Path:
    found = _checkpoints(folder)
    if not found:
        raise CheckpointError(
            f"{folder} holds a run that stopped before its first checkpoint; delete it or choose another "
            "train.output_dir, and start without resume"
        )
    _verify_checkpoint(found[-1])
    return found[-1]


def _save_checkpoint(
    folder: Path, step: int, accelerator: Accelerator, keep: int, model: StructLoraModel, optimizer: Any, scheduler: Any
) -> None:
    """Write ``checkpoint-<step>`` beside its place, flush it, move it there; then remove the oldest ones."""
    final, temporary = folder / f"checkpoint-{step}", folder / f".checkpoint-{step}.tmp"
    try:
        if accelerator.is_main_process:
            for stale in folder.glob(".checkpoint-*.tmp"):  # of a run that was killed
                shutil.rmtree(stale)
            temporary.mkdir()
        accelerator.wait_for_everyone()
        torch.save(_random_state(), temporary / f"random-{accelerator.process_index}.pt")
        if accelerator.is_main_process:
            model.save_pretrained(str(temporary))
            state = {
                "step": step,
                "processes": accelerator.num_processes,
                "optimizer": optimizer.state_dict(),
                "scheduler": scheduler.state_dict(),
                "scaler": None if accelerator.scaler is None else accelerator.scaler.state_dict(),
            }
            torch.save(state, temporary / STATE_FILE)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            sums = {str(p.relative_to(temporary)): _checksum(p) for p in sorted(temporary.rglob("*")) if p.is_file()}
            (temporary / MANIFEST_FILE).write_text(_json(sums), encoding="utf-8")
            for path in (*temporary.rglob("*"), temporary):
                _flush(path)
            temporary.rename(final)
            _flush(folder)
            for old in _checkpoints(folder)[:-keep]:
                shutil.rmtree(old)
    except ValueError as error:  # the model refuses to write factors that are not finite
        raise _diverged(str(error), step, folder) from error
    except (OSError, RuntimeError, SafetensorError) as error:  # what a full disk raises depends on who writes
        raise CheckpointError(
            f"{final} could not be written ({_short(error)}); earlier checkpoints are untouched. Free some space and "
            "continue with resume=true"
        ) from error
    finally:
        if accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
    accelerator.wait_for_everyone()


def _verify_checkpoint(checkpoint: Path) -> None:
    """Compare every file with the sum written when the checkpoint was complete.

    Raises:
        CheckpointError: Naming the file that is missing or damaged.
    """
    manifest = checkpoint / MANIFEST_FILE
    try:
        sums = json.loads(manifest.read_text(encoding="utf-8"))
        for name, expected in sums.items():
            if _checksum(checkpoint / name) != expected:
                raise _damaged(checkpoint / name, "its checksum differs from the one written with it")
    except OSError as error:
        raise _damaged(Path(error.filename or manifest), error) from error
    except (ValueError, AttributeError) as error:
        raise _damaged(manifest, error) from error


def _load_checkpoint(
    checkpoint: Path, accelerator: Accelerator, model: StructLoraModel, optimizer: Any, scheduler: Any
) -> int:
    """Restore everything and return the number of finished optimizer steps."""
    file = checkpoint / STATE_FILE
    state = _load(file)
    if state["processes"] != accelerator.num_processes:
        raise CheckpointError(
            f"{checkpoint} was written by {state['processes']} processes, this run has {accelerator.num_processes}: "
            "the order of the data would change. Launch as many as before"
        )
    try:
        model.load_training_state(checkpoint)
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(state["scaler"])
    except (OSError, ValueError, KeyError) as error:
        raise _damaged(checkpoint, error) from error
    _set_random_state(_load(checkpoint / f"random-{accelerator.process_index}.pt"))
    return int(state["step"])


def _load(file: Path) -> dict[str, Any]:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise _damaged(file, error) from error


def _damaged(file: Path, error: BaseException | str) -> CheckpointError:
    reason = error if isinstance(error, str) else _short(error)
    folder = next((p for p in (file, *file.parents) if p.name.startswith("checkpoint-")), file)
    return CheckpointError(
        f"{file} is missing or damaged ({reason}). Delete {folder} to resume from the checkpoint before it, or start "
        "without resume in another train.output_dir"
    )


def _checksum(file: Path) -> str:
    with file.open("rb") as stream:
        digest = hashlib.sha256()
        for piece in iter(lambda: stream.read(1 << 20), b""):
            digest.update(piece)
        return digest.hexdigest()


def _flush(path: Path) -> None:
    """Force a file or a folder's entries to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _random_state() -> dict[str, Any]:
    """Return the state of every generator that training draws from, in types a safe load accepts."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, keys.numpy(), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
