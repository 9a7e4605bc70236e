"""The records of a comparison: which runs it consists of, and what each of them measured.

`structlora compare` writes a folder with ``grids/<name>.json``, one file a table, and ``runs/<key>.json``, one file a
run; grids share runs. This file reads such a folder and refuses what does not fit before anything is made of it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from structlora_pyg.study import schema
from structlora_pyg.study.report.paper import NAMES as PAPER_TABLES
from structlora_pyg.study.schema import SCHEMA

AXES = ("methods", "tasks", "ranks", "fractions", "seeds")  # of a grid, in the order of a cell


class RecordError(ValueError):
    """A folder of a comparison cannot be read; the message names the file and what to do."""


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
class Run:
    """One run as it was recorded.

    Attributes:
        key: Hash of its configuration, the name of its file.
        failed: Why it could not run; empty if it is done.
        method: Name of the method (several rows of a table may be one method with different settings).
        seed: Its seed.
        data: The whole file.
    """

    key: str
    failed: str
    method: str
    seed: int
    data: Mapping[str, Any] = field(repr=False)

    @property
    def metric(self) -> str:
        """Name of the primary metric."""
        return str(self.data["metric"])

    @property
    def score(self) -> float:
        """Value of the primary metric, as recorded; NaN if the run diverged."""
        return number(self.data["metrics"].get(self.metric))

    def value(self, *path: str) -> float:
        """Return a number of the file, for instance ``value("structure", "adjacent_cosine")``; NaN if absent."""
        found: Any = self.data
        for name in path:
            found = found.get(name) if isinstance(found, Mapping) else None
        return number(found)


@dataclass(frozen=True, kw_only=True)
class Grid:
    """One table of a comparison: its rows, its columns and the runs behind every cell.

    Attributes:
        name: Name of the grid, that of its file.
        folder: Where it was read.
        title: Heading.
        note: What a reader should know.
        paper: Name of the table of the paper that it stands beside, or None.
        baseline: Label of the row that the others are compared with, or None.
        methods: Labels of the rows, in order.
        settings: The columns, in order.
        seeds: Seeds that are planned for any cell.
        validation: Whether the scores were measured on a part cut from the training data, to choose settings.
        planned: ``{(method, setting): seeds}`` of the cells; a pair that is absent is not part of the grid.
        runs: ``{(method, setting): {seed: run}}`` of the runs that are there, done or failed.
        without: ``{(method, setting): {seed: reason}}`` of the cells for which no run can be made.
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
    planned: Mapping[tuple[str, Setting], Sequence[int]]
    runs: Mapping[tuple[str, Setting], Mapping[int, Run]]
    without: Mapping[tuple[str, Setting], Mapping[int, str]]

    def done(self, method: str, setting: Setting) -> dict[int, Run]:
        """Return the finished runs of a cell by seed."""
        return {seed: run for seed, run in self.runs.get((method, setting), {}).items() if not run.failed}

    def failed(self, method: str, setting: Setting) -> dict[int, str]:
        """Return by seed why runs of a cell failed or cannot be made."""
        runs = self.runs.get((method, setting), {})
        failed = {seed: run.failed for seed, run in runs.items() if run.failed}
        return {**failed, **self.without.get((method, setting), {})}

    def missing(self, method: str, setting: Setting) -> list[int]:
        """Return the seeds of a cell that have not been run yet."""
        there = {*self.runs.get((method, setting), {}), *self.without.get((method, setting), {})}
        return [seed for seed in self.planned.get((method, setting), []) if seed not in there]

    def of_task(self, task: str) -> list[Run]:
        """Return the finished runs of a task, each once."""
        cells = [runs for (_, setting), runs in self.runs.items() if setting.task == task]
        return list({run.key: run for runs in cells for run in runs.values() if not run.failed}.values())

    def all_done(self) -> list[Run]:
        """Return all finished runs, each once."""
        return list({run.key: run for runs in self.runs.values() for run in runs.values() if not run.failed}.values())


def read_comparison(folder: str | Path) -> list[Grid]:
    """Read the grids of a comparison with all runs they refer to, in the order of their file names.

    Args:
        folder: What `structlora compare` wrote.

    Raises:
        RecordError: A file that is missing, unreadable, of another version or at odds with the grid that names it.
    """
    folder = Path(folder)
    files = sorted((folder / "grids").glob("*.json"))
    if not files:
        raise RecordError(
            f"{folder} holds no grids/*.json; give the output folder of a comparison, which `structlora compare` writes"
        )
    known: dict[str, Run | None] = {}
    return [_grid(file, folder, known) for file in files]


def number(value: object) -> float:
    """Return a JSON value as a float: NaN for null, text and anything else that is no number."""
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan


