"""Rows of files and of hub data sets that know where they came from.

`resolve` finds a path of the configuration; `tsv_rows`, `json_rows` and `hub_splits` give `Row` objects whose typed
access raises one `DataError` that names the file, the line, what was found and what was expected.
"""

from __future__ import annotations

import gzip
import json
import logging
import math
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

logger = logging.getLogger(__name__)

DATA_VARIABLE = "STRUCTLORA_DATA"
TEXT_SUFFIXES = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz")
FILE_SUFFIXES = (*TEXT_SUFFIXES, ".tsv", ".npz", ".gz", ".json", ".safetensors", ".bin", ".pt", ".pth")
MAX_SCORE = 5.0
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
    if not _may_be_hub_id(path):
        raise DataError(path, found=not_found(path), expected="an existing file or folder")
    return None


def not_found(path: str) -> str:
    """Return the sentence that names every local place where `resolve` looked for a path."""
    tried = " and ".join(f"'{place}'" for place in _places(path))
    unset = "" if os.environ.get(DATA_VARIABLE) else f" (the environment variable {DATA_VARIABLE} is not set)"
    return f"nothing at {tried}{unset}"


def _places(path: str) -> list[Path]:
    given = Path(path).expanduser()
    if given.is_absolute():
        return [given]
    root = os.environ.get(DATA_VARIABLE)
    return ([Path(root).expanduser() / given] if root else []) + [Path.cwd() / given]


