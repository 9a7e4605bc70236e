"""Files and their rows, which know where they came from.

`resolve` finds a path of the configuration, `rows_in` reads a table. Whatever is wrong stops with one `DataError` that
names the file, the line, what was found and what was expected. Text files are read here and not by `datasets`, which
guesses the type of a column anew for every ten thousand rows, takes "None" for a missing value, and names no line.
"""

from __future__ import annotations

import csv
import gzip
import json
import math
import os
import re
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from structlora_pyg.checks import require, short

DATA_VARIABLE = "STRUCTLORA_DATA"
TABLE_SUFFIXES = (".tsv", ".csv", ".jsonl", ".json", ".parquet")
HUB_IDS = {  # of what shipped configurations look for in the data folder first, by the first part of the path
    "minilm_l6_fp16": "sentence-transformers/all-MiniLM-L6-v2",
    "deit_tiny": "timm/deit_tiny_patch16_224.fb_in1k",
    "glue": "nyu-mll/glue",
    "boolq": "google/boolq",
    "cifar100_subset": "uoft-cs/cifar100",
}
SOURCES = {  # of what is not on the hub in the form that a task reads
    "coco": "https://cocodataset.org/#download",
    "imagenet": "https://image-net.org/download.php",
    "piqa": "https://yonatanbisk.com/piqa",
    "vqav2": "https://visualqa.org/download.html",
}
FILE_SUFFIXES = (*TABLE_SUFFIXES, ".txt", ".npz", ".gz", ".safetensors", ".bin", ".pt", ".pth")


class DataError(ValueError):
    """One thing that is wrong with a data set.

    Args:
        file: File, folder or hub id.
        line: Line number counted from 1, or None where lines mean nothing.
        found: What is there.
        expected: What should be there.
    """

    def __init__(self, file: Path | str, *, line: int | None = None, found: str, expected: str) -> None:
        where = f"{file}" if line is None else f"{file}, line {line}"
        super().__init__(f"{where}: found {found}; expected {expected}")


def resolve(path: str) -> Path | str:
    """Return the local file or folder that a path of the configuration means, or the id on the hub if there is none.

    An absolute path is taken as it is. A relative one is looked up in the folder named by the environment variable
    ``STRUCTLORA_DATA``, then in the working directory. What shipped configurations name has an id in `HUB_IDS`.

    Raises:
        DataError: If nothing is there and the path cannot be a hub id either; it names every place tried.
    """
    for place in places(path):
        if place.exists():
            return place
    if known := HUB_IDS.get(path.partition("/")[0]):
        return known
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", path) or path.endswith(FILE_SUFFIXES):
        raise DataError(path, found=not_found(path), expected="an existing file or folder")
    return path


def local_folder(path: str, expected: str) -> Path:
    """Return the folder that a path of the configuration means.

    Raises:
        DataError: If it is a file or a hub id; it says what was expected.
    """
    folder = resolve(path)
    if isinstance(folder, str) or not folder.is_dir():
        raise DataError(path, found=f"no local folder; {not_found(path)}", expected=expected)
    return folder


def not_found(path: str) -> str:
    """Return the sentence that names every local place where `resolve` looked for a path, and where to get it."""
    tried = " and ".join(f"'{place}'" for place in places(path))
    unset = "" if os.environ.get(DATA_VARIABLE) else f" (the environment variable {DATA_VARIABLE} is not set)"
    first = path.partition("/")[0]
    hub, source = HUB_IDS.get(first), SOURCES.get(first)
    more = f"; on the hub it is {hub}" if hub else f"; get it from {source}" if source else ""
    return f"nothing at {tried}{unset}{more}"


def places(path: str) -> list[Path]:
    """Return where a path of the configuration is looked for, in this order."""
    given, root = Path(path).expanduser(), os.environ.get(DATA_VARIABLE)
    return [Path(root).expanduser() / given, Path.cwd() / given] if root else [Path.cwd() / given]


@dataclass(frozen=True)
class Row:
    """Fields of one row, and typed access that knows where they came from.

    Args:
        file: File or hub id.
        line: Line number counted from 1, or None.
        fields: Values by column; None for a row that is broken.
        problem: What was found and what was expected instead, of a broken row.
    """

    file: Path | str
    line: int | None
    fields: Mapping[str, Any] | None
    problem: tuple[str, str] = ("", "")

    def wrong(self, *, found: str, expected: str) -> DataError:
        """Return the error about this row."""
        return DataError(self.file, line=self.line, found=found, expected=expected)

    def get(self, name: str) -> Any:
        """Return a field as it was read."""
        if self.fields is None:
            raise self.wrong(found=self.problem[0], expected=self.problem[1])
        if name not in self.fields:
            raise self.wrong(found=f"only {', '.join(map(str, self.fields))}", expected=f"a column {name!r}")
        return self.fields[name]

    def text(self, name: str) -> str:
        """Return a text that is not empty."""
        value = self.get(name)
        if not isinstance(value, str) or not value.strip():
            raise self.wrong(found=f"{name} = {value!r}", expected="a text that is not empty")
        return value

    def integer(self, name: str) -> int:
        """Return an integer that is not negative."""
        value = self.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise self.wrong(found=f"{name} = {value!r}", expected="an integer >= 0")
        return value

    def number(self, name: str, low: float = -math.inf, high: float = math.inf) -> float:
        """Return a finite number in [low, high], also if it is written as text."""
        value = self.get(name)
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not (math.isfinite(number) and low <= number <= high):
            between = "" if math.isinf(high) else f" from {low:g} to {high:g}"
            raise self.wrong(found=f"{name} = {value!r}", expected=f"a number{between}")
        return number

    def one_of(self, name: str, classes: Sequence[Any]) -> int:
        """Return the index of the class in a field, which holds the class or, as hub data sets do, its index."""
        value = self.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(classes):
            return value
        matches = [i for i, allowed in enumerate(classes) if type(allowed) is type(value) and allowed == value]
        if not matches:
            allowed = ", ".join(map(str, classes[:20])) + (", ..." if len(classes) > 20 else "")
            raise self.wrong(found=f"{name} = {value!r}", expected=f"one of {allowed}")
        return matches[0]


