"""Rows of files and of hub data sets that know where they came from, and which of them are used.

`resolve` finds a path of the configuration. `find_splits` gives the parts of a data set as `Split` objects, whose rows
have typed access. Whatever is wrong stops with one `DataError` that names the file, the line, what was found and what
was expected.

Text files are read here and not by `datasets`, which guesses the type of a column anew for every ten thousand rows,
takes "None" for a missing value, and names no line in its errors. It serves hub ids and folders of parquet files.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import json
import logging
import math
import os
import re
import socket
import sys
import urllib.parse
import urllib.request
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import huggingface_hub

from structlora_pyg.checks import require
from structlora_pyg.files import short

logger = logging.getLogger(__name__)

DATA_VARIABLE = "STRUCTLORA_DATA"
TABLE_SUFFIXES = (".tsv", ".csv", ".jsonl", ".json", ".parquet")
FILE_SUFFIXES = (*TABLE_SUFFIXES, ".txt", ".npz", ".gz", ".safetensors", ".bin", ".pt", ".pth")
BROKEN_SHARE = 1e-3  # of rows that may be left out where an official file is known to be broken
T = TypeVar("T")


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


def resolve(path: str) -> Path | None:
    """Return the local file or folder that a path of the configuration means, or None if it must be a hub id.

    An absolute path is taken as it is. A relative one is looked up in the folder named by the environment variable
    ``STRUCTLORA_DATA``, then in the working directory.

    Raises:
        DataError: If nothing is there and the path cannot be a hub id either; it names every place tried.
    """
    for place in _places(path):
        if place.exists():
            return place
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", path) or path.endswith(FILE_SUFFIXES):
        raise DataError(path, found=not_found(path), expected="an existing file or folder")
    return None


def local_folder(path: str, expected: str) -> Path:
    """Return the folder that a path of the configuration means.

    Raises:
        DataError: If it is a file or a hub id; it says what was expected.
    """
    folder = resolve(path)
    if folder is None or not folder.is_dir():
        raise DataError(path, found="no local folder", expected=expected)
    return folder


def not_found(path: str) -> str:
    """Return the sentence that names every local place where `resolve` looked for a path."""
    tried = " and ".join(f"'{place}'" for place in _places(path))
    unset = "" if os.environ.get(DATA_VARIABLE) else f" (the environment variable {DATA_VARIABLE} is not set)"
    return f"nothing at {tried}{unset}"


def _places(path: str) -> list[Path]:
    given, root = Path(path).expanduser(), os.environ.get(DATA_VARIABLE)
    return [Path(root).expanduser() / given, Path.cwd() / given] if root else [Path.cwd() / given]


class Row:
    """Fields of one row, and typed access that knows where they came from.

    Args:
        file: File or hub id.
        line: Line number counted from 1, or None.
        fields: Values by column; None for a row that is broken.
        problem: What was found and what was expected instead, of a broken row.
    """

    def __init__(
        self, file: Path | str, line: int | None, fields: Mapping[str, Any] | None, problem: tuple[str, str] = ("", "")
    ) -> None:
        self.file, self.line, self.fields, self.problem = file, line, fields, problem

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


@dataclass(frozen=True)
class Split:
    """One part of a data set.

    Args:
        name: What errors call it.
        rows: Reads it.
        classes: Names of the classes of a column, where the data set knows them.
        is_hub: Whether it has the columns of the hub, not those of official files.
    """

    name: Path | str
    rows: Callable[[], Iterable[Row]]
    classes: Callable[[str], tuple[str, ...]] = lambda _: ()
    is_hub: bool = False

    def examples(self, make: Callable[[Row], T], broken_rows: bool = False) -> list[T]:
        """Return what `make` gives for each row.

        Args:
            make: Takes a row.
            broken_rows: Leave out rows that are wrong, up to one in a thousand, with a warning that counts them.

        Raises:
            DataError: If a row is wrong, or there is none.
        """
        found, broken = [], []
        for row in self.rows():
            try:
                found.append(make(row))
            except DataError:
                if not broken_rows or row.line is None:
                    raise
                broken.append(row.line)
        if len(broken) > BROKEN_SHARE * len(found):
            raise DataError(
                self.name, line=broken[0], found=f"{len(broken)} of {len(found) + len(broken)} rows with wrong fields",
                expected=f"at most one in {1 / BROKEN_SHARE:.0f}",
            )  # fmt: skip
        if broken:
            logger.warning("%s: left out %d wrong rows, the first in line %d", self.name, len(broken), broken[0])
        if not found:
            raise DataError(self.name, found="no examples", expected="at least one")
        return found


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


def find_splits(
    path: str,
    names: Sequence[Sequence[str]],
    suffixes: Sequence[str] = TABLE_SUFFIXES,
    hub_names: Sequence[Sequence[str]] | None = None,
    config: str | None = None,
    header: Sequence[str] | None = None,
    last_is_optional: bool = False,
) -> list[Split]:
    """Return parts of a data set, not read yet.

    Args:
        path: Folder with a file for each part, or hub id.
        names: Possible names of each part; the first that is there is taken.
        suffixes: Possible kinds of files, of `TABLE_SUFFIXES`.
        hub_names: Names of the parts on the hub, if they are others.
        config: Name of the hub data set's configuration.
        header: Column names of files without a header line.
        last_is_optional: Whether a second part may be missing.

    Raises:
        DataError: If a part is missing.
    """
    folder = resolve(path)
    if folder is None:
        return _hub_splits(path, hub_names or names, config, last_is_optional)
    if folder.is_file():
        raise DataError(folder, found="a file", expected=f"a folder with {names[0][0]}{suffixes[0]}")
    files = [[name + suffix for name in part for suffix in suffixes] for part in names]
    if ".parquet" in suffixes and not find(folder, *files[0]) and any(folder.rglob("*.parquet")):
        return _hub_splits(str(folder), names, None, last_is_optional)
    if last_is_optional and not find(folder, *files[-1]):
        files = files[:1]
    return [file_split(needed_file(folder, *part), header) for part in files]


def file_split(file: Path, header: Sequence[str] | None = None) -> Split:
    """Return the rows of a file, by its kind; see `rows_in`."""
    return Split(file, lambda: rows_in(file, header))


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
    in each line, ``.json`` a list of objects.

    Raises:
        DataError: If the file is damaged. A row with another number of fields raises when it is used.
    """
    kind = file.with_suffix("").suffix if file.suffix == ".gz" else file.suffix
    if kind == ".parquet":
        yield from _parquet_rows(file)
    elif kind == ".json":
        yield from json_items(file)
    elif kind == ".jsonl":
        for number, line in lines_of(file):
            if line:
                yield _object(file, number, _json(line, file, number))
    else:
        for number, fields in _csv_fields(file) if kind == ".csv" else _tsv_fields(file):
            if header is None:
                header = fields
            elif len(fields) == len(header):
                yield Row(file, number, dict(zip(header, fields, strict=True)))
            else:
                yield Row(file, number, None, (f"{len(fields)} fields", f"{len(header)} ({', '.join(header)})"))


