"""How time and memory of the graph pass grow with the number of adapters, the rank and the size of the sketch.

    python benchmarks/growth.py --json benchmarks/results/growth.json --figure docs/figures/growth.png

One graph pass, there and back, over a stack of linear layers of width 64 (for ranks: 16 layers of width 256), on one
thread, in processor time (on a GPU: wall clock). The exponent is that of a power law through the larger half of the
points: 1 is linear. Only exponents and ratios mean anything on a CPU.
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from timing import Clock, default_device, peak_bytes, threads, write_result
from torch import nn

from structlora_pyg import StructLoraConfig, get_structlora_model

SIZES = {
    "adapters": [16, 64, 256, 1024, 4096],
    "adapters, full edges": [16, 64, 256, 1024],
    "adapters, learned edges": [16, 64, 256, 1024],
    "rank": [2, 8, 32, 128],
    "sketch": [4, 8, 16, 32, 64],
}


def graph_pass(what: str, size: int, conv: str, device: str, repeats: int) -> tuple[float, int]:
    """Return the median seconds of a pass and the most memory it holds beyond the model, in bytes."""
    count, width = (16, 256) if what == "rank" else (size if what.startswith("adapters") else 64, 64)
    r, sketch = size if what == "rank" else 4, size if what == "sketch" else 16
    torch.manual_seed(0)
    config = StructLoraConfig(
        r=r,
        lora_alpha=2 * r,
        target_modules="all-linear",
        schedule={"warmup_steps": 0},
        encoding={"size": sketch},
        coordinator={"conv": conv, "lift": "tangent"},
        graph={"edges": what.split()[1] if "edges" in what else "structure"},
    )
    layers = nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(count))})
    model = get_structlora_model(layers.to(device), config).train()
    graph_pass, clock = model.graph_pass, Clock(device, 1)

    def once() -> float:
        began = clock()
        _, factors = graph_pass()
        loss = sum(a.sum() + b.sum() for _, a, b in factors)
        loss.backward()
        model.zero_grad()
        return clock() - began

    once()
    seconds = statistics.median(once() for _ in range(repeats))
    return seconds, peak_bytes(once, clock.cuda, without=[*model.parameters(), *model.buffers()])


def exponent(sizes: list[int], values: list[float]) -> float:
    half = len(sizes) // 2
    return float(np.polyfit(np.log(sizes[half:]), np.log(values[half:]), 1)[0])


def figure(curves: list[dict], path: Path) -> None:
    fig = Figure(figsize=(10, 6), dpi=150, layout="tight")
    axes = fig.subplots(2, 3).flatten()
    axes[-1].remove()
    for ax, what in zip(axes, SIZES, strict=False):
        for curve in (c for c in curves if c["grows"] == what):
            label = f"{curve['conv']}, {curve['time_exponent']:.2f}"
            ax.loglog(curve["sizes"], np.array(curve["seconds"]) / curve["seconds"][0], marker="o", label=label)
        ax.loglog(SIZES[what], np.array(SIZES[what]) / SIZES[what][0], color="0.6", linestyle=":", label="linear")
        ax.set_xlabel("side of the sketch" if what == "sketch" else what)
        ax.set_xticks(SIZES[what], [str(s) for s in SIZES[what]], fontsize=8)
        ax.minorticks_off()
        ax.legend(fontsize=7, frameon=False)
        ax.spines[["top", "right"]].set_visible(False)
    for ax in axes[::3]:
        ax.set_ylabel("time of the graph pass, relative")
    fig.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conv", nargs="+", default=["GCNConv", "SAGEConv", "GATv2Conv"])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--most", type=int, default=max(SIZES["adapters"]), help="largest number of adapters")
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--json", type=Path)
    parser.add_argument("--figure", type=Path)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    curves = []
    for what, sizes in SIZES.items():
        sizes = [s for s in sizes if not what.startswith("adapters") or s <= arguments.most]
        for conv in arguments.conv[: 1 if "edges" in what else None]:  # convolutions grow alike
            with threads(1):
                points = [graph_pass(what, s, conv, arguments.device, arguments.repeats) for s in sizes]
            seconds, memory = [p[0] for p in points], [p[1] for p in points]
            curve = {"grows": what, "conv": conv, "sizes": sizes, "seconds": seconds, "bytes": memory}
            curve |= {"time_exponent": exponent(sizes, seconds), "memory_exponent": exponent(sizes, memory)}
            curves.append(curve)
            print(
                f"{what:<23} {conv:<10} {sizes[0]} to {sizes[-1]}: time x {seconds[-1] / seconds[0]:.1f}, exponent "
                f"{curve['time_exponent']:.2f}; memory exponent {curve['memory_exponent']:.2f}"
            )
    if arguments.json:
        write_result(arguments.json, arguments.device, 1, curves=curves)
    if arguments.figure:
        figure(curves, arguments.figure)


if __name__ == "__main__":
    main()