def find(folder: Path, *names: str) -> Path | None:
    """Return the first file of a folder that is there, plain or gzipped, or None."""
    files = (folder / f"{name}{end}" for name in names for end in ("", ".gz"))
    return next((file for file in files if file.is_file()), None)


def needed_file(folder: Path, *names: str) -> Path:
    """Return the first file of a folder that is there, plain or gzipped.

    Raises:
        DataError: If there is none.
    """
    file = find(folder, *names)
    if file is None:
        there = ", ".join(sorted(f.name for f in folder.iterdir())[:10]) or "an empty folder"
        wanted = f"{names[0]} or {names[0]}.gz" if len(names) == 1 else f"{' or '.join(names)}, plain or gzipped"
        raise DataError(folder, found=there, expected=f"a file {wanted}")
    return file


def lines_of(file: Path) -> Iterator[tuple[int, str]]:
    """Yield line numbers and lines; only a newline ends a line, as sentences may hold other separators."""
    number = 0
    try:
        with gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb") as stream:
            for number, raw in enumerate(stream, 1):
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise DataError(file, line=number, found=f"no UTF-8 ({error.reason})", expected="text in UTF-8") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        found = f"a damaged or truncated gzip file ({error})"
        raise DataError(file, line=number + 1, found=found, expected="a whole one; copy it again") from error
    except OSError as error:
        raise DataError(file, found=f"an unreadable file ({error})", expected="a file that may be read") from error
    if number == 0:
        raise DataError(file, found="an empty file", expected="at least one line")


def rows_in(file: Path, header: Sequence[str] | None = None) -> Iterator[Row]:
    """Yield the rows of a table, plain or gzipped, by the ending of its name. Empty lines are passed over.

    ``.tsv`` has no quoting: a quote is text and never joins fields or lines. ``.csv`` has it. ``.jsonl`` has an object
    in each line, ``.json`` a list of objects. ``.txt`` is one row, its ``text``.

    Raises:
        DataError: If the file is damaged. A row with another number of fields raises when it is used.
    """
    kind = file.with_suffix("").suffix if file.suffix == ".gz" else file.suffix
    if kind == ".parquet":
        yield from _parquet_rows(file)
    elif kind == ".json":
        yield from json_items(file)
    elif kind == ".txt":
        yield Row(file, None, {"text": "\n".join(line for _, line in lines_of(file))})
    elif kind == ".jsonl":
        for number, line in lines_of(file):
            if line:
                yield _object(file, number, _json(line, file, number))
    else:
        tsv = ((number, line.split("\t")) for number, line in lines_of(file) if line)
        for number, fields in _csv_fields(file) if kind == ".csv" else tsv:
            if header is None:
                header = fields
            elif len(fields) == len(header):
                yield Row(file, number, dict(zip(header, fields, strict=True)))
            else:
                yield Row(file, number, None, (f"{len(fields)} fields", f"{len(header)} ({', '.join(header)})"))


def _csv_fields(file: Path) -> Iterator[tuple[int, list[str]]]:
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader((f"{line}\n" for _, line in lines_of(file)), strict=True)
    try:
        for fields in reader:
            if fields:
                yield reader.line_num, fields
    except csv.Error as error:
        raise DataError(file, line=reader.line_num, found=f"broken CSV ({error})", expected="whole rows") from error


def _parquet_rows(file: Path) -> Iterator[Row]:
    try:
        batches = require("pyarrow.parquet", "study").ParquetFile(file).iter_batches()
        for number, fields in enumerate(chain.from_iterable(batch.to_pylist() for batch in batches), 1):
            yield Row(file, number, fields)
    except (OSError, ValueError) as error:
        raise DataError(file, found=f"an unreadable file ({short(error)})", expected="a whole Parquet file") from error


def _json(text: str, file: Path, line: int | None = None) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(file, line=line, found=f"broken JSON ({error})", expected="one whole JSON value") from error


def _object(file: Path | str, line: int | None, value: Any) -> Row:
    if not isinstance(value, dict):
        raise DataError(file, line=line, found=f"a JSON {type(value).__name__}", expected="a JSON object")
    return Row(file, line, value)


def json_items(file: Path, key: str | None = None, names: Sequence[str] = ()) -> Iterator[Row]:
    """Yield the objects of a JSON list, plain or gzipped.

    Args:
        file: The file.
        key: Where the list is in a JSON object; None if it is the whole file.
        names: Names of the values, if the items are lists of so many values instead of objects.
    """
    tree = _json("\n".join(line for _, line in lines_of(file)), file)
    items = tree if key is None else tree.get(key) if isinstance(tree, dict) else None
    if not isinstance(items, list):
        found = f"the keys {', '.join(tree)}" if isinstance(tree, dict) and key else f"a JSON {type(tree).__name__}"
        raise DataError(file, found=found, expected=f"a JSON object with a list {key!r}" if key else "a JSON list")
    for i, item in enumerate(items):
        where = f"{file}, {key or ''}[{i}]"
        if names and (not isinstance(item, list) or len(item) != len(names)):
            raise DataError(where, found=repr(item), expected=f"[{', '.join(names)}]")
        yield _object(where, None, dict(zip(names, item, strict=True)) if names else item)
