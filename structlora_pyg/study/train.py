"""The training loop: `train` runs a configuration to its exported adapter.

A run is a folder: ``config.json``, ``metrics.jsonl`` (a line for every step and evaluation), ``checkpoint-<step>/``,
``graphs/`` and ``logs/`` if asked for, and at the end ``results.json`` and ``adapter/`` (``model/`` for full
fine-tuning). An interrupted run that is resumed ends with the same weights, bit for bit, as one that was left alone;
on a GPU as far as its kernels are deterministic.
"""

from __future__ import annotations

import contextlib
import copy
import math
import platform
import shutil
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from peft import PeftModel
from torch import nn
from tqdm import tqdm

from structlora_pyg.analysis.structure import StructureRecorder
from structlora_pyg.checks import replace_file
from structlora_pyg.study.config import RunConfig
from structlora_pyg.study.distributed import make_accelerator, tracking
from structlora_pyg.study.methods import METHODS
from structlora_pyg.study.run import Run, check_run
from structlora_pyg.study.run_folder import (
    CONFIG_FILE,
    GRAPHS_FOLDER,
    RESULTS_FILE,
    Log,
    alone_in,
    check_folder,
    config_to_dict,
    diverged,
    full_disk_said,
    load_checkpoint,
    newest_checkpoint,
    read_lines,
    remove_leftovers,
    save_checkpoint,
    to_json,
)
from structlora_pyg.study.tasks import TASKS
from structlora_pyg.tuner.alarms import first_not_finite
from structlora_pyg.tuner.fingerprint import changed, fingerprint
from structlora_pyg.tuner.recorder import GraphRecorder

PACKAGES = ("structlora-pyg", "torch", "torch-geometric", "peft", "transformers", "timm", "accelerate")
CURVE_POINTS = 100  # a longer curve is averaged over stretches of equal length
LESSON = 3  # training steps that a lesson of the noise levels takes
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
        config: What to train, see `structlora_pyg.study.config.load_config`.
        resume: Continue the unfinished run in ``config.train.output_dir`` from its newest checkpoint.
        progress: Show a progress bar and print where the results are.

    Returns:
        The content of ``results.json``: ``method``, ``metrics`` of the final evaluation, ``metric`` (the primary one's
        name), ``parameters``, ``seconds``, ``losses``, ``curves``, ``structure``, ``gates``, ``importance``,
        ``export``, ``versions``, ``config``.

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
        return _trained(Run(config, accelerator), stored, checkpoint, progress)


def _trained(run: Run, stored: dict[str, Any], checkpoint: Path | None, progress: bool) -> dict[str, Any]:
    """Train, and write what is left."""
    settings, folder, accelerator, order, total = run.config.train, run.folder, run.accelerator, run.order, run.total
    method, model, optimizer, main = run.method, run.model, run.optimizer, accelerator.is_main_process
    set_seed(settings.seed, device_specific=True)
    state: dict[str, Any] = {"method": method, "optimizer": optimizer, "scheduler": run.scheduler}
    first = 0 if checkpoint is None else load_checkpoint(checkpoint, accelerator, **state)
    if checkpoint is None and main:
        replace_file(folder / CONFIG_FILE, to_json(stored))
    log = Log(folder, accelerator, keep=first)
    alarms = method.alarms(run.config.adapter.alarms)
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
            losses = run.gradients(order.step(step - 1))
            norm = float(accelerator.clip_grad_norm_(method.model.parameters(), settings.max_grad_norm))
            rate = optimizer.param_groups[0]["lr"]
            if broken := _not_finite(losses["total"], norm, accelerator, method.model):
                raise diverged(broken, step, folder)
            optimizer.step()
            if not optimizer.step_was_skipped:
                run.scheduler.step()
            optimizer.zero_grad()
            alarms.after_step()
            lowest = min(lowest, losses["loss"])
            if losses["loss"] > 1000 * max(lowest, 1.0):
                alarms.give(DIVERGES, step)
            if step <= order.returned and not run.sharded:
                # Of the next step: the loss of examples that were just trained on always asks for more noise.
                unseen = order.unseen(step - 1, settings.batch_size)
                method.teach(step, *run.losses_on(order.step(step)[::2], unseen))

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
                metrics = run.evaluate(step)
                log.write(step, evaluation=metrics)
            if _due(step, settings.save_every, total):
                save_checkpoint(folder, step, accelerator, settings.keep_checkpoints, **state)

    if not metrics:  # resumed from the last checkpoint: the loop had nothing left to do
        metrics = run.evaluate(total)
    # On all processes: a sharded base is there only where all of them work together.
    _check_frozen(method.model, run.base)
    accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # what a direction is worth drowns in bfloat16
    ranking = run.importance()
    accelerator.wait_for_everyone()
    left: dict[str, Any] = {}
    if main:
        for place in (folder, folder / method.folder):
            remove_leftovers(place)
        summary = _summary(run, stored, read_lines(log.file))
        parameters = {**method.parameter_counts(), "base": run.base_parameters}
        exported = method.export(folder / method.folder)
        run.task.save_extras(folder / method.folder)
        left = {
            **summary, "metrics": metrics, "parameters": parameters, "importance": ranking, "export": exported,
            "processes": accelerator.num_processes, "alarms": alarms.given,
        }  # fmt: skip
        replace_file(folder / RESULTS_FILE, to_json(left))
        if progress:
            lines = (f"results: {folder / RESULTS_FILE}", f"{method.folder}: {folder / method.folder}")
            accelerator.print(f"{run.task.metric} {metrics[run.task.metric]:.4f} after {total} steps", *lines, sep="\n")
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


