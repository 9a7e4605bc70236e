"""A folder as `structlora compare` writes it, with invented numbers from a seeded formula, not from runs."""

import hashlib
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

METHODS = ("LoRA", "StructLoRA", "DoRA", "AdaLoRA")
TASKS = {"stsb": "pearson", "cola": "matthews"}
RANKS, FRACTIONS, SEEDS = (2, 8), (0.1, 1.0), (0, 1, 2, 3, 4)
GAIN = {"LoRA": 0.0, "StructLoRA": 0.02, "DoRA": 0.004, "AdaLoRA": -0.015}
REASON = "rank 2 is below the 4 that AdaLoRA starts with"
NAMES = [f"encoder.{i}.attention.{role}" for role in ("query", "value") for i in range(6)]


def write_folder(folder: Path, edit: Callable[[dict[str, Any]], Any] = lambda run: None, **changes: Any) -> Path:
    """Write the folder: AdaLoRA failed at rank 2, on CoLA for want of a learning rate; DoRA lacks two seeds of a cell.

    Args:
        folder: Where to.
        edit: What changes every finished run before it is written.
        changes: Entries of the grid that are to be different.
    """
    cells = []
    for method, task, rank, fraction, seed in itertools.product(METHODS, TASKS, RANKS, FRACTIONS, SEEDS):
        key: str | None = hashlib.sha256(f"{method} {task} {rank} {fraction} {seed}".encode()).hexdigest()[:16]
        why = None
        if (method, task, rank, fraction) == ("DoRA", "cola", 8, 0.1) and seed >= 3:
            key = None if seed == 3 else key  # one is not planned into a file yet, one has a file to come
        elif (method, task, rank) == ("AdaLoRA", "cola", 2):
            key, why = None, REASON
        elif (method, rank) == ("AdaLoRA", 2):
            write(folder / "runs" / f"{key}.json", failed_run(str(key), method, task, rank, fraction, seed))
        else:
            edit(run := done_run(str(key), method, task, rank, fraction, seed))
            write(folder / "runs" / f"{key}.json", run)
        place = {"method": method, "task": task, "rank": rank, "fraction": fraction, "seed": seed}
        cells.append({**place, "key": key, "why": why})
    grid = {
        "schema": 1, "name": "ranks", "title": "Rank and share of the data",
        "note": "Invented numbers: 4 methods & 2 tasks, 100 % made up.", "baseline": "LoRA", "methods": list(METHODS),
        "tasks": list(TASKS), "ranks": list(RANKS), "fractions": list(FRACTIONS), "seeds": list(SEEDS),
        "validation": False, "cells": cells,
    }  # fmt: skip
    write(folder / "grids" / "ranks.json", {**grid, **changes})
    return folder


def edit_grid(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> Path:
    """Apply `edit` to the grid of a folder."""
    file = folder / "grids" / "ranks.json"
    grid = json.loads(file.read_text())
    edit(grid)
    write(file, grid)
    return folder


def write(file: Path, data: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(data), encoding="utf-8")


def failed_run(key: str, method: str, task: str, rank: int, fraction: float, seed: int) -> dict[str, Any]:
    return {
        "schema": 1, "key": key, "status": "failed", "reason": REASON, "method": method.lower(), "task": task,
        "rank": rank, "fraction": fraction, "seed": seed, "lr": 0.001, "config": {},
    }  # fmt: skip


def done_run(key: str, method: str, task: str, rank: int, fraction: float, seed: int) -> dict[str, Any]:
    """Return a run whose score is a level of its setting, a gain of its method and noise shared by a seed."""
    noise = np.random.default_rng([int(key[:8], 16)])
    shared = np.random.default_rng([seed, rank, list(TASKS).index(task), int(100 * fraction)]).standard_normal()
    level = {"stsb": 0.78, "cola": 0.42}[task] + 0.03 * np.log2(rank) / 3 + 0.08 * (np.log10(fraction) + 1)
    score = float(level + GAIN[method] + 0.012 * shared + 0.004 * noise.standard_normal())
    steps, coordinated = np.arange(0, 151, 10), method == "StructLoRA"
    pull = 0.25 * coordinated * (1 - np.exp(-steps / 60))
    cosine = 0.02 + pull + 0.01 * noise.standard_normal(len(steps))
    drift = 2.0 - 1.6 * pull + 0.05 * noise.standard_normal(len(steps))
    return {
        "schema": 1, "key": key, "status": "done", "reason": None, "method": method.lower(), "task": task,
        "rank": rank, "fraction": fraction, "seed": seed,
        "lr": {"LoRA": 0.0005, "StructLoRA": 0.0005 if fraction < 1 else 0.001}.get(method, 0.001),
        "metric": TASKS[task],
        "higher_is_better": True,
        "metrics": {TASKS[task]: score, **({"spearman": score - 0.01} if task == "stsb" else {}), "loss": 1.2},
        "steps": 150,
        "parameters": {
            "adapter": 12 * 768 * rank, "heads": 769, "training_only": 5000 * coordinated, "base": 22_713_216,
        },
        "seconds": {"per_step_median": 0.7 * (1 + 0.25 * coordinated + 0.02 * noise.random()), "training": 105.0},
        "peak_memory_bytes": None,
        "curves": {
            "step": steps.tolist(),
            "loss": (1.2 * np.exp(-steps / 80) + 0.4 + 0.03 * noise.standard_normal(len(steps))).tolist(),
            "structure": [
                {
                    "step": int(steps[k]), "adjacent_cosine": cosine[k], "relative_drift": drift[k],
                    "drift_energy": drift[k] / 7, "gradient_cosine": 0.1 + cosine[k] if k else None,
                    "open_gates": 1 - 0.02 * k if coordinated else None, "mean_gate": 0.9 if coordinated else None,
                    "dirichlet": [0.8, 0.5] if coordinated else None,
                }
                for k in range(len(steps))
            ],
        },
        "gates": gates(rank, noise) if coordinated else None,
        "structure": {
            "names": NAMES, "similarity": likeness(0.2 + 0.5 * coordinated, noise), "adjacent_cosine": cosine[-1],
            "drift_energy": drift[-1] / 7, "relative_drift": drift[-1],
        },
        "importance": {
            "removal_gate": 0.4 + 0.1 * noise.random() if coordinated else None,
            "removal_norm": 0.3 + 0.1 * noise.random(), "removal_first_order": 0.8, "gate_first_order": None,
        },
        "export": {"relative_error": 1e-8}, "device": "cpu, 1 threads", "processes": 1, "versions": {"torch": "2.x"},
        "config": {"method": {"name": method.lower()}},
    }  # fmt: skip


def gates(rank: int, noise: np.random.Generator) -> dict[str, Any]:
    values = np.maximum(noise.random((len(NAMES), rank)) - 0.1, 0)
    moves = {"filter_moves": 0.125, "coordinator_moves": 0.0073, "noise_level": 1.4}
    return {"open": float((values > 0).mean()), "mean": float(values.mean()), **moves, "values": values.tolist()}


def likeness(near: float, noise: np.random.Generator) -> list[list[float]]:
    """Return cosines that fall off with the distance of layers, within and not between the roles."""
    i = np.arange(len(NAMES))
    same_role = (i[:, None] // 6) == (i // 6)
    cosines = np.where(same_role, near ** np.abs(i[:, None] - i), 0.05 * noise.standard_normal((len(i), len(i))))
    return (0.5 * (cosines + cosines.T)).tolist()
