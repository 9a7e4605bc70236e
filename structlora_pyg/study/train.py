"""The training loop: `train` runs a configuration to its exported adapter.

A run is a folder: ``config.json``, ``metrics.jsonl`` (a line for every step and evaluation), ``checkpoint-<step>/``,
``graphs/`` and ``logs/`` if asked for, and at the end ``results.json`` and ``adapter/`` (``model/`` for full
fine-tuning). An interrupted run that is resumed ends with the same weights, bit for bit, as one that was left alone;
on a GPU as far as its kernels are deterministic.
"""

from __future__ import annotations

import contextlib
import math
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device, set_seed
from peft import PeftModel
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import get_scheduler

from structlora_pyg.analysis.structure import StructureRecorder
from structlora_pyg.checks import remove_leftovers, replace_file
from structlora_pyg.study.config import RunConfig
from structlora_pyg.study.config_files import CONFIG_FILE, config_to_dict, to_json
from structlora_pyg.study.distributed import make_accelerator, reshard, shard, tracking
from structlora_pyg.study.methods import Method
from structlora_pyg.study.run_folder import (
    GRAPHS_FOLDER,
    RESULTS_FILE,
    Log,
    alone_in,
    check_folder,
    diverged,
    full_disk_said,
    load_checkpoint,
    newest_checkpoint,
    read_lines,
    save_checkpoint,
)
from structlora_pyg.study.setup import adapt, check_run
from structlora_pyg.study.steps import accumulate_gradients, losses_on, results
from structlora_pyg.study.tasks import Task, load_task
from structlora_pyg.tuner.alarms import first_not_finite
from structlora_pyg.tuner.fingerprint import changed, fingerprint
from structlora_pyg.tuner.optim import set_head_rate
from structlora_pyg.tuner.recorder import GraphRecorder

DIVERGES = (  # an alarm
    "the loss is a thousand times the lowest so far: the run diverges. Lower train.lr, or raise train.warmup_ratio"
)


def train(config: RunConfig, resume: bool = False, progress: bool = True) -> dict[str, Any]:
    """Train, evaluate and export.

    Under ``accelerate launch`` the processes share each batch of
    ``batch_size * gradient_accumulation_steps * processes`` examples, and train what one process trains on it, but for
    dropout. Every process evaluates the whole evaluation set. With DDP every process holds the whole model, with FSDP2
    its part of the frozen base.

    Args:
        config: What to train, see `structlora_pyg.study.config_files.load_config`.
        resume: Continue the unfinished run in ``config.train.output_dir`` from its newest checkpoint.
        progress: Show a progress bar and print where the results are.

    Returns:
        The content of ``results.json``: ``method``, ``metrics`` of the final evaluation, ``metric`` (the primary one's
        name), ``parameters``, ``seconds``, ``losses``, ``curves``, ``structure``, ``gates``, ``importance``,
        ``export``, ``versions``, ``config``; see `structlora_pyg.study.steps`.

    Raises:
        ConfigError: If the configuration has problems, or differs from that of the run to be resumed.
        FileExistsError: If the folder holds a run and `resume` is False, or a finished one.
        CheckpointError: If there is no checkpoint to resume from, the newest one is damaged, or the disk is full.
        DataError, ModelError: See `structlora_pyg.study.tasks.load_task`.
        FloatingPointError: If loss or gradient stop being finite; the checkpoints written so far stay.
    """
    check_run(config)
    folder, stored = Path(config.train.output_dir), config_to_dict(config)
    check_folder(folder, stored, resume)
    accelerator = make_accelerator(config)
    with alone_in(folder) if accelerator.is_main_process else contextlib.nullcontext(), full_disk_said(folder):
        check_folder(folder, stored, resume)  # once more, now that nobody else can change it
        checkpoint = newest_checkpoint(folder) if resume else None
        accelerator.wait_for_everyone()  # nobody writes before everybody has looked
        return _run(config, stored, checkpoint, accelerator, progress)


