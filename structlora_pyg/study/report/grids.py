"""The grids of a comparison: which runs a table consists of, and what each of them measured."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from structlora_pyg.study.report.records import PLACE, Curves, damage_named, load_grids, load_runs


class Setting(NamedTuple):
    """What the methods of a grid are compared in.

    Attributes:
        task: Name of the task.
        rank: Rank of the updates.
        fraction: Share of the training data, in (0, 1].
    """

    task: str
    rank: int
    fraction: float


@dataclass(frozen=True, kw_only=True)
class Grid:
    """One table of a comparison.

    Attributes:
        name: Name of the grid.
        folder: Where it was read.
        title: Heading.
        note: What a reader should know.
        paper: Name of the table of the paper that it stands beside, or None.
        baseline: Label of the row that the others are compared with, or None.
        methods: Labels of the rows, in order.
        settings: The columns, in order.
        seeds: Seeds that are planned for any cell.
        validation: Whether the scores were measured on a part cut from the training data, to choose settings.
        cells: One row per planned run: its place (``method``, ``task``, ``rank``, ``fraction``, ``seed``), its ``key``,
            ``state`` (``done``, ``failed`` or ``not run yet``), ``reason`` of a failure, and for a finished run what
            `read_runs` has of it, its method as ``system``.
        curves: What has more than one number, by key of the run: ``step``, ``loss``, ``looks``, ``names``,
            ``similarity``, ``gates``.
    """

    name: str
    folder: Path
    title: str
    note: str
    paper: str | None
    baseline: str | None
    methods: Sequence[str]
    settings: Sequence[Setting]
    seeds: Sequence[int]
    validation: bool
    cells: pd.DataFrame = field(repr=False)
    curves: Curves = field(repr=False)

    def done(self, method: str | None = None, setting: Setting | None = None) -> pd.DataFrame:
        """Return the finished runs of a method in a setting, or of all, by seed."""
        if method is None or setting is None:
            return self._done
        return self._places.get((method, *setting), self._done.iloc[:0])

    @cached_property
    def _done(self) -> pd.DataFrame:
        found = self.cells[self.cells["state"] == "done"]
        return found.sort_values("seed", kind="stable").set_index("seed", drop=False)

    @cached_property
    def _places(self) -> dict[tuple, pd.DataFrame]:
        return dict(list(self._done.groupby(["method", *Setting._fields], sort=False)))


def read_comparison(folder: str | Path) -> list[Grid]:
    """Read the grids of a comparison with all runs they refer to.

    Args:
        folder: What `structlora compare` or `pack` wrote.

    Raises:
        RecordError: A file that is missing, unreadable, of another version or at odds with the grid that names it.
    """
    folder = Path(folder)
    grids = load_grids(folder)
    runs, curves = load_runs(folder)
    found = []
    for where, data in grids.items():
        with damage_named(where):
            found.append(_grid(data, folder, runs, curves))
    return found


def _grid(data: dict[str, Any], folder: Path, runs: pd.DataFrame, curves: Curves) -> Grid:
    cells = pd.DataFrame(data["cells"], columns=[*PLACE, "key", "why"])
    if cells.empty:
        raise ValueError("it has no cells")
    for key in cells["key"].dropna():
        if not re.fullmatch(r"[0-9a-f]{16}", key):
            raise ValueError(f"a cell has the key {key!r}, not 16 hexadecimal digits")
    # A run may stand in several grids, which may call its method and its task as they like; methods without rank share
    # one run among the ranks.
    found = runs.drop(columns=["task", "rank", "fraction", "seed"]).rename(columns={"method": "system"})
    cells = cells.join(found, on="key")
    cells["reason"] = cells["reason"].where(cells["status"].notna(), cells["why"])
    failed = (cells["status"] == "failed") | (cells["status"].isna() & cells["why"].notna())
    cells["state"] = np.select([cells["status"] == "done", failed], ["done", "failed"], "not run yet")
    cells.loc[failed, "reason"] = cells.loc[failed, "reason"].fillna("no reason was recorded")
    used = set(cells[list(Setting._fields)].itertuples(index=False, name=None))
    order = [Setting(t, r, f) for t in data["tasks"] for r in data["ranks"] for f in data["fractions"]]
    return Grid(
        name=data["name"],
        folder=folder,
        title=data["title"],
        note=data.get("note") or "",
        paper=data.get("paper"),
        baseline=data.get("baseline"),
        methods=data["methods"],
        settings=[setting for setting in order if setting in used],
        seeds=data["seeds"],
        validation=bool(data.get("validation")),
        cells=cells.drop(columns=["why", "status"]),
        curves=curves,
    )
