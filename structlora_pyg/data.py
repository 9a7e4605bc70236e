"""Readers: official files in, checked examples out.

`read_examples` reads GLUE, BoolQ and PIQA, `read_images` CIFAR-100, `read_text` plain text. Each takes a local path
in the official layout, plain or gzipped, or a hub id. A file that is not what it should be stops with one
`DataError` that names the file, the line, what was found and what was expected; nothing is skipped or repaired.
"""

from __future__ import annotations

import gzip
import json
import logging
import lzma
import math
import os
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

logger = logging.getLogger(__name__)

DATA_VARIABLE = "STRUCTLORA_DATA"
TEXT_SUFFIXES = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz")
FILE_SUFFIXES = (*TEXT_SUFFIXES, ".tsv", ".npz", ".gz", ".json", ".safetensors", ".bin", ".pt", ".pth")
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


class TextExample(NamedTuple):
    """One or two texts and a label.

    Attributes:
        first: First text.
        second: Second text, None for tasks with a single one.
        label: Class index, or the score of a regression task.
    """

    first: str
    second: str | None
    label: int | float


class ChoiceExample(NamedTuple):
    """A goal and its possible solutions.

    Attributes:
        goal: Text that every choice continues.
        choices: The solutions.
        label: Index of the right one.
    """

    goal: str
    choices: tuple[str, ...]
    label: int


class Images(NamedTuple):
    """Pictures of one size.

    Attributes:
        pixels: uint8, shape (N, height, width, 3).
        labels: int64, shape (N,).
    """

    pixels: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Table:
    """Columns of a GLUE task.

    Args:
        texts: Columns with the sentences.
        label: Column with the label.
        classes: The labels as written in the file, in the order of their indices; None for a score from 0 to 5.
        header: Column names of files without a header line.
    """

    texts: tuple[str, ...]
    label: str = "label"
    classes: tuple[str, ...] | None = ("0", "1")
    header: tuple[str, ...] | None = None


GLUE: dict[str, Table] = {
    "rte": Table(texts=("sentence1", "sentence2"), classes=("entailment", "not_entailment")),
    "mrpc": Table(texts=("#1 String", "#2 String"), label="Quality"),
    "cola": Table(texts=("sentence",), header=("source", "label", "mark", "sentence")),
    "stsb": Table(texts=("sentence1", "sentence2"), label="score", classes=None),
    "wnli": Table(texts=("sentence1", "sentence2")),
}
MAX_SCORE = 5.0
CIFAR_CLASSES = 100


def read_examples(task: str, path: str) -> tuple[list[Any], ...]:
    """Read the training and the evaluation split of a text task with labels.

    The evaluation split is the official development split. BoolQ without an official ``train.jsonl`` is cut from its
    development split, two thirds for training; questions about one passage stay on one side, and the cut depends on
    the data alone.

    Args:
        task: ``rte``, ``mrpc``, ``cola``, ``stsb``, ``wnli``, ``boolq`` or ``piqa``.
        path: Folder in the official layout, or hub id; see `resolve`.

    Returns:
        The two splits: `TextExample`, or `ChoiceExample` for ``piqa``. RTE's classes are 0 entailment and 1
        not_entailment; MRPC's, CoLA's, WNLI's and BoolQ's are 0 no and 1 yes; STS-B has scores from 0 to 5.

    Raises:
        DataError: If anything is missing or malformed.
    """
    folder = resolve(path)
    if folder is None:
        splits = _hub_splits(path, task if path.rsplit("/", 1)[-1] == "glue" else None, ("train", "validation"))
        return tuple(_nonempty([_hub_example(task, row) for row in rows], rows.name) for rows in splits)
    if not folder.is_dir():
        raise DataError(folder, found="a file", expected=f"the folder of {task}")
    if task == "boolq":
        return _boolq(folder)
    if task == "piqa":
        files = [_split_file(folder, f"{split}.jsonl") for split in ("train", "valid")]
        return tuple(_nonempty([_piqa_example(row) for row in _json_rows(f)], f) for f in files)
    table = GLUE[task]
    files = [_split_file(folder, f"{split}.tsv") for split in ("train", "dev")]
    return tuple(_nonempty([_glue_example(row, table) for row in _tsv_rows(f, table)], f) for f in files)