def _tsv_fields(file: Path) -> Iterator[tuple[int, list[str]]]:
    return ((number, line.split("\t")) for number, line in lines_of(file) if line)


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


def _hub_splits(path: str, names: Sequence[Sequence[str]], config: str | None, last_is_optional: bool) -> list[Split]:
    datasets = require("datasets", "study")
    logger.info("reading %s by the package datasets, from the hub if it is no folder", path)
    try:
        with quickly_offline():
            loaded = datasets.load_dataset(path, config)
    except (OSError, ValueError, RuntimeError) as error:
        found = f"{not_found(path)}, and the hub said: {short(error)}"
        raise DataError(path, found=found, expected="a local path or the id of a data set") from error
    there = [next((name for name in part if name in loaded), None) for part in names]
    for name, part in zip(there[: 1 if last_is_optional else None], names, strict=False):
        if name is None:
            raise DataError(path, found=f"the splits {', '.join(loaded)}", expected=f"a split {' or '.join(part)}")
    return [_hub_split(f"{path} (hub, {name})", loaded[name]) for name in there if name is not None]


def _hub_split(name: str, data: Any) -> Split:
    def classes(column: str) -> tuple[str, ...]:
        return tuple(getattr(data.features.get(column), "names", None) or ())

    return Split(name, lambda: (Row(name, i, fields) for i, fields in enumerate(data, 1)), classes, is_hub=True)


@contextlib.contextmanager
def quickly_offline() -> Iterator[None]:
    """Let the hub client answer from its cache at once where the hub's name cannot be resolved.

    It would try again for half a minute. Behind a proxy names need not be resolved here, so nothing is changed there.
    """
    host = urllib.parse.urlsplit(huggingface_hub.constants.ENDPOINT).hostname
    kept = huggingface_hub.constants.HF_HUB_OFFLINE
    try:
        if not urllib.request.getproxies():
            socket.getaddrinfo(host, 443)
    except OSError:
        huggingface_hub.constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE = kept
