"""The runs of a comparison as data frames, from a working folder or from the packed form of one.

`structlora compare` works in ``grids/<name>.json``, one file per table, and ``runs/<key>.json``, one file per run.
`pack` makes five small files of one or several such folders, to keep and to share:

- ``runs.csv``: one row per run with its scores, costs, structure, gates and versions; ``config`` refers to
- ``configs.jsonl.gz``: each configuration once, without seed and learning rate, which are columns of ``runs.csv``
- ``grids.jsonl``: titles, rows, columns and settings of the tables
- ``cells.csv``: which run stands where in which table
- ``curves.jsonl.gz``: loss, structure, similarity matrices and gates of the runs, rounded

Both forms make the same report.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

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
WHOLE = ("rank", "seed")
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
    if not any((Path(folder) / name).exists() for name in ("runs.csv", "runs")):
        raise RecordError(f"{folder} holds neither runs.csv nor runs/; give a folder that `structlora compare` wrote")
    return load_runs(Path(folder))[0]


def load_runs(folder: Path) -> tuple[pd.DataFrame, Curves]:
    """Return what `read_runs` does, and what has more than one number, by key of the run (see `pack`).

    Raises:
        RecordError: A damaged file, or one of another version.
    """
    if not (folder / "runs.csv").is_file():
        rows: list[dict[str, Any]] = []
        curves: dict[str, Any] = {}
        for record, row, curve in _records(folder):
            rows.append(row)
            curves |= {record["key"]: curve} if record["status"] == "done" else {}
        with damage_named(folder / "runs"):
            return _frame(rows), curves
    file = folder / "curves.jsonl.gz"
    with damage_named(file), gzip.open(file, "rt", encoding="utf-8") as stream:
        curves = {found.pop("key"): found for found in map(json.loads, stream)}
    with damage_named(folder / "runs.csv"):
        table = _read_csv(folder / "runs.csv")
        if missing := [name for name in PLAIN if name not in table]:
            raise ValueError(f"it has no column {missing[0]!r}")
        frame = _frame(table.to_dict("records"))
    with damage_named(file):
        if lost := set(frame.index[frame["status"] == "done"]) - curves.keys():
            raise ValueError(f"it has no run {min(lost)}")
    return frame, curves


def load_grids(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the content of all grids by where it was found.

    Raises:
        RecordError: A file that is missing, damaged or of another version.
    """
    file = folder / "grids.jsonl"
    if not file.is_file():
        return {str(file): read_record(file) for file in _files(folder)}
    with damage_named(file):
        lines = file.read_text(encoding="utf-8").splitlines()
        grids = {f"{file}, line {k}": dict(json.loads(line)) for k, line in enumerate(lines, start=1)}
        if not grids:
            raise ValueError("it is empty")
    with damage_named(folder / "cells.csv"):
        cells = _read_csv(folder / "cells.csv").astype({"rank": int, "seed": int, "fraction": float}).astype(object)
        groups = {name: group.drop(columns="grid").to_dict("records") for name, group in cells.groupby("grid")}
    return {where: {**grid, "cells": groups.get(grid.get("name"), [])} for where, grid in grids.items()}