def _grid(file: Path, folder: Path, known: dict[str, Run | None]) -> Grid:
    data = read_record(file, schema.Grid)
    if not data["cells"]:
        raise _unfit(file, "it has no cells")
    planned: dict[tuple[str, Setting], list[int]] = {}
    runs: dict[tuple[str, Setting], dict[int, Run]] = {}
    without: dict[tuple[str, Setting], dict[int, str]] = {}
    for cell in data["cells"]:
        setting = Setting(cell["task"], cell["rank"], cell["fraction"])
        method, seed, key = cell["method"], cell["seed"], cell["key"]
        for name, value in zip(AXES, (method, *setting, seed), strict=True):
            if value not in data[name]:
                raise _unfit(file, f"a cell has {value!r}, which is not among its {name} {data[name]}")
        seeds = planned.setdefault((method, setting), [])
        if seed in seeds:
            raise _unfit(file, f"the cell {method}, {', '.join(map(str, setting))}, seed {seed} stands there twice")
        seeds.append(seed)
        if key is not None and not key.isalnum():
            raise _unfit(file, f"a cell has the key {key!r}, which is no name of a run")
        if key is not None and key not in known:
            known[key] = _run(folder / "runs" / f"{key}.json")
        run = known[key] if key is not None else None
        if run is not None:
            _check_cell(run, setting, seed, folder, file)
            runs.setdefault((method, setting), {})[seed] = run
        elif cell.get("why"):
            without.setdefault((method, setting), {})[seed] = cell["why"]
    baseline = data.get("baseline")
    if baseline is not None and baseline not in data["methods"]:
        raise _unfit(file, f"its baseline {baseline!r} is not among its methods {data['methods']}")
    if data.get("paper") not in (None, *PAPER_TABLES):
        raise _unfit(file, f"its paper is {data['paper']!r}; it must be null or one of {', '.join(PAPER_TABLES)}")
    used = {setting for _, setting in planned}
    order = [Setting(t, r, f) for t in data["tasks"] for r in data["ranks"] for f in data["fractions"]]
    grid = Grid(
        name=data["name"],
        folder=folder,
        title=data["title"],
        note=data.get("note") or "",
        paper=data.get("paper"),
        baseline=baseline,
        methods=data["methods"],
        settings=[setting for setting in order if setting in used],
        seeds=data["seeds"],
        validation=bool(data.get("validation")),
        planned=planned,
        runs=runs,
        without=without,
    )
    _check_metrics(grid, file)
    return grid


def _run(file: Path) -> Run | None:
    """Return a run, or None where its file is not there yet."""
    if not file.exists():
        return None
    data = read_record(file, schema.Run)
    if data["key"] != file.stem:
        raise _unfit(file, f"it says its key is {data['key']}")
    if data["status"] not in ("done", "failed"):
        raise _unfit(file, f"its status is {data['status']!r}, not 'done' or 'failed'")
    failed = ""
    if data["status"] == "failed":
        failed = str(data.get("reason") or "no reason was recorded")
    elif problem := schema.misfit(data, schema.FinishedRun):
        raise _unfit(file, problem)
    return Run(key=data["key"], failed=failed, method=data["method"], seed=data["seed"], data=data)


def read_record(file: Path, shape: type[schema.Schema] = schema.Run) -> dict[str, Any]:
    """Return the content of one file.

    Args:
        file: The file.
        shape: What it has to hold, see `structlora_pyg.study.schema`.

    Raises:
        RecordError: If it is missing, damaged or of another version.
    """
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise _unfit(file, f"it is not JSON ({error})") from error
    except OSError as error:
        raise RecordError(f"{file} cannot be read: {error.strerror}") from error
    if not isinstance(data, dict):
        raise _unfit(file, f"it holds a {type(data).__name__}, not an object")
    if data.get("schema") != SCHEMA:
        raise RecordError(
            f"{file} has schema {data.get('schema')!r}, this version reads {SCHEMA}; write it anew with "
            "`structlora compare` of this version, into an empty folder"
        )
    if problem := schema.misfit(data, shape):
        raise _unfit(file, problem)
    return data


def _check_cell(run: Run, setting: Setting, seed: int, folder: Path, file: Path) -> None:
    """Refuse a run that belongs to another cell.

    Methods without rank share one run among the ranks of a grid, and one run may stand in several grids, which may call
    its method and its task as they like.
    """
    for name, wanted in (("fraction", setting.fraction), ("seed", seed)):
        if run.data[name] != wanted:
            found = f"it has {name} {run.data[name]!r}, the cell of {file} that names it {wanted!r}"
            raise _unfit(folder / "runs" / f"{run.key}.json", found)


def _check_metrics(grid: Grid, file: Path) -> None:
    """Refuse scores of one task that cannot be compared."""
    for task in dict.fromkeys(setting.task for setting in grid.settings):
        runs = grid.of_task(task)
        for run, name in product(runs[1:], ("metric", "higher_is_better")):
            if run.data[name] != runs[0].data[name]:
                found = f"{runs[0].data[name]!r} in run {runs[0].key} and {run.data[name]!r} in {run.key}"
                raise _unfit(file, f"{task} has {name} {found}")


def _unfit(file: Path, problem: str) -> RecordError:
    return RecordError(f"{file} is damaged: {problem}; delete it and start the same `structlora compare` again")