def _check_frozen(model: nn.Module, base: dict[str, str]) -> None:
    """Refuse to export an adapter whose base is no longer the one that everybody else has."""
    inside = model.get_base_model() if isinstance(model, PeftModel) else model
    if wrong := changed(base, fingerprint(inside, frozen=True, gather=True)):
        raise RuntimeError(
            f"{len(wrong)} frozen weights of the base model changed in training, first {wrong[0]}: the adapter would "
            "not fit the base that others load. Something other than the optimizer writes into the model; the "
            "checkpoints are kept"
        )


def _summary(run: Run, stored: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what can be told from a trained run and the lines of its log."""
    steps = [line for line in lines if "seconds" in line]
    seconds = [line["seconds"] for line in steps]
    found, gates, device = run.method.structure(), run.method.gates(), run.accelerator.device
    cuda = device.type == "cuda"
    names, ends = ("loss", "auxiliary", "total"), [steps[0], steps[-1]] if steps else []
    return {
        "method": run.method.name,
        "metric": run.task.metric,
        "higher_is_better": run.task.higher_is_better,
        "steps": len(steps),
        "losses": {when: {n: line[n] for n in names} for when, line in zip(("first", "last"), ends, strict=False)},
        "seconds": {"per_step_median": statistics.median(seconds) if seconds else None, "training": sum(seconds)},
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if cuda else None,
        "curves": _curves(lines, steps),
        "structure": found
        and {"names": found.names, "similarity": _rounded(found.similarity.tolist()), **found.numbers()},
        "gates": gates and {**gates, "values": _rounded(gates["values"])},
        "device": torch.cuda.get_device_name() if cuda else f"{device.type}, threads: {torch.get_num_threads()}",
        "versions": {
            "python": platform.python_version(),
            **{name: installed(name) or "not installed" for name in PACKAGES},
        },
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


def _rounded(matrix: list[list[float]]) -> list[list[float]]:
    return [[round(value, 5) for value in row] for row in matrix]


def installed(package: str) -> str | None:
    """Return the version of a package; None if it is not installed."""
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return None


def smoke(config: RunConfig) -> RunConfig:
    """Return three steps of a run on a few examples, in ``<output_dir>-smoke``, from which an older one is removed."""
    run = copy.deepcopy(config)
    if not TASKS[run.data.task].brings_data:
        run.data = replace(run.data, train_limit=16, eval_limit=8, train_fraction=1.0)
    settings, schedule = run.train, run.adapter.schedule
    schedule.warmup_steps, schedule.ramp_steps = min(schedule.warmup_steps, 1), min(schedule.ramp_steps, 1)
    if METHODS[run.method.name].is_structlora:
        run.method.teach_every = 2
    run.train = replace(
        settings, output_dir=f"{settings.output_dir}-smoke", max_steps=3, batch_size=min(settings.batch_size, 2),
        eval_batch_size=min(settings.eval_batch_size, 4), gradient_accumulation_steps=1, eval_every=0, save_every=0,
        watch_every=min(settings.watch_every, 1), record_every=min(settings.record_every, 1),
        importance_examples=min(settings.importance_examples, 2),
    )  # fmt: skip
    if (Path(run.train.output_dir) / "config.json").is_file():
        shutil.rmtree(run.train.output_dir)
    return run


def estimate(config: RunConfig) -> str:
    """Return what a run will take, from its first steps with everything at work; nothing is written.

    Raises:
        ConfigError, DataError, ModelError: As `train`.
    """
    check_run(config)
    run = copy.deepcopy(config)
    run.adapter.schedule.warmup_steps = min(run.adapter.schedule.warmup_steps, 1)
    parts = Run(run, make_accelerator(run))
    order, total, device = parts.order, parts.total, parts.accelerator.device
    parts.model.train()
    times = []
    for step in range(min(total, 4)):  # the first one or two also set things up
        began = time.perf_counter()
        parts.gradients(order.step(step))
        parts.optimizer.step()
        parts.optimizer.zero_grad()
        times.append(time.perf_counter() - began)
    seconds = sum(times[-2:]) / len(times[-2:])
    whole = total * seconds * (1 + LESSON / run.method.teach_every * order.returned / total)
    import resource  # not on Windows, where all else works

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if on_gpu := device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    return (
        f"about {timedelta(seconds=math.ceil(whole))} for {total} steps of {seconds:.2g} s, and {peak / 1e9:.2g} GB of "
        f"{'GPU ' * on_gpu}memory; estimated from two steps on {device}, evaluation not counted"
    )