def read_record(file: Path) -> dict[str, Any]:
    """Return the content of the file of a run or of a grid.

    Raises:
        RecordError: If it is missing, damaged or of another version.
    """
    with damage_named(file):
        data = dict(json.loads(file.read_text(encoding="utf-8")))
    if data.get("schema") != SCHEMA:
        raise RecordError(
            f"{file} has schema {data.get('schema')!r}, this version reads {SCHEMA}; write it anew with "
            "`structlora compare` of this version, into an empty folder"
        )
    return data


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
    """Write the runs of working folders, also those that stand in no table, as a few files.

    Args:
        folders: What `structlora compare` wrote.
        output_dir: Where the files go.

    Returns:
        ``{name: path}`` of the files.

    Raises:
        RecordError: A folder cannot be read, or two folders have grids of one name.
        OSError: The output cannot be written.
    """
    grids: dict[str, dict[str, Any]] = {}
    records: dict[str, dict[str, Any]] = {}
    for folder in map(Path, folders):
        for file in _files(folder):
            grid = read_record(file)
            if grid["name"] in grids:
                raise RecordError(f"{file}: two grids are called {grid['name']!r}; pack their folders apart")
            grids[grid["name"]] = grid
        records |= {record["key"]: record for record, _, _ in _records(folder)}
    records = dict(sorted(records.items()))
    cells = [{"grid": name, **cell} for name, grid in grids.items() for cell in grid["cells"]]
    curves = [json.dumps({"key": key, **_rounded(_curves(r))}) for key, r in records.items() if r["status"] == "done"]
    files: dict[str, str | bytes] = {
        "runs.csv": _frame(map(_row, records.values())).to_csv(lineterminator="\n"),
        "configs.jsonl.gz": _zipped({c["config"]: json.dumps(c) for c in map(_config, records.values())}.values()),
        "grids.jsonl": _lines({k: v for k, v in grid.items() if k != "cells"} for grid in grids.values()),
        "cells.csv": pd.DataFrame(cells, columns=["grid", *PLACE, "key", "why"]).to_csv(
            index=False, lineterminator="\n"
        ),
        "curves.jsonl.gz": _zipped(curves),
    }
    return {name: replace_file(Path(output_dir) / name, content) for name, content in files.items()}


def _files(folder: Path) -> list[Path]:
    if files := sorted((folder / "grids").glob("*.json")):
        return files
    raise RecordError(
        f"{folder} holds no grids/*.json; give the output folder of a comparison, which `structlora compare` writes"
    )


def _records(folder: Path) -> Iterator[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]]:
    """Yield each run with its row of the table and its curves; a failed one has none."""
    for file in sorted((folder / "runs").glob("*.json")):
        record = read_record(file)
        with damage_named(file):
            row, curves = _row(record), _curves(record) if record["status"] == "done" else {}
        yield record, row, curves


def _row(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of a run is a number or a word."""
    row = {name: record.get(name) for name in PLAIN}
    row["version"] = (record.get("versions") or {}).get("structlora-pyg")
    row["config"] = _config(record)["config"]
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


def _rounded(value: Any) -> Any:
    """Return numbers with four digits, all others as they are."""
    if isinstance(value, dict):
        # Cosines near 0 have no use for digits that are not printed, and take most of the room.
        return {k: np.round(v, 2).tolist() if k == "similarity" else _rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_rounded(inner) for inner in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _config(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration of a run without seed and learning rate, with its hash as ``config``."""
    sections = {k: dict(v) if isinstance(v, Mapping) else v for k, v in (record.get("config") or {}).items()}
    for name, key in (("train", "seed"), ("train", "lr"), ("adapter", "seed")):
        if isinstance(sections.get(name), dict):
            sections[name].pop(key, None)
    digest = hashlib.sha256(json.dumps(sections, sort_keys=True).encode()).hexdigest()[:8]
    return {"config": digest, **sections}


def _zipped(lines: Iterable[str]) -> bytes:
    return gzip.compress("\n".join(lines).encode(), 9, mtime=0)


def _lines(values: Iterable[Any]) -> str:
    return "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values)


def _frame(rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Return runs as a frame; numbers may be given as text, whose digits are all kept."""
    frame = pd.DataFrame(list(rows))
    frame = frame.reindex(columns=[*dict.fromkeys([*PLAIN, *NUMBERS, *frame.columns])])
    for name in frame.columns:
        nested = name.partition(".")[0] in NESTED and not name.startswith("versions.")
        if name in NUMBERS or nested:
            frame[name] = frame[name].astype(object).astype(float)
        elif name in WHOLE:
            frame[name] = frame[name].astype(object).astype(int)
        else:
            frame[name] = frame[name].astype(object).where(frame[name].notna(), None)
    frame["higher_is_better"] = frame["higher_is_better"].map({True: True, False: False, "True": True, "False": False})
    return frame.set_index("key")


def _read_csv(file: Path) -> pd.DataFrame:
    frame = pd.read_csv(file, dtype=str, keep_default_na=False).astype(object)
    return frame.where(frame != "", None)