def _run(
    config: RunConfig, stored: dict[str, Any], checkpoint: Path | None, accelerator: Accelerator, progress: bool
) -> dict[str, Any]:
    """Put the parts together, train, and write what is left."""
    settings, main = config.train, accelerator.is_main_process
    folder = Path(settings.output_dir)
    task = load_task(config.model, config.data, settings.seed)
    base, own = fingerprint(task.model, leave_out=task.head), set(task.model.parameters())
    base_parameters = sum(p.numel() for p in own)
    sharded = accelerator.is_fsdp2  # asked before prepare(), after which Accelerate may have forgotten it
    if not sharded:  # one device need not have room for a base that is to be sharded
        task.model.to(accelerator.device)
    method, order, total = adapt(config, task, accelerator.num_processes)
    optimizer: Any = method.optimizer(settings.lr, settings.weight_decay)
    if settings.head_lr is not None and task.head:
        set_head_rate(optimizer, method.model, task.head, settings.head_lr)
    scheduler = get_scheduler(settings.lr_scheduler, optimizer, math.ceil(settings.warmup_ratio * total), total)
    if sharded:
        model, optimizer = shard(accelerator, method.model, own, optimizer)
    else:
        model, optimizer = accelerator.prepare(method.model, optimizer)

    set_seed(settings.seed, device_specific=True)
    state: dict[str, Any] = {"method": method, "optimizer": optimizer, "scheduler": scheduler}
    first = 0 if checkpoint is None else load_checkpoint(checkpoint, accelerator, **state)
    if checkpoint is None and main:
        replace_file(folder / CONFIG_FILE, to_json(stored))
    log = Log(folder, accelerator, keep=first)
    alarms = method.alarms(config.adapter.alarms)
    structure = StructureRecorder(method.model) if settings.watch_every else None
    graphs = GraphRecorder(method.model, folder / GRAPHS_FOLDER) if settings.record_every and main else None
    metrics: dict[str, float] = {}
    lowest = math.inf
    bar = tqdm(total=total, initial=first, desc="training", unit="step", disable=None if main and progress else True)
    with tracking(accelerator, stored, first), bar:
        for step in range(first + 1, total + 1):
            model.train()
            method.keep_statistics()
            watching = structure if _due(step, settings.watch_every, total) else None
            if watching is not None:
                watching.open()
            began = time.perf_counter()
            examples = order.step(step - 1)
            losses = accumulate_gradients(method, task, model, accelerator, examples, settings.batch_size)
            norm = float(accelerator.clip_grad_norm_(method.model.parameters(), settings.max_grad_norm))
            rate = optimizer.param_groups[0]["lr"]
            if broken := _not_finite(losses["total"], norm, accelerator, method.model):
                raise diverged(broken, step, folder)
            optimizer.step()
            if not optimizer.step_was_skipped:
                scheduler.step()
            optimizer.zero_grad()
            alarms.after_step()
            lowest = min(lowest, losses["loss"])
            if losses["loss"] > 1000 * max(lowest, 1.0):
                alarms.give(DIVERGES, step)
            if step <= order.returned and not sharded:
                # Of the next step: the loss of examples that were just trained on always asks for more noise.
                parts = order.step(step)[::2], order.unseen(step - 1, settings.batch_size)
                method.teach(step, *losses_on(method, task, accelerator, parts, settings.batch_size))

            seconds, epoch = time.perf_counter() - began, step / order.steps_per_epoch
            finite = norm if math.isfinite(norm) else None
            log.write(step, epoch=epoch, **losses, grad_norm=finite, lr=rate, seconds=seconds)
            if watching is not None:
                log.write(step, structure=watching.read())
            if graphs is not None and _due(step, settings.record_every, total):
                graphs.record(step)
            bar.set_postfix({name: f"{value:.4f}" for name, value in losses.items()}, refresh=False)
            bar.update()
            if _due(step, settings.eval_every, total):
                metrics = _evaluate(task, model, settings.eval_batch_size, folder, step)
                log.write(step, evaluation=metrics)
            if _due(step, settings.save_every, total):
                save_checkpoint(folder, step, accelerator, settings.keep_checkpoints, **state)

    if not metrics:  # resumed from the last checkpoint: the loop had nothing left to do
        metrics = _evaluate(task, model, settings.eval_batch_size, folder, total)
    # On all processes: a sharded base is there only where all of them work together.
    _check_frozen(method.model, base)
    accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # what a direction is worth drowns in bfloat16
    ranking = _importance(method, task, settings.importance_examples, accelerator.device)
    accelerator.wait_for_everyone()
    left: dict[str, Any] = {}
    if main:
        for place in (folder, folder / method.folder):
            remove_leftovers(place)
        summary = results(stored, task, method, accelerator.device, read_lines(log.file))
        parameters = {**method.parameter_counts(), "base": base_parameters}
        exported = method.export(folder / method.folder)
        task.save_extras(folder / method.folder)
        left = {
            **summary,
            "metrics": metrics,
            "parameters": parameters,
            "importance": ranking,
            "export": exported,
            "processes": accelerator.num_processes,
            "alarms": alarms.given,
        }
        replace_file(folder / RESULTS_FILE, to_json(left))
        if progress:
            lines = (f"results: {folder / RESULTS_FILE}", f"{method.folder}: {folder / method.folder}")
            accelerator.print(f"{task.metric} {metrics[task.metric]:.4f} after {total} steps", *lines, sep="\n")
    accelerator.wait_for_everyone()
    return left


