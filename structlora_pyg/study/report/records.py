"""The runs of a comparison and its tables as data frames, from a working folder or from the packed form of one.

`structlora compare` works in ``grids/<name>.json``, one file per table, and ``runs/<key>.json``, one file per run.
`pack` makes three small files of one or several such folders, to keep and to share: ``runs.jsonl.gz`` and
``grids.jsonl.gz``, a line for every such file, numbers in lists rounded; and ``runs.csv``, what `read_runs` returns,
with six digits, for other programs. Both forms make the same report.
"""

from __future__ import annotations

import contextlib
import gzip
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from structlora_pyg.checks import replace_file, short

SCHEMA = 1  # version of the files of runs and grids
PLACE = ("method", "task", "rank", "fraction", "seed")
PLAIN = (
    "key", "status", "reason", *PLACE, "lr", "metric", "higher_is_better", "steps", "device", "processes",
    "peak_memory_bytes",
)  # fmt: skip
NESTED = ("metrics", "parameters", "seconds", "structure", "gates", "importance", "export", "versions")
NUMBERS = (
    "fraction", "lr", "score", "steps", "peak_memory_bytes", "processes", "parameters.adapter",
    "seconds.per_step_median",
)  # fmt: skip
Curves = Mapping[str, Mapping[str, Any]]  # by key of the run


class RecordError(ValueError):
    """A folder of a comparison cannot be read; the message names the file and what to do."""


def read_runs(folder: str | Path) -> pd.DataFrame:
    """Return all runs of a folder, one per row, also those that stand in no table.

    Args:
        folder: What `structlora compare` or `pack` wrote.

    Returns:
        A frame indexed by ``key``. Nested numbers have dotted names: ``metrics.accuracy``, ``parameters.adapter``,
        ``seconds.per_step_median``, ``structure.adjacent_cosine``, ``gates.open``; ``score`` is the primary metric.

    Raises:
        RecordError: A folder without runs, a damaged file, or one of another version.
    """
    runs, _ = load_runs(Path(folder))
    if runs.empty:
        raise RecordError(
            f"{folder} holds neither runs.jsonl.gz nor runs/; give a folder that `structlora compare` wrote"
        )
    return runs


def load_runs(folder: Path) -> tuple[pd.DataFrame, Curves]:
    """Return what `read_runs` does, and what has more than one number, by key of the run.

    Raises:
        RecordError: A damaged file, or one of another version.
    """
    rows, curves = [], {}
    for where, record in _records(folder, "runs"):
        with damage_named(where):
            rows.append(_row(record))
            if record["status"] == "done":
                curves[record["key"]] = _curves(record)
    with damage_named(folder / "runs"):
        return _frame(rows), curves