def read_images(path: str) -> tuple[Images, Images]:
    """Read the training and the test split of CIFAR-100.

    Args:
        path: An ``.npz`` with arrays ``x_train``, ``y_train``, ``x_test``, ``y_test`` (pixels uint8 of shape
            (N, height, width, 3), labels in [0, 100)), a folder that holds one such file, or a hub id.

    Raises:
        DataError: If anything is missing or malformed.
    """
    file = resolve(path)
    if file is None:
        return _hub_images(path)
    if file.is_dir():
        found = sorted(file.glob("*.npz"))
        if len(found) != 1:
            names = ", ".join(f.name for f in found) or "no .npz file"
            raise DataError(file, found=names, expected="exactly one .npz file, or the path of the file itself")
        file = found[0]
    arrays = _npz(file, ("x_train", "y_train", "x_test", "y_test"))
    train, test = (_checked_images(file, split, arrays) for split in ("train", "test"))
    return train, test


def read_text(path: str) -> list[str]:
    """Read plain text.

    Args:
        path: A ``.txt`` file (one document), a ``.jsonl`` file with a key ``text`` (one document a line), either of
            them gzipped, a folder of such files (read in the order of their names, other files refused), or a hub id
            whose ``train`` split has a column ``text``.

    Raises:
        DataError: If anything is missing, malformed or empty.
    """
    source = resolve(path)
    if source is None:
        (rows,) = _hub_splits(path, None, ("train",))
        return _nonempty([row.text("text") for row in rows], rows.name)
    files = sorted(f for f in source.iterdir() if not f.name.startswith(".")) if source.is_dir() else [source]
    if not files:
        raise DataError(source, found="an empty folder", expected=f"files ending in {', '.join(TEXT_SUFFIXES)}")
    documents: list[str] = []
    for file in files:
        if not file.name.endswith(TEXT_SUFFIXES):
            raise DataError(file, found="another kind of file", expected=f"names ending in {', '.join(TEXT_SUFFIXES)}")
        if ".jsonl" in file.name:
            documents += _nonempty([row.text("text") for row in _json_rows(file)], file)
        else:
            text = "\n".join(line for _, line in _lines(file))
            if not text.strip():
                raise DataError(file, found="no text", expected="at least one word")
            documents.append(text)
    return documents


def subsample(count: int, limit: int | None, seed: int, name: str = "limit") -> list[int]:
    """Return the indices, in rising order, of `limit` of `count` examples drawn with the seed; all if it is None.

    Args:
        count: Number of examples there are.
        limit: Number of examples wanted.
        seed: The same seed and numbers give the same indices on every machine.
        name: Name of the setting, for the error.

    Raises:
        DataError: If more are wanted than there are; such a limit would have no effect.
    """
    if limit is None:
        return list(range(count))
    if limit > count:
        raise DataError(name, found=f"{limit}", expected=f"at most the {count} examples there are; lower or remove it")
    drawn = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:limit]
    return sorted(drawn.tolist())


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


class _Row:
    """Fields of one line, and typed access that knows where they came from."""

    def __init__(self, file: Path | str, line: int, fields: Mapping[str, Any]) -> None:
        self.file, self.line, self.fields = file, line, fields

    def wrong(self, *, found: str, expected: str) -> DataError:
        return DataError(self.file, line=self.line, found=found, expected=expected)

    def get(self, name: str) -> Any:
        if name not in self.fields:
            raise self.wrong(found=f"only {', '.join(self.fields)}", expected=f"a column {name!r}")
        return self.fields[name]

    def text(self, name: str) -> str:
        value = self.get(name)
        if not isinstance(value, str) or not value.strip():
            raise self.wrong(found=f"{name} = {value!r}", expected="a text that is not empty")
        return value

    def index(self, name: str, count: int) -> int:
        value = self.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < count:
            raise self.wrong(found=f"{name} = {value!r}", expected=f"an integer from 0 to {count - 1}")
        return value

    def flag(self, name: str) -> int:
        value = self.get(name)
        if not isinstance(value, bool):
            raise self.wrong(found=f"{name} = {value!r}", expected="true or false")
        return int(value)

    def score(self, name: str) -> float:
        value = self.get(name)
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not 0.0 <= number <= MAX_SCORE:
            raise self.wrong(found=f"{name} = {value!r}", expected=f"a number from 0 to {MAX_SCORE:g}")
        return number

    def one_of(self, name: str, allowed: Sequence[str]) -> int:
        value = self.get(name)
        if value not in allowed:
            raise self.wrong(found=f"{name} = {value!r}", expected=f"one of {', '.join(allowed)}")
        return allowed.index(value)


