"""Readers of texts: official files in, checked examples out.

`read_examples` reads GLUE, BoolQ and PIQA, `read_text` plain text. Each takes a local path in the official layout,
plain or gzipped, or a hub id. A file that is not what it should be stops with one `DataError` that names the file, the
line, what was found and what was expected; nothing is skipped or repaired, but for QQP, whose official file is broken
in a few places.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from structlora_pyg.study.tasks.image_data import CIFAR_CLASSES, Images, read_images
from structlora_pyg.study.tasks.rows import (
    TEXT_SUFFIXES,
    DataError,
    HubRows,
    Row,
    find,
    hub_splits,
    json_rows,
    lines_of,
    needed_file,
    nonempty,
    resolve,
    tsv_rows,
)
from structlora_pyg.study.tasks.subsets import checked_cut, cut, fraction, subsample

__all__ = [
    "CIFAR_CLASSES",
    "GLUE",
    "ChoiceExample",
    "DataError",
    "Images",
    "Table",
    "TextExample",
    "cut",
    "fraction",
    "read_examples",
    "read_images",
    "read_mismatched",
    "read_text",
    "resolve",
    "subsample",
]

logger = logging.getLogger(__name__)


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


@dataclass(frozen=True, kw_only=True)
class Table:
    """Columns of a GLUE task.

    Args:
        texts: Columns with the sentences.
        label: Column with the label.
        classes: The labels as written in the file, in the order of their indices; None for a score from 0 to 5.
        header: Column names of files without a header line.
        hub_texts: Columns with the sentences in ``nyu-mll/glue``; its label is always an index or a score ``label``.
        dev: Name of the development split, as a file and on the hub.
        broken_rows: Leave out rows with too few fields or an empty text, up to one in a thousand, and count them.
    """

    texts: tuple[str, ...]
    label: str = "label"
    classes: tuple[str, ...] | None = ("0", "1")
    header: tuple[str, ...] | None = None
    hub_texts: tuple[str, ...] = ("sentence1", "sentence2")
    dev: tuple[str, str] = ("dev", "validation")
    broken_rows: bool = False


ENTAILMENT = ("entailment", "not_entailment")
GLUE: dict[str, Table] = {
    "rte": Table(texts=("sentence1", "sentence2"), classes=ENTAILMENT),
    "mrpc": Table(texts=("#1 String", "#2 String"), label="Quality"),
    "cola": Table(texts=("sentence",), header=("source", "label", "mark", "sentence"), hub_texts=("sentence",)),
    "stsb": Table(texts=("sentence1", "sentence2"), label="score", classes=None),
    "wnli": Table(texts=("sentence1", "sentence2")),
    "sst2": Table(texts=("sentence",), hub_texts=("sentence",)),
    "qnli": Table(texts=("question", "sentence"), classes=ENTAILMENT, hub_texts=("question", "sentence")),
    # Questions with a line break fall apart in the official file; everyone leaves these rows out.
    "qqp": Table(
        texts=("question1", "question2"), label="is_duplicate", hub_texts=("question1", "question2"), broken_rows=True
    ),
    "mnli": Table(
        texts=("sentence1", "sentence2"),
        label="gold_label",
        classes=("entailment", "neutral", "contradiction"),
        hub_texts=("premise", "hypothesis"),
        dev=("dev_matched", "validation_matched"),
    ),
}
MISMATCHED = ("dev_mismatched", "validation_mismatched")
BROKEN_SHARE = 1e-3


def read_examples(task: str, path: str, validation_share: float = 0.0) -> tuple[list[Any], list[Any]]:
    """Read the training and the evaluation split of a text task with labels.

    The evaluation split is the official development split, for MNLI the matched one. BoolQ without an official
    ``train.jsonl`` is cut from its development split, two thirds for training; questions about one passage stay on one
    side, and the cut depends on the data alone.

    Args:
        task: A key of `GLUE`, ``boolq`` or ``piqa``.
        path: Folder in the official layout, or hub id; see `resolve`.
        validation_share: If > 0, evaluate on this share cut from the training split; the official evaluation split is
            then not even opened.

    Returns:
        The two splits: `TextExample`, or `ChoiceExample` for ``piqa``. RTE's and QNLI's classes are 0 entailment and 1
        not_entailment; MNLI's are 0 entailment, 1 neutral and 2 contradiction; SST-2's are 0 negative and 1 positive;
        those of MRPC, QQP, CoLA, WNLI and BoolQ are 0 no and 1 yes; STS-B has scores from 0 to 5.

    Raises:
        DataError: If anything is missing or malformed.
    """
    official = not validation_share
    folder = _folder(task, path)
    parts: list[list[Any]]
    if folder is None:
        dev = GLUE[task].dev[1] if task in GLUE else "validation"
        splits = _hub(task, path, ("train", dev)[: 1 + official])
        parts = [_from_hub(task, rows) for rows in splits]
    elif task == "boolq":
        parts = _boolq(folder, official)
    elif task == "piqa":
        files = [needed_file(folder, f"{split}.jsonl") for split in ("train", "valid")[: 1 + official]]
        parts = [nonempty([_piqa_example(row) for row in json_rows(f)], f) for f in files]
    else:
        table = GLUE[task]
        files = [needed_file(folder, f"{split}.tsv") for split in ("train", table.dev[0])[: 1 + official]]
        parts = [_glue(file, table) for file in files]
    if official:
        return parts[0], parts[1]
    groups = [example.second for example in parts[0]] if task == "boolq" else range(len(parts[0]))
    train, held_out = checked_cut(groups, validation_share, path)
    return [parts[0][i] for i in train], [parts[0][i] for i in held_out]


def read_mismatched(path: str) -> list[TextExample]:
    """Read MNLI's development split of genres that its training split has none of.

    Args:
        path: Folder with ``dev_mismatched.tsv``, or hub id.

    Raises:
        DataError: If it is missing or malformed.
    """
    folder = _folder("mnli", path)
    if folder is not None:
        return _glue(needed_file(folder, f"{MISMATCHED[0]}.tsv"), GLUE["mnli"])
    (rows,) = _hub("mnli", path, MISMATCHED[1:])
    return _from_hub("mnli", rows)


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
        (rows,) = hub_splits(path, None, ("train",))
        return nonempty([row.text("text") for row in rows], rows.name)
    files = sorted(f for f in source.iterdir() if not f.name.startswith(".")) if source.is_dir() else [source]
    if not files:
        raise DataError(source, found="an empty folder", expected=f"files ending in {', '.join(TEXT_SUFFIXES)}")
    documents: list[str] = []
    for file in files:
        if not file.name.endswith(TEXT_SUFFIXES):
            raise DataError(file, found="another kind of file", expected=f"names ending in {', '.join(TEXT_SUFFIXES)}")
        if ".jsonl" in file.name:
            documents += nonempty([row.text("text") for row in json_rows(file)], file)
        else:
            text = "\n".join(line for _, line in lines_of(file))
            if not text.strip():
                raise DataError(file, found="no text", expected="at least one word")
            documents.append(text)
    return documents


def _folder(task: str, path: str) -> Path | None:
    folder = resolve(path)
    if folder is not None and not folder.is_dir():
        raise DataError(folder, found="a file", expected=f"the folder of {task}")
    return folder


def _glue(file: Path, table: Table) -> list[TextExample]:
    broken: list[int] = []
    columns = (*table.texts, table.label)
    rows: Iterable[Row] = tsv_rows(file, columns, table.header, broken if table.broken_rows else None)
    if table.broken_rows:
        rows = _whole_rows(rows, table.texts, broken, file)
    return nonempty([_glue_example(row, table) for row in rows], file)


def _whole_rows(rows: Iterable[Row], texts: Sequence[str], broken: list[int], file: Path | str) -> list[Row]:
    """Return the rows whose texts are not empty; raise if more are broken than an official file has."""
    whole = []
    for row in rows:
        if all(str(row.get(column)).strip() for column in texts):
            whole.append(row)
        else:
            broken.append(row.line or 0)
    if len(broken) > BROKEN_SHARE * len(whole):
        raise DataError(
            file, line=min(broken), found=f"{len(broken)} of {len(whole) + len(broken)} rows with missing fields",
            expected=f"at most one in {1 / BROKEN_SHARE:.0f}",
        )  # fmt: skip
    if broken:
        logger.warning("%s: left out %d rows with missing fields, the first in line %d", file, len(broken), min(broken))
    return whole


def _glue_example(row: Row, table: Table) -> TextExample:
    texts = [row.text(column) for column in table.texts]
    label = row.score(table.label) if table.classes is None else row.one_of(table.label, table.classes)
    return TextExample(texts[0], texts[1] if len(texts) == 2 else None, label)


def _boolq_example(row: Row) -> TextExample:
    return TextExample(row.text("question"), row.text("passage"), row.flag("answer"))


def _piqa_example(row: Row) -> ChoiceExample:
    choices = (row.text("sol1"), row.text("sol2"))
    return ChoiceExample(row.text("goal"), choices, row.index("label", len(choices)))


def _boolq(folder: Path, official: bool) -> list[list[TextExample]]:
    """Return the training split and, if `official`, the evaluation split."""
    train_file = find(folder, "train.jsonl")
    parts = []
    if official or train_file is None:
        dev_file = needed_file(folder, "dev.jsonl")
        parts = [nonempty([_boolq_example(row) for row in json_rows(dev_file)], dev_file)]
    if train_file is not None:
        return [nonempty([_boolq_example(row) for row in json_rows(train_file)], train_file), *parts]
    (dev,) = parts
    train, held_out = cut([example.second for example in dev], 1 / 3)
    if not train or not held_out:
        raise DataError(dev_file, found="questions about a single passage", expected="two or more to cut between")
    logger.warning(
        "%s has no train.jsonl: the %d questions of %s are cut into %d for training and %d for evaluation, so the "
        "scores cannot be compared with those of the official split",
        folder, len(dev), dev_file.name, len(train), len(held_out),
    )  # fmt: skip
    return [[dev[i] for i in part] for part in ((train, held_out) if official else (train,))]


def _hub(task: str, path: str, splits: tuple[str, ...]) -> list[HubRows]:
    return hub_splits(path, task if path.rsplit("/", 1)[-1] == "glue" else None, splits)


def _from_hub(task: str, rows: HubRows) -> list[Any]:
    table = GLUE.get(task)
    if table is None:
        return nonempty([(_boolq_example if task == "boolq" else _piqa_example)(row) for row in rows], rows.name)
    whole = _whole_rows(rows, table.hub_texts, [], rows.name) if table.broken_rows else rows
    return nonempty([_glue_hub_example(row, table) for row in whole], rows.name)


def _glue_hub_example(row: Row, table: Table) -> TextExample:
    texts = [row.text(column) for column in table.hub_texts]
    label = row.score("label") if table.classes is None else row.index("label", len(table.classes))
    return TextExample(texts[0], texts[1] if len(texts) == 2 else None, label)
