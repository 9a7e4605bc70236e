"""The demo: LoRA against StructLoRA on digits, by the runner and with the report of every comparison."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from structlora_pyg.checks import ConfigError
from structlora_pyg.study.grid import load_grid
from structlora_pyg.study.report.grids import read_comparison
from structlora_pyg.study.report.page import table_text
from structlora_pyg.study.report.report import write_comparison
from structlora_pyg.study.report.summary import summarize
from structlora_pyg.study.report.tables import cost_table, difference_table, score_table, structure_table
from structlora_pyg.study.sweep import run_grid

GRID = Path(__file__).parents[1] / "configs" / "grids" / "demo.yaml"


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
        output_dir: Folder for ``report.html``, ``report.md``, the runs and the pretrained base.
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
    grid = load_grid(GRID, size="quick" if quick else None)
    grid.seeds = grid.seeds if quick else seeds
    grid.settings["model.path"] = str(Path(output_dir) / "bases")
    table = run_grid(grid, output_dir, jobs or min(os.cpu_count() or 1, 8), progress=progress)
    files = write_comparison([output_dir], output_dir)
    if progress:
        results = next(grid for grid in read_comparison(output_dir) if grid.name == table["name"])
        summary = summarize(results)
        parts = (score_table(summary), difference_table(summary), structure_table(results), cost_table(results))
        tqdm.write("\n\n".join(table_text(part.table) for part in parts if part is not None))
        tqdm.write(f"\nreport: {files['report.html']}")
    return table
