"""The training loop: `train` runs a configuration to its exported adapter; the rest of the file is its tools.

A run is a folder: ``config.json``, ``metrics.jsonl`` (a line for every step and evaluation), ``checkpoint-<step>/``,
``graphs/`` and ``logs/`` if asked for, and at the end ``results.json`` and ``adapter/`` (``model/`` for full
fine-tuning). An interrupted run that is resumed ends with the same weights, bit for bit, as one that was left alone;
on a GPU as far as its kernels are deterministic.
"""

from __future__ import annotations

import contextlib
import copy
import math
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState
from accelerate.utils import ProjectConfiguration, set_seed
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import get_scheduler

from structlora_pyg.analysis.importance import direction_importance
from structlora_pyg.analysis.structure import StructureRecorder
from structlora_pyg.checks import ConfigError
from structlora_pyg.config import StructLoraConfig
from structlora_pyg.files import remove_leftovers, replace_file
from structlora_pyg.study.batches import Order, accumulate_gradients, first_batches, moved_to
from structlora_pyg.study.checkpoints import (
    diverged,
    full_disk_said,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
)
from structlora_pyg.study.methods import Method, make_method
from structlora_pyg.study.results import results
from structlora_pyg.study.run_checks import check_against_task, check_frozen, check_run, check_trainable
from structlora_pyg.study.run_config import RunConfig
from structlora_pyg.study.run_folder import (
    GRAPHS_FOLDER,
    RESULTS_FILE,
    Log,
    alone_in,
    check_folder,
    config_to_dict,
    start_run,
    to_json,
)
from structlora_pyg.study.sharding import reshard, shard, sharding_problems
from structlora_pyg.study.tasks.registry import Task, load_task
from structlora_pyg.study.tracking import LOGS_FOLDER, scalars, tracking
from structlora_pyg.tuner.alarms import TrainingAlarms, first_not_finite
from structlora_pyg.tuner.fingerprint import fingerprint
from structlora_pyg.tuner.model import StructLoraModel
from structlora_pyg.tuner.optim import set_head_rate
from structlora_pyg.tuner.recorder import GraphRecorder

