"""Does anything grow in a long training? Memory, open files and the time of a step, over an hour of `train`.

    python benchmarks/soak.py --minutes 60 --json benchmarks/results/soak.json --config stories \
        data.path=passages.txt data.max_length=64 data.eval_limit=16 adapter.target_modules=all-linear \
        adapter.graph.refresh_every=10 train.batch_size=4 train.eval_every=20 train.save_every=20

One run of any configuration of ``structlora train`` with the task ``text``, stopped when the time is over. After every
evaluation the model in training also generates 32 tokens, and its process is measured. The slope of the memory leaves
out the first tenth of the time, in which caches fill. Step times are those of ``metrics.jsonl``; time
on the processor is given besides, which other programs on the machine change less.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from structlora_pyg.study.config import RunConfig, load_config
from structlora_pyg.study.run_folder import METRICS_FILE
from structlora_pyg.study.tasks.language import LanguageTask
from structlora_pyg.study.train import train

PAGE = os.sysconf("SC_PAGE_SIZE")


class TimeIsOver(Exception):
    """Ends the run."""


def soak(config: RunConfig, folder: Path, minutes: float) -> dict[str, Any]:
    """Return what the process used in every tenth of the time, and how its memory grew."""
    rounds: list[tuple[float, float, int, float]] = []
    began = time.monotonic()
    plain = LanguageTask.evaluate

    def evaluate(task: LanguageTask, model: Any, loader: Any) -> dict[str, float]:
        found = plain(task, model, loader)
        model.eval()
        model.generate(input_ids=torch.tensor([task.eval_set[0]["input_ids"][:8]]), max_new_tokens=32, do_sample=False)
        memory = int(Path("/proc/self/statm").read_text().split()[1]) * PAGE / 2**20
        rounds.append((time.monotonic() - began, memory, len(os.listdir("/proc/self/fd")), time.process_time()))
        if rounds[-1][0] > 60 * minutes:
            raise TimeIsOver
        return found

    settings = dataclasses.replace(config.train, output_dir=str(folder), max_steps=10**9)
    with patch.object(LanguageTask, "evaluate", evaluate), contextlib.suppress(TimeIsOver):
        train(dataclasses.replace(config, train=settings), progress=False)
    lines = [json.loads(line) for line in (folder / METRICS_FILE).read_text(encoding="utf-8").splitlines()]
    seconds = [line["seconds"] for line in lines if "seconds" in line]
    at, memory, handles, processor = (np.array(column, dtype=float) for column in zip(*rounds, strict=True))
    late = slice(len(rounds) // 10, None)
    return {
        "minutes": at[-1] / 60,
        "optimizer_steps": len(seconds),
        "evaluations_and_generations": len(rounds),
        "memory_mib_by_tenth": by_tenth(memory),
        "memory_mib_per_hour": np.polyfit(at[late] / 3600, memory[late], 1)[0],
        "open_files_by_tenth": by_tenth(handles),
        "step_seconds_by_tenth": by_tenth(seconds),
        "processor_seconds_per_round_by_tenth": by_tenth(np.diff(processor)),
    }


def by_tenth(values: Sequence[float]) -> list[float]:
    """Return the median of every tenth; fewer parts where there are fewer values."""
    return [float(np.median(part)) for part in np.array_split(values, min(10, len(values)))]


def main() -> None:
    """Parse the command line and print the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="stories", help="a YAML file, or the name of a shipped configuration")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--json", type=Path, help="file for the result")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = soak(load_config(options.config, options.overrides), Path(folder), options.minutes)
    found = {name: np.round(value, 4).tolist() for name, value in found.items()}
    text = json.dumps({**found, "torch": torch.__version__, "command": " ".join(["python", *sys.argv])}, indent=2)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
