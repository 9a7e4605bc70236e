"""Training steps of StructLoRA against stock PEFT on a GPU, in less than ten minutes: the cells of `CELLS` in turn.

    python benchmarks/gpu.py --json benchmarks/results/gpu.json
    python benchmarks/gpu.py --tiny   # the same cells with tiny models, also without a GPU

Models have random weights in the shapes of Llama 7B and 1B and of ViT-B, in bfloat16, rank 8, about 4,096 tokens a
step. A cell that fails is noted with its error, and none begins once ``--minutes`` are over. `speed.py` measures other
shapes.
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from speed import DROPOUT, REFERENCE, measure, show
from timing import default_device, write_result

SHAPES: dict[str, dict[str, Any]] = {
    "Llama 7B": {"width": 4096, "layers": 32, "intermediate": 11008, "batch": 2, "tokens": 2048},
    "Llama 1B": {"width": 2048, "layers": 16, "intermediate": 8192, "batch": 2, "tokens": 2048},
    "ViT-B": {"model": "vit", "width": 768, "layers": 12, "intermediate": 3072, "batch": 21, "tokens": 197},
}
TINY = {"width": 64, "layers": 2, "intermediate": 128, "batch": 2, "tokens": 16}
TARGETS = ("q_proj,v_proj", "all-linear")
ALL = ("frozen base", REFERENCE, DROPOUT, "fused LoRA", "StructLoRA", "StructLoRA, messages of GCNConv")
FEW = (REFERENCE, "fused LoRA", "StructLoRA")
MODES: dict[str, dict[str, Any]] = {
    "eager": {},
    "CUDA graphs": {"graphs": True},
    "compiled": {"compile": True},
    "4 bit": {"quantized": True},
}
# What matters most comes first: the minutes may not be enough for all.
CELLS = [(shape, targets, "eager", ALL) for shape in SHAPES for targets in TARGETS]
CELLS += [("Llama 7B", targets, "4 bit", FEW) for targets in TARGETS]
CELLS += [(shape, "all-linear", "CUDA graphs", FEW) for shape in ("ViT-B", "Llama 1B")]
CELLS += [("Llama 1B", "all-linear", "compiled", FEW)]


def main() -> None:
    """Measure cell by cell; the file is written anew after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--tiny", action="store_true", help="tiny models, to try the script")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--minutes", type=float, default=9.5, help="no cell begins later")
    parser.add_argument("--json", type=Path, help="file to write the results to")
    options = parser.parse_args()
    if not options.tiny and not options.device.startswith("cuda"):
        parser.error("there is no GPU; --tiny tries the script with tiny models, speed.py measures on a processor")
    warnings.filterwarnings("ignore")
    began, tables = time.monotonic(), []
    for shape, targets, mode, systems in CELLS:
        if mode not in options.modes:
            continue
        if time.monotonic() - began > 60 * options.minutes:
            print(f"{shape}, {targets}, {mode}: not begun, {options.minutes:g} minutes are over")
            continue
        setting = {"compile": False, "checkpointing": False, "dtype": "bfloat16", "r": 8, "threads": 1}
        setting |= {"targets": targets, "device": options.device, **SHAPES[shape], **(TINY if options.tiny else {})}
        try:
            table = measure(setting | MODES[mode], list(systems), options.rounds)
            show(table)
        except Exception as error:  # noqa: BLE001  # of one cell; the others may run
            print(f"{shape}, {targets}, {mode}: {type(error).__name__}: {error}")
            table = {"setting": setting | MODES[mode], "error": f"{type(error).__name__}: {error}"}
        tables.append({"shape": shape, "mode": mode, **table})
        if options.json:
            write_result(options.json, options.device, 1, tables=tables)
        if options.device.startswith("cuda"):
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