def _glue_example(row: _Row, table: Table) -> TextExample:
    texts = [row.text(column) for column in table.texts]
    label = row.score(table.label) if table.classes is None else row.one_of(table.label, table.classes)
    return TextExample(texts[0], texts[1] if len(texts) == 2 else None, label)


def _boolq_example(row: _Row) -> TextExample:
    return TextExample(row.text("question"), row.text("passage"), row.flag("answer"))


def _piqa_example(row: _Row) -> ChoiceExample:
    choices = (row.text("sol1"), row.text("sol2"))
    return ChoiceExample(row.text("goal"), choices, row.index("label", len(choices)))


def _boolq(folder: Path) -> tuple[list[TextExample], ...]:
    dev_file = _split_file(folder, "dev.jsonl")
    dev = _nonempty([_boolq_example(row) for row in _json_rows(dev_file)], dev_file)
    train_file = _find(folder, "train.jsonl")
    if train_file is not None:
        return _nonempty([_boolq_example(row) for row in _json_rows(train_file)], train_file), dev
    train, held_out = _cut_by_passage(dev)
    if not train or not held_out:
        raise DataError(dev_file, found="questions about a single passage", expected="two or more to cut between")
    logger.warning(
        "%s has no train.jsonl: the %d questions of %s are cut into %d for training and %d for evaluation, so the "
        "scores cannot be compared with those of the official split",
        folder, len(dev), dev_file.name, len(train), len(held_out),
    )  # fmt: skip
    return train, held_out


def _cut_by_passage(examples: list[TextExample]) -> tuple[list[TextExample], list[TextExample]]:
    """Return two thirds and one third of the examples, no passage on both sides."""
    passages = list(dict.fromkeys(example.second for example in examples))
    order = torch.randperm(len(passages), generator=torch.Generator().manual_seed(0)).tolist()
    counts: dict[str | None, int] = dict.fromkeys(passages, 0)
    for example in examples:
        counts[example.second] += 1
    training: set[str | None] = set()
    taken = 0
    for i in order:
        if taken + counts[passages[i]] > len(examples) * 2 / 3:
            continue
        training.add(passages[i])
        taken += counts[passages[i]]
    return [e for e in examples if e.second in training], [e for e in examples if e.second not in training]


def _find(folder: Path, name: str) -> Path | None:
    return next((file for file in (folder / name, folder / f"{name}.gz") if file.is_file()), None)


def _split_file(folder: Path, name: str) -> Path:
    file = _find(folder, name)
    if file is None:
        there = ", ".join(sorted(f.name for f in folder.iterdir())[:10]) or "an empty folder"
        raise DataError(folder, found=there, expected=f"a file {name} or {name}.gz")
    return file


def _nonempty(examples: list[T], file: Path | str) -> list[T]:
    if not examples:
        raise DataError(file, found="no examples", expected="at least one")
    return examples


def _lines(file: Path) -> Iterator[tuple[int, str]]:
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
    """Yield lines like `_lines`, without empty lines at the end of the file; one in the middle is an error."""
    blank = None
    for number, line in _lines(file):
        if blank is not None and line:
            raise DataError(file, line=blank, found="an empty line", expected="a row")
        blank = blank if line else blank or number
        if line:
            yield number, line


