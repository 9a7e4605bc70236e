"""Checkpoints that are either complete or not there: written beside their place, with a checksum a file.

A checkpoint holds what the method trains, optimizer, schedule, loss scale, and the state of every random generator.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors import SafetensorError

from structlora_pyg.files import short
from structlora_pyg.study.methods import Method

STATE_FILE = "trainer.pt"
MANIFEST_FILE = "manifest.json"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class CheckpointError(RuntimeError):
    """A checkpoint that is missing, damaged, cannot be written, or does not belong to this run."""


@contextlib.contextmanager
def full_disk_said(folder: Path) -> Iterator[None]:
    """Turn the error of a disk that is full into one that says how to go on.

    Raises:
        CheckpointError: If the disk is full.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise CheckpointError(
            f"{folder}: the disk is full ({short(error)}); its checkpoints are untouched. Free some space and continue "
            "with --resume"
        ) from error


def checkpoints(folder: Path) -> list[Path]:
    """Return the finished checkpoints, oldest first."""
    found = [(int(m[1]), p) for p in folder.glob("checkpoint-*") if (m := re.fullmatch(r"checkpoint-(\d+)", p.name))]
    return [path for _, path in sorted(found)]


def newest_checkpoint(folder: Path) -> Path:
    """Return the newest checkpoint, verified.

    Raises:
        CheckpointError: If there is none, or it is damaged.
    """
    found = checkpoints(folder)
    if not found:
        raise CheckpointError(
            f"{folder} holds a run that stopped before its first checkpoint; delete it or choose another "
            "train.output_dir, and start without resume"
        )
    verify_checkpoint(found[-1])
    return found[-1]


def save_checkpoint(
    folder: Path, step: int, accelerator: Accelerator, keep: int, method: Method, optimizer: Any, scheduler: Any
) -> None:
    """Write ``checkpoint-<step>`` beside its place, flush it, move it there; then remove the oldest ones.

    Raises:
        CheckpointError: If the disk does not take it.
        FloatingPointError: If weights are not finite.
    """
    final, temporary = folder / f"checkpoint-{step}", folder / f".checkpoint-{step}.tmp"
    try:
        if accelerator.is_main_process:
            for stale in folder.glob(".checkpoint-*.tmp"):  # of a run that was killed
                shutil.rmtree(stale)
            temporary.mkdir()
        accelerator.wait_for_everyone()
        torch.save(random_state(), temporary / f"random-{accelerator.process_index}.pt")
        if accelerator.is_main_process:
            method.save(temporary)
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
            (temporary / MANIFEST_FILE).write_text(json.dumps(sums, indent=2), encoding="utf-8")
            for path in (*temporary.rglob("*"), temporary):
                _flush(path)
            temporary.rename(final)
            _flush(folder)
            verify_checkpoint(final)  # read back, before an older one goes
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
        if accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
    accelerator.wait_for_everyone()


def verify_checkpoint(checkpoint: Path) -> None:
    """Compare every file with the sum written when the checkpoint was complete.

    Raises:
        CheckpointError: Naming the file that is missing or damaged.
    """
    manifest = checkpoint / MANIFEST_FILE
    try:
        sums = json.loads(manifest.read_text(encoding="utf-8"))
        for name, expected in sums.items():
            if not (checkpoint / name).resolve().is_relative_to(checkpoint.resolve()):
                raise _damaged(manifest, f"it names {name}, outside of the checkpoint")
            if _checksum(checkpoint / name) != expected:
                raise _damaged(checkpoint / name, "its checksum differs from the one written with it")
    except OSError as error:
        raise _damaged(Path(error.filename or manifest), error) from error
    except (ValueError, AttributeError) as error:
        raise _damaged(manifest, error) from error


def load_checkpoint(checkpoint: Path, accelerator: Accelerator, method: Method, optimizer: Any, scheduler: Any) -> int:
    """Restore everything and return the number of finished optimizer steps.

    Raises:
        CheckpointError: If it is damaged, or was written by another number of processes.
    """
    file = checkpoint / STATE_FILE
    state = _load(file)
    if state["processes"] != accelerator.num_processes:
        raise CheckpointError(
            f"{checkpoint} was written by {state['processes']} processes, this run has {accelerator.num_processes}: "
            "the order of the data would change. Launch as many as before"
        )
    try:
        method.load(checkpoint)
        optimizer.load_state_dict(state["optimizer"])
        for p, moments in optimizer.state.items():  # of the coordinator's gain, a scalar in release 0.1
            if isinstance(p, torch.Tensor) and p.shape == (1,):
                moments |= {n: v.reshape(1) for n, v in moments.items() if torch.is_tensor(v) and n != "step"}
        scheduler.load_state_dict(state["scheduler"])
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(state["scaler"])
    except (OSError, ValueError, KeyError) as error:
        raise _damaged(checkpoint, error) from error
    set_random_state(_load(checkpoint / f"random-{accelerator.process_index}.pt"))
    return int(state["step"])


def _load(file: Path) -> dict[str, Any]:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises anything on a damaged file
        raise _damaged(file, error) from error


def _damaged(file: Path, error: BaseException | str) -> CheckpointError:
    reason = error if isinstance(error, str) else short(error)
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


def random_state() -> dict[str, Any]:
    """Return the state of every generator that training draws from, in types a safe load accepts."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Restore what `random_state` returned."""
    random.setstate(state["python"])
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, keys.numpy(), position, has_gauss, gauss))
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