def _due(step: int, every: int, total: int) -> bool:
    return step == total or (every > 0 and step % every == 0)


def _not_finite(loss: float, norm: float, accelerator: Accelerator, model: nn.Module) -> str | None:
    """Say what is not finite, and where it begins; None if all is well."""
    # The loss scaling of fp16 overflows now and then: the step is skipped and the scale halved, until it cannot be.
    scaling = accelerator.scaler is not None and accelerator.scaler.get_scale() > 1
    if math.isfinite(loss) and (math.isfinite(norm) or scaling):
        return None
    what = f"the gradient norm is {norm}" if math.isfinite(loss) else f"the loss is {loss}"
    return f"{what} (first: {first_not_finite(model)})"


def _evaluate(task: Task, model: nn.Module, batch_size: int, folder: Path, step: int) -> dict[str, float]:
    # A loader draws a number for its workers; from a generator of its own, evaluating leaves training as it is.
    examples: Any = task.eval_set
    loader: DataLoader = DataLoader(examples, batch_size, collate_fn=task.collate, generator=torch.Generator())
    try:
        return task.evaluate(model, loader)
    except FloatingPointError as error:
        raise diverged(str(error), step, folder) from error
    finally:
        reshard(model)


def _importance(method: Method, task: Task, count: int, device: torch.device) -> dict[str, float | None] | None:
    """Return what `Method.importance` measures on the first evaluation examples; None if not asked."""
    if not count:
        return None
    batch = send_to_device(task.collate([task.eval_set[i] for i in range(min(count, len(task.eval_set)))]), device)
    found = method.importance(lambda: task.loss(method.model, batch))
    reshard(method.model)
    return found


def _check_frozen(model: nn.Module, base: dict[str, str]) -> None:
    """Refuse to export an adapter whose base is no longer the one that everybody else has."""
    inside = model.get_base_model() if isinstance(model, PeftModel) else model
    if wrong := changed(base, fingerprint(inside, frozen=True, gather=True)):
        raise RuntimeError(
            f"{len(wrong)} frozen weights of the base model changed in training, first {wrong[0]}: the adapter would "
            "not fit the base that others load. Something other than the optimizer writes into the model; the "
            "checkpoints are kept"
        )
