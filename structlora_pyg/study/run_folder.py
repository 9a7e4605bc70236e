"""The folder of a run: its rules, its log, and checkpoints that are either complete or not there.

A checkpoint is written beside its place, flushed and renamed, so that a run killed at any moment resumes from the last
one. It holds what the method trains, optimizer, schedule, loss scale, and the state of every random generator.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import random
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from filelock import FileLock, Timeout
from peft import LoraConfig
from safetensors import SafetensorError

from structlora_pyg.checks import ConfigError, check_writable, replace_file, short
from structlora_pyg.study.config import SECTIONS, RunConfig, flat, parse_config
from structlora_pyg.study.methods import Method

CONFIG_FILE = "config.json"
LOCK_FILE = ".lock"
METRICS_FILE = "metrics.jsonl"
RESULTS_FILE = "results.json"
STATE_FILE = "trainer.pt"
GRAPHS_FOLDER = "graphs"
LOGS_FOLDER = "logs"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class CheckpointError(RuntimeError):
    """A checkpoint that is missing, damaged, cannot be written, or does not belong to this run."""


def check_folder(folder: Path, settings: Mapping[str, Any], resume: bool) -> None:
    """Refuse before any work what would overwrite a run or continue another one; see `train` for the errors."""
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"train.output_dir={str(folder)!r} is a file; give a folder")
    if (folder / RESULTS_FILE).exists():
        raise FileExistsError(f"{folder} holds a finished run ({RESULTS_FILE}); choose another train.output_dir")
    begun = (folder / CONFIG_FILE).exists() or bool(checkpoints(folder))
    if begun and not resume:
        raise FileExistsError(
            f"{folder} holds an unfinished run; continue it with --resume, or choose another train.output_dir"
        )
    if resume and not begun:
        raise CheckpointError(f"{folder} holds no run to resume; start without --resume")
    if not resume:
        check_writable(folder, "train.output_dir")
        folder.mkdir(parents=True, exist_ok=True)
        return
    try:
        before, now = flat(config_to_dict(stored_config(folder))), flat(settings)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{error}; start without --resume, in another train.output_dir") from error
    keys = sorted(k for k in before.keys() | now.keys() if before.get(k) != now.get(k) and k != "train.output_dir")
    if keys:
        raise ConfigError(
            [f"{k}: the run in {folder} was started with {before.get(k)!r}, not {now.get(k)!r}" for k in keys]
        )


def stored_config(folder: str | Path) -> RunConfig:
    """Return the configuration that a run keeps in its folder, what is new since at its default.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is damaged, another program's, or does not fit this version.
    """
    file = Path(folder) / CONFIG_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; give the train.output_dir of a run of structlora train")
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
        config, found = parse_config(RunConfig, tree)
        found += [] if {"method", "train", "adapter"} <= tree.keys() else ["it lacks sections of a run"]
    except (OSError, ValueError, AttributeError) as error:
        found = [short(error)]
    if found:
        raise ValueError(f"{file} is damaged, another program's, or of another version: {found[0]}")
    return config


def config_to_dict(config: RunConfig) -> dict[str, Any]:
    """Return a configuration as plain values; of PEFT's own settings only those that are not the default."""
    default, lora = LoraConfig(), config.adapter.to_lora_config()
    names = [f.name for f in dataclasses.fields(LoraConfig) if f.init]
    changed = {n: getattr(lora, n) for n in names if getattr(lora, n) != getattr(default, n)}
    sections = {name: dataclasses.asdict(getattr(config, name)) for name in SECTIONS}
    return json.loads(to_json({**sections, "adapter": {**changed, **config.adapter.own_fields()}}))


def to_json(value: Any) -> str:
    """Return JSON text with a final newline; sets become sorted lists, what else JSON has no form for becomes text."""
    return json.dumps(value, indent=2, allow_nan=False, default=_plain) + "\n"


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, (set, frozenset)) else str(value)


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder with a lock, or raise a `FileExistsError` if one trains in it already."""
    try:
        with FileLock(folder / LOCK_FILE, timeout=0):
            yield
    except Timeout:
        raise FileExistsError(
            f"another process trains in {folder}; wait for it, or choose another train.output_dir"
        ) from None


@contextlib.contextmanager
def full_disk_said(folder: Path) -> Iterator[None]:
    """Turn the error of a full disk into a `CheckpointError` that says how to go on."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise CheckpointError(
            f"{folder}: the disk is full ({short(error)}); its checkpoints are untouched. Free some space and continue "
            "with --resume"
        ) from error


class Log:
    """``metrics.jsonl`` and the trackers: a line for every step, look at the structure and evaluation, written at once.

    Args:
        folder: Folder of the run.
        accelerator: Its main process writes; its trackers get the numbers of every line.
        keep: Lines of later steps, written after the checkpoint the run continues from, are dropped.
    """

    def __init__(self, folder: Path, accelerator: Accelerator, keep: int) -> None:
        self.file, self.accelerator = folder / METRICS_FILE, accelerator
        kept = [line for line in read_lines(self.file) if line["step"] <= keep]
        if accelerator.is_main_process:
            replace_file(self.file, "".join(json.dumps(line) + "\n" for line in kept))

    def write(self, step: int, **values: Any) -> None:
        """Append one line."""
        if self.accelerator.is_main_process:
            with self.file.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps({"step": step, **values}, allow_nan=False) + "\n")
        self.accelerator.log(scalars(values), step=step)


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Return the lines of a log; one that a crash cut short can only be the last and is left out."""
    found: list[dict[str, Any]] = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return found


def scalars(values: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a line of the log by their path: ``evaluation/accuracy``, ``structure/dirichlet/0``, ..."""
    lists = {k: dict(enumerate(v)) if isinstance(v, (list, tuple)) else v for k, v in flat(values).items()}
    return {k.replace(".", "/"): v for k, v in flat(lists).items() if isinstance(v, (int, float))}


