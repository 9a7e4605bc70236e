"""Kill training at random moments, resume it, and compare what it ends with, bit for bit.

    python benchmarks/crash.py --config rte --kills 50 --json runs/crash.json train.max_steps=20 train.save_every=1

A run is made once without disturbance. Then it is made again and again, killed (SIGKILL) after a random time and
resumed from its newest checkpoint, until the given number of kills is spent. Every run that came to its end must have
the same last checkpoint (weights, gates, coordinator, edges, optimizer, schedule, state of the random generators) and
the same adapter, bit for bit. Takes any configuration of ``structlora train``.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from structlora_pyg.study.config import RunConfig, load_config
from structlora_pyg.study.run_folder import RESULTS_FILE, checkpoints, newest_checkpoint
from structlora_pyg.study.train import train


def crash(config: RunConfig, folder: Path, kills: int, seed: int = 0) -> dict[str, Any]:
    """Return how many kills there were, at which moments, and how many runs ended otherwise than undisturbed."""
    draw, whole = random.Random(seed), folder / "whole"
    began = time.perf_counter()
    _finish(_start(config, whole, resume=False))
    length, expected = time.perf_counter() - began, _content(whole)
    found = {"kills": 0, "before_first_checkpoint": 0, "while_writing_a_checkpoint": 0, "runs": 0, "different": 0}
    while found["kills"] < kills:
        run = folder / f"run-{found['runs']}"
        while not (run / RESULTS_FILE).exists():
            if run.exists() and not checkpoints(run):
                shutil.rmtree(run)  # what the error message of `train` tells the user to do
            child = _start(config, run, resume=run.exists())
            if found["kills"] >= kills:
                _finish(child)
                continue
            time.sleep(draw.uniform(0, length))
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            if os.WIFEXITED(status):  # it was faster
                assert os.WEXITSTATUS(status) == 0, f"resuming failed, see {run}.log"
                continue
            found["kills"] += 1
            found["before_first_checkpoint"] += not checkpoints(run)
            found["while_writing_a_checkpoint"] += bool(list(run.glob(".checkpoint-*.tmp")))
        found["runs"] += 1
        found["different"] += _content(run) != expected
        shutil.rmtree(run)
    return found


def _start(config: RunConfig, folder: Path, resume: bool) -> int:
    """Train in a child process; a fork, which spares it the seconds that the imports take."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with open(f"{folder}.log", "a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        settings = dataclasses.replace(config.train, output_dir=str(folder))
        train(dataclasses.replace(config, train=settings), resume=resume, progress=False)
        code = 0
    finally:
        os._exit(code)


def _finish(child: int) -> None:
    assert os.waitpid(child, 0)[1] == 0, "an undisturbed run failed; see the log in the folder of the runs"


def _content(run: Path) -> dict[str, str]:
    """Return a digest of everything in the last checkpoint and in the adapter."""
    files = [p for folder in (newest_checkpoint(run), run / "adapter") for p in sorted(folder.iterdir())]
    return {str(p.relative_to(run)): _digest(p) for p in files}


def _digest(file: Path) -> str:
    if file.suffix != ".pt":
        return hashlib.sha256(file.read_bytes()).hexdigest()
    # A pickle of the same values has other bytes where two equal strings are one object, or are not.
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, dict):
            value = list(value.items())
        if isinstance(value, (list, tuple)):
            for part in value:
                add(part)
        elif isinstance(value, torch.Tensor):
            digest.update(str(value.dtype).encode() + value.numpy().tobytes())
        else:
            digest.update(repr(value).encode())

    add(torch.load(file, weights_only=True))
    return digest.hexdigest()


def main() -> None:
    """Parse the command line and print the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a YAML file, or the name of a shipped configuration")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--folder", type=Path, default=Path("runs/crash"), help="is emptied first")
    parser.add_argument("--json", type=Path, help="file for the result")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args()
    shutil.rmtree(options.folder, ignore_errors=True)
    found = crash(load_config(options.config, options.overrides), options.folder, options.kills, options.seed)
    found["command"] = " ".join(["python", *sys.argv])
    text = json.dumps(found, indent=2)
    print(text)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(text + "\n")
    sys.exit(1 if found["different"] else 0)


if __name__ == "__main__":
    main()