def load_grids(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the content of all grids by where it was found.

    Raises:
        RecordError: No grid, or a file that is damaged or of another version.
    """
    if found := dict(_records(folder, "grids")):
        return found
    raise RecordError(
        f"{folder} holds no grids/*.json; give the output folder of a comparison, which `structlora compare` writes"
    )


def read_record(file: Path) -> dict[str, Any]:
    """Return the content of the file of a run or of a grid.

    Raises:
        RecordError: If it is missing, damaged or of another version.
    """
    with damage_named(file):
        return _checked(file, file.read_text(encoding="utf-8"))


@contextlib.contextmanager
def damage_named(file: object) -> Iterator[None]:
    """Turn whatever goes wrong in reading a file into a `RecordError` that names it."""
    try:
        yield
    except RecordError:
        raise
    except (OSError, EOFError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        what = f"it has no {error}" if isinstance(error, KeyError) else short(error)
        raise RecordError(
            f"{file} is damaged: {what}; restore it, or delete it and start the same `structlora compare` again"
        ) from error


def pack(folders: Sequence[str | Path], output_dir: str | Path) -> dict[str, Path]:
    """Write the runs of folders, also those that stand in no table, as a few files.

    Args:
        folders: What `structlora compare` or `pack` wrote.
        output_dir: Where the files go.

    Returns:
        ``{name: path}`` of the files.

    Raises:
        RecordError: A folder cannot be read, or two folders have grids of one name.
        OSError: The output cannot be written.
    """
    grids: dict[str, dict[str, Any]] = {}
    runs: dict[str, dict[str, Any]] = {}
    for folder in map(Path, folders):
        for where, grid in load_grids(folder).items():
            if grid["name"] in grids:
                raise RecordError(f"{where}: two grids are called {grid['name']!r}; pack their folders apart")
            grids[grid["name"]] = grid
        runs |= {record["key"]: _rounded(record) for _, record in _records(folder, "runs")}
    runs = dict(sorted(runs.items()))
    files: dict[str, str | bytes] = {
        "runs.jsonl.gz": _zipped(runs.values()),
        "grids.jsonl.gz": _zipped(grids.values()),
        "runs.csv": _frame(map(_row, runs.values())).to_csv(lineterminator="\n", float_format="%.6g"),
    }
    return {name: replace_file(Path(output_dir) / name, content) for name, content in files.items()}


def _records(folder: Path, kind: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield where each record of a kind, ``runs`` or ``grids``, was found, and what it holds."""
    packed = folder / f"{kind}.jsonl.gz"
    if not packed.is_file():
        yield from ((str(file), read_record(file)) for file in sorted((folder / kind).glob("*.json")))
        return
    with damage_named(packed), gzip.open(packed, "rt", encoding="utf-8") as stream:
        lines = stream.readlines()
        if not lines:
            raise ValueError("it is empty")
        yield from ((f"{packed}, line {k}", _checked(packed, line)) for k, line in enumerate(lines, start=1))


def _checked(file: Path, text: str) -> dict[str, Any]:
    data = dict(json.loads(text))
    if data.get("schema") != SCHEMA:
        raise RecordError(
            f"{file} has schema {data.get('schema')!r}, this version reads {SCHEMA}; write it anew with "
            "`structlora compare` of this version, into an empty folder"
        )
    return data


def _zipped(records: Iterable[Mapping[str, Any]]) -> bytes:
    return gzip.compress("".join(json.dumps(record) + "\n" for record in records).encode(), 9, mtime=0)


def _row(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of a run is a number or a word."""
    row = {name: record.get(name) for name in PLAIN}
    row["version"] = (record.get("versions") or {}).get("structlora-pyg")
    row["alarms"] = "; ".join(record.get("alarms") or []) or None
    row["score"] = (record.get("metrics") or {}).get(record.get("metric"))
    for part in NESTED:
        values = (record.get(part) or {}).items()
        row |= {f"{part}.{name}": value for name, value in values if not isinstance(value, (list, dict))}
    return row


def _curves(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of a run has more than one number."""
    structure, gates = record["structure"] or {}, record["gates"] or {}
    found = {
        "step": record["curves"]["step"],
        "loss": record["curves"]["loss"],
        "looks": record["curves"]["structure"],
        "names": structure.get("names"),
        "similarity": structure.get("similarity"),
        "gates": gates.get("values"),
    }
    return {name: value for name, value in found.items() if value}


def _rounded(value: Any, name: str = "", listed: bool = False) -> Any:
    """Return a record whose lists of numbers have four digits, times six, and other numbers all they have."""
    if name == "seconds":
        return {k: v and float(f"{v:.6g}") for k, v in value.items()}
    if isinstance(value, dict):
        return {k: _rounded(v, k, listed) for k, v in value.items() if k != "traceback"}
    if name == "similarity":  # cosines near 0 have no use for digits that are not printed, and take most of the room
        return np.round(value, 2).tolist()
    if isinstance(value, list):
        return [_rounded(inner, listed=name != "config") for inner in value]
    return float(f"{value:.4g}") if listed and isinstance(value, float) else value


def _frame(rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Return runs as a frame, numbers as floats, None where there is no word."""
    frame = pd.DataFrame(list(rows))
    frame = frame.reindex(columns=[*dict.fromkeys([*PLAIN, *NUMBERS, *frame.columns])])
    for name in frame.columns:
        nested = name.partition(".")[0] in NESTED and not name.startswith("versions.")
        if name in NUMBERS or nested:
            frame[name] = frame[name].astype(object).astype(float)
        elif name not in ("rank", "seed"):
            frame[name] = frame[name].astype(object).where(frame[name].notna(), None)
    return frame.set_index("key")


class Setting(NamedTuple):
    """What the methods of a grid are compared in."""

    task: str  # its name
    rank: int  # of the updates
    fraction: float  # share of the training data, in (0, 1]


@dataclass(frozen=True, kw_only=True)
class Grid:
    """One table of a comparison.

    Attributes:
        name: Name of the grid.
        folder: Where it was read.
        title: Heading.
        note: What a reader should know.
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
        folder=folder,
        **{name: data[name] for name in ("name", "title", "methods", "seeds")},
        baseline=data.get("baseline"),
        note=data.get("note") or "",
        settings=[setting for setting in order if setting in used],
        validation=bool(data.get("validation")),
        cells=cells.drop(columns=["why", "status"]),
        curves=curves,
    )
