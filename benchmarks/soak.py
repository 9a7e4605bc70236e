"""Does anything grow in a long training? Memory, open files and step time, over an hour.

    python benchmarks/soak.py --minutes 60 --json benchmarks/results/soak.json

A round is: 20 optimizer steps with the edges refreshed every 10, an evaluation, 32 generated tokens, a checkpoint. The
model is stories260K with StructLoRA on all linear layers ($STRUCTLORA_DATA/stories260k). Slopes are fitted over the
rounds after the first tenth; memory and open files are those of the process at the end of a round.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from structlora_pyg import StructLoraConfig, get_structlora_model, parameter_groups

PAGE = os.sysconf("SC_PAGE_SIZE")


def soak(path: Path, minutes: float) -> dict[str, float]:
    """Return what the process used at the first and the last round, and the slopes in between."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(path)
    model = get_structlora_model(
        base, StructLoraConfig(r=8, lora_alpha=16, target_modules="all-linear", graph={"refresh_every": 10})
    )
    optimizer = torch.optim.AdamW(parameter_groups(model, 1e-3))
    rounds: list[tuple[float, float, int, float]] = []
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        while time.monotonic() - began < 60 * minutes:
            model.train()
            seconds = []
            for _ in range(20):
                start = time.perf_counter()
                ids = torch.randint(3, base.config.vocab_size, (4, 64))
                model(input_ids=ids, labels=ids).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                seconds.append(time.perf_counter() - start)
            model.eval()
            with torch.no_grad():
                model(input_ids=ids, labels=ids)
                model.generate(input_ids=ids[:1, :8], max_new_tokens=32, do_sample=False)
            model.save_pretrained(folder)
            memory = int(Path("/proc/self/statm").read_text().split()[1]) * PAGE / 2**20
            handles = len(os.listdir("/proc/self/fd"))
            rounds.append((time.monotonic() - began, memory, handles, statistics.median(seconds)))
    at, memory, handles, step = (np.array(column, dtype=float) for column in zip(*rounds, strict=True))
    tenth = max(1, len(rounds) // 10)
    late = slice(tenth, None)
    hours = at[late] / 3600
    return {
        "minutes": at[-1] / 60,
        "rounds": len(rounds),
        "optimizer_steps": 20 * len(rounds),
        "memory_mib_at_a_tenth": memory[late][0],
        "memory_mib_at_the_end": memory[-1],
        "memory_mib_per_hour": np.polyfit(hours, memory[late], 1)[0],
        "open_files_at_a_tenth": handles[late][0],
        "open_files_at_the_end": handles[-1],
        "step_time_last_tenth_over_first": np.median(step[-len(step) // 10 :])
        / np.median(step[late][: len(step) // 10]),
    }


def main() -> None:
    """Parse the command line and print the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--json", type=Path, help="file for the result")
    options = parser.parse_args()
    data = Path(os.environ.get("STRUCTLORA_DATA", "."))
    found = {name: round(float(value), 4) for name, value in soak(data / "stories260k", options.minutes).items()}
    text = json.dumps({**found, "torch": torch.__version__, "command": " ".join(["python", *sys.argv])}, indent=2)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