def remove_leftovers(folder: Path) -> None:
    """Remove what `replace_file` left in a folder when its process was killed; nobody else may write there."""
    for file in folder.glob(".*.tmp"):
        if file.is_file():
            file.unlink()


def checkpoints(folder: Path) -> list[Path]:
    """Return the finished checkpoints, oldest first."""
    found = [(int(m[1]), p) for p in folder.glob("checkpoint-*") if (m := re.fullmatch(r"checkpoint-(\d+)", p.name))]
    return [path for _, path in sorted(found)]


def newest_checkpoint(folder: Path) -> Path:
    """Return the newest checkpoint, or raise a `CheckpointError` if there is none."""
    if found := checkpoints(folder):
        return found[-1]
    raise CheckpointError(
        f"{folder} holds a run that stopped before its first checkpoint; delete it or choose another train.output_dir, "
        "and start without --resume"
    )


def save_checkpoint(
    folder: Path, step: int, accelerator: Accelerator, keep: int, method: Method, optimizer: Any, scheduler: Any
) -> None:
    """Write ``checkpoint-<step>``, complete or not at all; then remove the oldest ones but `keep`.

    Raises:
        CheckpointError: If the disk does not take it.
        FloatingPointError: If weights are not finite.
    """
    final, temporary = folder / f"checkpoint-{step}", folder / f".checkpoint-{step}.tmp"
    main = accelerator.is_main_process
    try:
        if main:
            for stale in folder.glob(".checkpoint-*.tmp"):  # of a run that was killed
                shutil.rmtree(stale)
            temporary.mkdir()
        accelerator.wait_for_everyone()
        torch.save(_random_state(), temporary / f"random-{accelerator.process_index}.pt")
        if main:
            method.save(temporary)
            parts = {"optimizer": optimizer, "scheduler": scheduler, "scaler": accelerator.scaler}
            state = {name: None if part is None else part.state_dict() for name, part in parts.items()}
            torch.save({"step": step, "processes": accelerator.num_processes, **state}, temporary / STATE_FILE)
        accelerator.wait_for_everyone()
        if main:
            for path in (*temporary.rglob("*"), temporary):
                _flush(path)
            temporary.rename(final)
            _flush(folder)
            for old in checkpoints(folder)[:-keep]:
                shutil.rmtree(old)
    except ValueError as error:  # the method refuses to write factors that are not finite
        raise diverged(str(error), step, folder) from error
    except (OSError, RuntimeError, SafetensorError) as error:  # what a full disk raises depends on who writes
        raise CheckpointError(
            f"{final} could not be written ({short(error)}); earlier checkpoints are untouched. Free some space and "
            "continue with --resume"
        ) from error
    finally:
        if main:
            shutil.rmtree(temporary, ignore_errors=True)
    accelerator.wait_for_everyone()


def load_checkpoint(checkpoint: Path, accelerator: Accelerator, method: Method, optimizer: Any, scheduler: Any) -> int:
    """Restore everything and return the number of finished optimizer steps.

    Raises:
        CheckpointError: If it is damaged, or was written by another number of processes.
    """
    state = load_state(checkpoint / STATE_FILE)
    if state["processes"] != accelerator.num_processes:
        raise CheckpointError(
            f"{checkpoint} was written by {state['processes']} processes, this run has {accelerator.num_processes}: "
            "the order of the data would change. Launch as many as before"
        )
    try:
        method.load(checkpoint)
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(state["scaler"])
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise _damaged(checkpoint, error) from error
    _set_random_state(load_state(checkpoint / f"random-{accelerator.process_index}.pt"))
    return int(state["step"])


def load_state(file: Path) -> dict[str, Any]:
    """Return a file of a checkpoint without running code in it, or raise a `CheckpointError` if it is damaged."""
    try:
        return dict(torch.load(file, map_location="cpu", weights_only=True))
    except Exception as error:  # torch.load raises anything on a damaged file
        raise _damaged(file, error) from error


def _damaged(file: Path, error: BaseException) -> CheckpointError:
    folder = next((p for p in (file, *file.parents) if p.name.startswith("checkpoint-")), file)
    return CheckpointError(
        f"{file} is missing or damaged ({short(error)}). Delete {folder} to resume from the checkpoint before it, or "
        "start without --resume in another train.output_dir"
    )


def _flush(path: Path) -> None:
    """Force a file or a folder's entries to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _random_state() -> dict[str, Any]:
    """Return the state of every generator that training draws from, in types a safe load accepts."""
    kind, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy(), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])


def diverged(what: str, step: int, folder: Path) -> FloatingPointError:
    """Return the error of a run that stopped being finite; it names the checkpoint to go back to."""
    kept = checkpoints(folder)
    last = f"the last checkpoint is {kept[-1]}" if kept else "no checkpoint was written yet"
    return FloatingPointError(
        f"optimizer step {step}: {what}; {last}. Lower train.lr, raise train.warmup_ratio, or use "
        "model.dtype=float32 with train.mixed_precision=no"
    )