def _tsv_rows(file: Path, table: Table) -> Iterator[_Row]:
    rows = ((number, line.split("\t")) for number, line in _filled_lines(file))
    header: Sequence[str] | None = table.header
    for number, fields in rows:
        if header is None:
            missing = [column for column in (*table.texts, table.label) if column not in fields]
            if missing:
                wanted = ", ".join(map(repr, missing))
                raise DataError(file, line=number, found=f"the columns {fields!r}", expected=f"also {wanted}")
            header = fields
            continue
        if len(fields) != len(header):
            raise DataError(
                file, line=number, found=f"{len(fields)} fields", expected=f"{len(header)} ({', '.join(header)})"
            )
        yield _Row(file, number, dict(zip(header, fields, strict=True)))


def _json_rows(file: Path) -> Iterator[_Row]:
    for number, line in _filled_lines(file):
        try:
            fields = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise DataError(file, line=number, found=f"broken JSON ({error})", expected="one JSON object") from error
        if not isinstance(fields, dict):
            raise DataError(file, line=number, found=f"a JSON {type(fields).__name__}", expected="one JSON object")
        yield _Row(file, number, fields)


def _npz(file: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    damaged = (OSError, EOFError, ValueError, KeyError, NotImplementedError)
    try:
        archive = np.load(file, allow_pickle=False)
        if isinstance(archive, np.ndarray):
            raise DataError(file, found="a single array", expected=f"an .npz with {', '.join(names)}")
        with archive:
            missing = [name for name in names if name not in archive]
            if missing:
                raise DataError(file, found=f"the arrays {', '.join(archive)}", expected=f"also {', '.join(missing)}")
            return {name: archive[name] for name in names}
    except DataError:
        raise
    except (*damaged, zipfile.BadZipFile, zlib.error, lzma.LZMAError) as error:
        raise DataError(file, found=f"an unreadable archive ({error})", expected="a whole .npz file") from error


def _checked_images(file: Path | str, split: str, arrays: Mapping[str, np.ndarray]) -> Images:
    pixels, labels = arrays[f"x_{split}"], arrays[f"y_{split}"]
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[-1] != 3 or not pixels.size:
        raise DataError(
            file, found=f"x_{split} of {pixels.dtype} and shape {pixels.shape}", expected="uint8 (N, height, width, 3)"
        )
    if labels.shape != pixels.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(
            file, found=f"y_{split} of {labels.dtype} and shape {labels.shape}", expected=f"integers ({len(pixels)},)"
        )
    labels = labels.astype(np.int64)
    bad = np.flatnonzero((labels < 0) | (labels >= CIFAR_CLASSES))
    if bad.size:
        raise DataError(
            file, found=f"y_{split}[{bad[0]}] = {labels[bad[0]]}", expected=f"labels from 0 to {CIFAR_CLASSES - 1}"
        )
    return Images(pixels, labels)


@dataclass(frozen=True)
class _HubRows:
    name: str
    rows: Iterable[Mapping[str, Any]]

    def __iter__(self) -> Iterator[_Row]:
        return (_Row(self.name, number, row) for number, row in enumerate(self.rows, 1))


def _hub_splits(path: str, config: str | None, splits: Sequence[str]) -> list[_HubRows]:
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
    return [_HubRows(f"{path} (hub, {split})", loaded[split]) for split in splits]


def _hub_example(task: str, row: _Row) -> TextExample | ChoiceExample:
    if task == "boolq":
        return _boolq_example(row)
    if task == "piqa":
        return _piqa_example(row)
    texts = [row.text(column) for column in (("sentence",) if task == "cola" else ("sentence1", "sentence2"))]
    label = row.score("label") if task == "stsb" else row.index("label", 2)
    return TextExample(texts[0], texts[1] if len(texts) == 2 else None, label)


def _hub_images(path: str) -> tuple[Images, Images]:
    images = []
    for rows in _hub_splits(path, None, ("train", "test")):
        pairs = [(np.asarray(row.get("img")), row.index("fine_label", CIFAR_CLASSES)) for row in rows]
        pixels, labels = zip(*_nonempty(pairs, rows.name), strict=True)
        images.append(_checked_images(rows.name, "hub", {"x_hub": np.stack(pixels), "y_hub": np.array(labels)}))
    return images[0], images[1]
