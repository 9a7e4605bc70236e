"""The demo: LoRA against StructLoRA on digits, by the runner and with the report of every comparison."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from structlora_pyg.checks import ConfigError
from structlora_pyg.study.grid import GridConfig
from structlora_pyg.study.report.comparison_report import write_comparison
from structlora_pyg.study.report.comparison_tables import cost_table, difference_table, score_table, structure_table
from structlora_pyg.study.report.contrasts import summarize
from structlora_pyg.study.report.records import read_comparison
from structlora_pyg.study.sweep import run_grid

NOTE = (
    "A vision transformer of 6 layers, pretrained on the handwritten digits 0-4, learns 5-9 from ten examples of each. "
    "Each method chose its learning rate on validation pictures that no run trains on. The filter has strong gates "
    "(beta 1, init_logit 2.5), which pays on so few examples; the defaults are gentler."
)


def demo_grid(output_dir: str | Path, seeds: int = 5, quick: bool = False) -> GridConfig:
    """Return the demo's comparison.

    Args:
        output_dir: The pretrained base is kept in its folder ``bases``.
        seeds: Number of paired seeds.
        quick: Two seeds, 40 steps and one learning rate, to see that everything works.
    """
    short = {
        "train.max_steps": 40,
        "adapter.schedule.warmup_steps": 4,
        "adapter.schedule.ramp_steps": 16,
        "adapter.graph.refresh_every": 10,
    }
    return GridConfig(
        name="digits-quick" if quick else "digits",
        title="StructLoRA and LoRA learn new digits",
        note="Forty steps, to see that everything works; the scores say nothing about the methods." if quick else NOTE,
        baseline="LoRA",
        tasks={"digits": {"config": "digits"}},
        methods={"LoRA": {"method.name": "lora"}, "StructLoRA": {"method.name": "structlora"}},
        ranks=[4],
        seeds=2 if quick else seeds,
        settings={"model.path": str(Path(output_dir) / "bases"), **(short if quick else {})},
        learning_rates=[0.01] if quick else [0.005, 0.01, 0.02],
        tuning_seeds=2,
        watch_every=25,
    )


def run_demo(
    output_dir: str | Path = "runs/demo",
    seeds: int = 5,
    quick: bool = False,
    jobs: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Run the demo; nothing is downloaded.

    A demo that was interrupted goes on where it stopped, and more seeds are added to those that are there.

    Args:
        output_dir: Folder for ``report.html``, ``report.md`` and the runs.
        seeds: Number of paired seeds, >= 2.
        quick: Two seeds and few steps, to see that everything works; its numbers say nothing about the methods.
        jobs: Runs side by side, >= 1; default: one per processor core, 8 at most.
        progress: Show a progress bar and print the tables.

    Returns:
        What `structlora_pyg.study.sweep.run_grid` returns.

    Raises:
        ConfigError: If there are fewer than two seeds.
        OSError: If the folder cannot be written.
    """
    if seeds < 2:
        raise ConfigError([f"seeds must be >= 2 for a paired comparison, got {seeds}"])
    jobs = jobs or min(os.cpu_count() or 1, 8)
    table = run_grid(demo_grid(output_dir, seeds, quick), output_dir, jobs, progress=progress)
    files = write_comparison([output_dir], output_dir)
    if progress:
        grid = next(grid for grid in read_comparison(output_dir) if grid.name == table["name"])
        summary = summarize(grid)
        parts = (score_table(summary), difference_table(summary), structure_table(grid), cost_table(grid))
        tqdm.write("\n\n".join(part.text() for part in parts if part is not None))
        tqdm.write(f"\nreport: {files['report.html']}")
    return table