PARALLEL = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
SKIPPED_IN_A_ROW = 10  # steps without a finite gradient, after which train.nonfinite=skip gives up


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
        ``export``, ``versions``, ``config``; see `structlora_pyg.study.results`.

    Raises:
        ConfigError: If the configuration has problems, or differs from that of the run to be resumed.
        FileExistsError: If the folder holds a run and `resume` is False, or a finished one.
        CheckpointError: If there is no checkpoint to resume from, the newest one is damaged, or the disk is full.
        DataError, ModelError: See `structlora_pyg.study.tasks.registry.load_task`.
        FloatingPointError: If loss or gradient stop being finite; the checkpoints written so far stay.
    """
    settings = config.train
    check_run(config)
    folder = Path(settings.output_dir)
    check_folder(folder, config, resume)
    accelerator = _accelerator(config, folder)
    with alone_in(folder) if accelerator.is_main_process else contextlib.nullcontext():
        check_folder(folder, config, resume)  # once more, now that nobody else can change it
        with full_disk_said(folder):
            return _train(config, folder, newest_checkpoint(folder) if resume else None, accelerator, progress)


def _train(
    config: RunConfig, folder: Path, checkpoint: Path | None, accelerator: Accelerator, progress: bool
) -> dict[str, Any]:
    settings = config.train
    accelerator.wait_for_everyone()  # nobody writes before everybody has looked
    task = load_task(config.model, config.data, settings.seed)
    base_parameters = sum(p.numel() for p in task.model.parameters())
    base = fingerprint(task.model, leave_out=task.head)
    sharded = accelerator.is_fsdp2  # asked before prepare(), after which Accelerate may have forgotten it
    if not sharded:  # one device need not have room for a base that is to be sharded
        task.model.to(accelerator.device)
    own = set(task.model.parameters())
    method, order, total = _adapt(config, task, accelerator.num_processes)
    core = method.model
    optimizer: Any = method.optimizer(settings.lr, settings.weight_decay)
    if settings.head_lr is not None and task.head:
        set_head_rate(optimizer, core, task.head, settings.head_lr)
    scheduler = get_scheduler(settings.lr_scheduler, optimizer, math.ceil(settings.warmup_ratio * total), total)
    if sharded:
        model, optimizer = shard(accelerator, core, own, optimizer)
    else:
        model, optimizer = accelerator.prepare(core, optimizer)
    # A loader draws a number for its workers; from a generator of its own, evaluating leaves training as it is.
    eval_loader: DataLoader = DataLoader(
        task.eval_set, settings.eval_batch_size, collate_fn=task.collate, generator=torch.Generator()
    )
    evaluate = partial(_evaluate, task, method.predictor(model), eval_loader, folder)
    parts: dict[str, Any] = {"method": method, "optimizer": optimizer, "scheduler": scheduler}

    set_seed(settings.seed, device_specific=True)
    first = 0 if checkpoint is None else load_checkpoint(checkpoint, accelerator, **parts)
    if checkpoint is None and accelerator.is_main_process:
        start_run(folder, config)
    log = Log(folder, accelerator.is_main_process, keep=first)
    metrics: dict[str, float] | None = None
    quiet = not accelerator.is_main_process or not progress
    watch = StructureRecorder(core) if settings.watch_every else None
    ours = isinstance(core, StructLoraModel)
    alarms = core.hooks.alarms if ours else TrainingAlarms(core, config.adapter.alarms)
    skipped = 0
    main, every = accelerator.is_main_process, settings.record_every
    recorder = GraphRecorder(core, folder / GRAPHS_FOLDER) if every and main else None

    def write(step: int, **values: Any) -> None:
        log.write(step=step, **values)
        accelerator.log(scalars(values), step=step)

    bar = tqdm(total=total, initial=first, desc="training", unit="step", disable=quiet)
    with tracking(accelerator, folder, config_to_dict(config), first), bar:
        for step in range(first, total):
            model.train()
            method.keep_statistics()
            watching = watch is not None and _due(step + 1, settings.watch_every, total)
            if watch is not None and watching:
                watch.open()
            began = time.perf_counter()
            losses = accumulate_gradients(method, task, model, accelerator, order.step(step), settings.batch_size)
            norm = float(accelerator.clip_grad_norm_(core.parameters(), settings.max_grad_norm))
            done, rate = step + 1, optimizer.param_groups[0]["lr"]
            if broken := _not_finite(losses["loss"], norm, accelerator, core):
                skipped += 1
                if settings.nonfinite == "stop" or skipped > SKIPPED_IN_A_ROW:
                    raise diverged(broken, done, folder)
                alarms.give(f"optimizer step {done}: {broken}; skipped, as train.nonfinite=skip says", may_stop=False)
            else:
                skipped = 0
            if not broken or accelerator.scaler is not None:  # a scaler skips the step itself, and has to be asked
                optimizer.step()
            if not optimizer.step_was_skipped:
                scheduler.step()
            optimizer.zero_grad()
            alarms.after_step()

            write(
                step=done,
                epoch=done / order.steps_per_epoch,
                **{name: value if math.isfinite(value) else None for name, value in losses.items()},
                grad_norm=norm if math.isfinite(norm) else None,
                lr=rate,
                seconds=time.perf_counter() - began,
            )
            if watch is not None and watching:
                write(step=done, structure=watch.read())
            if recorder is not None and _due(done, every, total):
                recorder.record(done)
            bar.set_postfix({name: f"{value:.4f}" for name, value in losses.items()}, refresh=False)
            bar.update()
            if _due(done, settings.eval_every, total):
                metrics = evaluate(done)
                write(step=done, evaluation=metrics)
            if _due(done, settings.save_every, total):
                save_checkpoint(folder, done, accelerator, settings.keep_checkpoints, **parts)

    if metrics is None:  # resumed from the last checkpoint: the loop had nothing left to do
        metrics = evaluate(total)
    # On all processes: a sharded base is there only where all of them work together.
    check_frozen(method, base)
    accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # what a direction is worth drowns in bfloat16
    importance = _importance(method, task, settings.importance_examples, accelerator.device)
    accelerator.wait_for_everyone()
    found: dict[str, Any] = {}
    if accelerator.is_main_process:
        for place in (folder, folder / method.folder):
            remove_leftovers(place)
        exported = method.export(folder / method.folder)
        task.save_extras(folder / method.folder)
        found = results(config, accelerator, task, method, base_parameters, log.lines(), metrics, exported, importance)
        found["alarms"] = alarms.given
        replace_file(folder / RESULTS_FILE, to_json(found))
        if progress:
            accelerator.print(f"{task.metric} {metrics[task.metric]:.4f} after {total} steps")
            accelerator.print(f"results: {folder / RESULTS_FILE}")
            accelerator.print(f"{method.folder}: {folder / method.folder}")
    accelerator.wait_for_everyone()
    return found


def restore(config: RunConfig, checkpoint: Path) -> tuple[Task, Method]:
    """Return task and method of a run as they were at a checkpoint, on the CPU.

    Args:
        config: Configuration of the run.
        checkpoint: A folder ``checkpoint-<step>`` of it.

    Raises:
        ConfigError, DataError, ModelError: As `train`.
        FileNotFoundError, ValueError: If the checkpoint does not fit the configuration.
    """
    check_run(config)
    task = load_task(config.model, config.data, config.train.seed)
    method, _, _ = _adapt(config, task)
    method.optimizer(config.train.lr, config.train.weight_decay)
    method.load(checkpoint)
    method.model.eval()
    return task, method


def with_head(adapter: StructLoraConfig, head: tuple[str, ...]) -> StructLoraConfig:
    """Return a copy that also trains and saves the head."""
    changed = copy.copy(adapter)
    changed.modules_to_save = list(dict.fromkeys([*(adapter.modules_to_save or []), *head])) or None
    return changed


def _adapt(config: RunConfig, task: Task, processes: int = 1) -> tuple[Method, Order, int]:
    """Return the method, its model built, the order of the data and the number of optimizer steps."""
    settings = config.train
    per_step = settings.batch_size * settings.gradient_accumulation_steps * processes
    order = Order(len(task.train_set), per_step, settings.seed)
    total = settings.max_steps or math.ceil(settings.epochs * order.steps_per_epoch)
    method = make_method(with_head(config.adapter, task.head), config.method, total)
    check_against_task(config, method, task, total)
    if settings.gradient_checkpointing:
        task.enable_gradient_checkpointing()
    set_seed(settings.seed)
    batches = partial(first_batches, task, order, settings.batch_size)
    check_trainable(method.adapt(task.model, partial(batches, False), partial(batches, True)))
    return method, order, total


def _not_finite(loss: float, norm: float, accelerator: Accelerator, model: nn.Module) -> str | None:
    """Say what is not finite, and where it begins; None if all is well."""
    # The loss scaling of fp16 overflows now and then: the step is skipped and the scale halved, until it cannot be.
    scaling = accelerator.scaler is not None and accelerator.scaler.get_scale() > 1
    if math.isfinite(loss) and (math.isfinite(norm) or scaling):
        return None
    what = f"the gradient norm is {norm}" if math.isfinite(loss) else f"the loss is {loss}"
    return f"{what} (first: {first_not_finite(model)})"


def _evaluate(task: Task, model: nn.Module, loader: DataLoader, folder: Path, step: int) -> dict[str, float]:
    try:
        return task.evaluate(model, loader)
    except FloatingPointError as error:
        raise diverged(str(error), step, folder) from error
    finally:
        reshard(model)


def _accelerator(config: RunConfig, folder: Path) -> Accelerator:
    # Accelerate keeps one state a process and refuses to change its precision; a second run may need another one.
    AcceleratorState._reset_state()
    places = ProjectConfiguration(str(folder), str(folder / LOGS_FOLDER))
    precision, trackers = config.train.mixed_precision, list(config.train.trackers)
    accelerator = Accelerator(mixed_precision=precision, log_with=trackers or None, project_config=places)
    kind = accelerator.distributed_type
    if kind == DistributedType.FSDP:
        found = sharding_problems(accelerator, config)
    else:
        known = "structlora train knows DDP and FSDP2, which saves what ZeRO-3 saves (docs/guides/devices.md)"
        found = [] if kind in PARALLEL else [f"accelerate is set up for {kind}; {known}"]
    if accelerator.mixed_precision != precision:
        found.append(f"train.mixed_precision={precision} has no effect on several processes of a CPU; set it to no")
    if found:
        raise ConfigError(found)
    return accelerator


def _importance(method: Method, task: Task, count: int, device: torch.device) -> dict[str, float | None] | None:
    """Return how gates, norms and first-order estimates rank directions against their removal; None if not asked."""
    if not count:
        return None
    examples = [task.eval_set[i] for i in range(min(count, len(task.eval_set)))]
    batch = moved_to(task.collate(examples), device)
    found = direction_importance(method.model, lambda: task.loss(method.model, batch)).correlations()
    reshard(method.model)
    return found


def _due(step: int, every: int, total: int) -> bool:
    return step == total or (every > 0 and step % every == 0)