def _may_be_hub_id(path: str) -> bool:
    return bool(re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", path)) and not path.endswith(FILE_SUFFIXES)


class Row:
    """Fields of one line, and typed access that knows where they came from."""

    def __init__(self, file: Path | str, line: int | None, fields: Mapping[str, Any]) -> None:
        self.file, self.line, self.fields = file, line, fields

    def wrong(self, *, found: str, expected: str) -> DataError:
        """Return the error about this row."""
        return DataError(self.file, line=self.line, found=found, expected=expected)

    def get(self, name: str) -> Any:
        """Return a field as it was read."""
        if name not in self.fields:
            raise self.wrong(found=f"only {', '.join(self.fields)}", expected=f"a column {name!r}")
        return self.fields[name]

    def text(self, name: str) -> str:
        """Return a text that is not empty."""
        value = self.get(name)
        if not isinstance(value, str) or not value.strip():
            raise self.wrong(found=f"{name} = {value!r}", expected="a text that is not empty")
        return value

    def index(self, name: str, count: int) -> int:
        """Return an integer from 0 to `count` - 1."""
        value = self.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < count:
            raise self.wrong(found=f"{name} = {value!r}", expected=f"an integer from 0 to {count - 1}")
        return value

    def number(self, name: str) -> int:
        """Return an integer that is not negative."""
        value = self.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise self.wrong(found=f"{name} = {value!r}", expected="an integer >= 0")
        return value

    def flag(self, name: str) -> int:
        """Return 1 for true and 0 for false."""
        value = self.get(name)
        if not isinstance(value, bool):
            raise self.wrong(found=f"{name} = {value!r}", expected="true or false")
        return int(value)

    def score(self, name: str) -> float:
        """Return a number from 0 to 5."""
        value = self.get(name)
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not 0.0 <= number <= MAX_SCORE:
            raise self.wrong(found=f"{name} = {value!r}", expected=f"a number from 0 to {MAX_SCORE:g}")
        return number

    def one_of(self, name: str, allowed: Sequence[str]) -> int:
        """Return the place of the field in `allowed`."""
        value = self.get(name)
        if value not in allowed:
            raise self.wrong(found=f"{name} = {value!r}", expected=f"one of {', '.join(allowed)}")
        return allowed.index(value)


def find(folder: Path, name: str) -> Path | None:
    """Return a file of a folder, plain or gzipped, or None."""
    return next((file for file in (folder / name, folder / f"{name}.gz") if file.is_file()), None)


def needed_file(folder: Path, name: str) -> Path:
    """Return a file of a folder, plain or gzipped; raise if there is none."""
    file = find(folder, name)
    if file is None:
        raise DataError(folder, found=content(folder), expected=f"a file {name} or {name}.gz")
    return file


def content(folder: Path) -> str:
    """Return the first names in a folder, for errors."""
    return ", ".join(sorted(f.name for f in folder.iterdir())[:10]) or "an empty folder"


def nonempty(examples: list[T], file: Path | str) -> list[T]:
    """Return the examples; raise if there is none."""
    if not examples:
        raise DataError(file, found="no examples", expected="at least one")
    return examples


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


def _filled_lines(file: Path) -> Iterator[tuple[int, str]]:
    """Yield lines like `lines_of`, without empty lines at the end of the file; one in the middle is an error."""
    blank = None
    for number, line in lines_of(file):
        if blank is not None and line:
            raise DataError(file, line=blank, found="an empty line", expected="a row")
        blank = blank if line else blank or number
        if line:
            yield number, line


def tsv_rows(
    file: Path, needed: Sequence[str], header: Sequence[str] | None = None, broken: list[int] | None = None
) -> Iterator[Row]:
    """Yield the rows of a tab-separated file; quotes are text, they never join fields or lines.

    Args:
        file: The file, plain or gzipped.
        needed: Columns that have to be there.
        header: Column names of a file without a header line.
        broken: If given, lines with another number of fields are left out, and their numbers are added to this list.

    Raises:
        DataError: If the file is damaged, a column is missing, or a row has another number of fields.
    """
    lines = _filled_lines(file) if broken is None else lines_of(file)
    for number, fields in ((number, line.split("\t")) for number, line in lines):
        if header is None:
            missing = [column for column in needed if column not in fields]
            if missing:
                wanted = ", ".join(map(repr, missing))
                raise DataError(file, line=number, found=f"the columns {fields!r}", expected=f"also {wanted}")
            header = fields
        elif len(fields) == len(header):
            yield Row(file, number, dict(zip(header, fields, strict=True)))
        elif broken is not None:
            broken.append(number)
        else:
            raise DataError(
                file, line=number, found=f"{len(fields)} fields", expected=f"{len(header)} ({', '.join(header)})"
            )


def json_tree(file: Path) -> Any:
    """Return the content of a file that is one JSON value, plain or gzipped."""
    text = "\n".join(line for _, line in lines_of(file))
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(file, found=f"broken JSON ({error})", expected="one whole JSON value") from error


def json_items(file: Path, tree: Any, key: str) -> Iterator[Row]:
    """Yield the objects in the list at a key of a JSON object."""
    items = tree.get(key) if isinstance(tree, dict) else None
    if not isinstance(items, list):
        found = f"the keys {', '.join(tree)}" if isinstance(tree, dict) else f"a JSON {type(tree).__name__}"
        raise DataError(file, found=found, expected=f"a JSON object with a list {key!r}")
    for i, fields in enumerate(items):
        where = f"{file}, {key}[{i}]"
        if not isinstance(fields, dict):
            raise DataError(where, found=f"a JSON {type(fields).__name__}", expected="a JSON object")
        yield Row(where, None, fields)


def json_rows(file: Path) -> Iterator[Row]:
    """Yield the rows of a file with one JSON object a line."""
    for number, line in _filled_lines(file):
        try:
            fields = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise DataError(file, line=number, found=f"broken JSON ({error})", expected="one JSON object") from error
        if not isinstance(fields, dict):
            raise DataError(file, line=number, found=f"a JSON {type(fields).__name__}", expected="one JSON object")
        yield Row(file, number, fields)


@dataclass(frozen=True)
class HubRows:
    """One split of a hub data set.

    Args:
        name: What errors call it.
        rows: Its rows.
    """

    name: str
    rows: Iterable[Mapping[str, Any]]

    def __iter__(self) -> Iterator[Row]:
        return (Row(self.name, number, row) for number, row in enumerate(self.rows, 1))


def hub_splits(path: str, config: str | None, splits: Sequence[str]) -> list[HubRows]:
    """Return splits of a hub data set; the only place that needs the optional package `datasets`."""
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            path,
            found=f"{not_found(path)}, and the package for hub data sets is not installed",
            expected="a local path, or `pip install structlora-pyg[data]`",
        ) from error
    logger.info("%s is not a local path; asking the hub", path)
    try:
        loaded = datasets.load_dataset(path, config)
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(
            path, found=f"{not_found(path)}, and the hub said: {error}", expected="a local path or the id of a data set"
        ) from error
    for split in splits:
        if split not in loaded:
            raise DataError(path, found=f"the splits {', '.join(loaded)}", expected=f"a split {split!r}")
    return [HubRows(f"{path} (hub, {split})", loaded[split]) for split in splits]
