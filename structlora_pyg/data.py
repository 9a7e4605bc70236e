"""Readers: official files in, checked examples out.

`read_examples` reads GLUE, BoolQ and PIQA, `read_images` CIFAR-100, `read_text` plain text. Each takes a local path
in the official layout, plain or gzipped, or a hub id. A file that is not what it should be stops with one
`DataError` that names the file, the line, what was found and what was expected; nothing is skipped or repaired.
"""

from __future__ import annotations

import logging
import lzma
import zipfile
import zlib
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from structlora_pyg.rows import (
    TEXT_SUFFIXES,
    DataError,
    Row,
    hub_splits,
    json_rows,
    lines_of,
    nonempty,
    resolve,
    tsv_rows,
)

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
CIFAR_CLASSES = 100
CUT_SEED = 0  # of validation shares and of BoolQ without train.jsonl, whatever the seed of the run


def read_examples(task: str, path: str, validation_share: float = 0.0) -> tuple[list[Any], list[Any]]:
    """Read the training and the evaluation split of a text task with labels.

    The evaluation split is the official development split. BoolQ without an official ``train.jsonl`` is cut from its
    development split, two thirds for training; questions about one passage stay on one side, and the cut depends on
    the data alone.

    Args:
        task: ``rte``, ``mrpc``, ``cola``, ``stsb``, ``wnli``, ``boolq`` or ``piqa``.
        path: Folder in the official layout, or hub id; see `resolve`.
        validation_share: If > 0, evaluate on this share cut from the training split; the official evaluation split is
            then not even opened.

    Returns:
        The two splits: `TextExample`, or `ChoiceExample` for ``piqa``. RTE's classes are 0 entailment and 1
        not_entailment; MRPC's, CoLA's, WNLI's and BoolQ's are 0 no and 1 yes; STS-B has scores from 0 to 5.

    Raises:
        DataError: If anything is missing or malformed.
    """
    official = not validation_share
    folder = resolve(path)
    if folder is not None and not folder.is_dir():
        raise DataError(folder, found="a file", expected=f"the folder of {task}")
    parts: list[list[Any]]
    if folder is None:
        names = ("train", "validation") if official else ("train",)
        splits = hub_splits(path, task if path.rsplit("/", 1)[-1] == "glue" else None, names)
        parts = [nonempty([_hub_example(task, row) for row in rows], rows.name) for rows in splits]
    elif task == "boolq":
        parts = _boolq(folder, official)
    elif task == "piqa":
        files = [_split_file(folder, f"{split}.jsonl") for split in ("train", "valid")[: 1 + official]]
        parts = [nonempty([_piqa_example(row) for row in json_rows(f)], f) for f in files]
    else:
        table = GLUE[task]
        columns = (*table.texts, table.label)
        files = [_split_file(folder, f"{split}.tsv") for split in ("train", "dev")[: 1 + official]]
        parts = [nonempty([_glue_example(row, table) for row in tsv_rows(f, columns, table.header)], f) for f in files]
    if official:
        return parts[0], parts[1]
    groups = [example.second for example in parts[0]] if task == "boolq" else range(len(parts[0]))
    train, held_out = _checked_cut(groups, validation_share, path)
    return [parts[0][i] for i in train], [parts[0][i] for i in held_out]


def read_images(path: str, validation_share: float = 0.0) -> tuple[Images, Images]:
    """Read the training and the test split of CIFAR-100.

    Args:
        path: An ``.npz`` with arrays ``x_train``, ``y_train``, ``x_test``, ``y_test`` (pixels uint8 of shape
            (N, height, width, 3), labels in [0, 100)), a folder that holds one such file, or a hub id.
        validation_share: If > 0, return a share cut from the training split instead of the test split, which is then
            not read.

    Raises:
        DataError: If anything is missing or malformed.
    """
    file = resolve(path)
    splits = ("train",) if validation_share else ("train", "test")
    if file is not None and file.is_dir():
        found = sorted(file.glob("*.npz"))
        if len(found) != 1:
            names = ", ".join(f.name for f in found) or "no .npz file"
            raise DataError(file, found=names, expected="exactly one .npz file, or the path of the file itself")
        file = found[0]
    if file is None:
        images = _hub_images(path, splits)
    else:
        arrays = _npz(file, [f"{part}_{split}" for split in splits for part in "xy"])
        images = [_checked_images(file, split, arrays) for split in splits]
    if not validation_share:
        return images[0], images[1]
    train, held_out = _checked_cut(range(len(images[0].labels)), validation_share, path)
    pixels, labels = images[0]
    return Images(pixels[train], labels[train]), Images(pixels[held_out], labels[held_out])


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
    train_file = _find(folder, "train.jsonl")
    parts = []
    if official or train_file is None:
        dev_file = _split_file(folder, "dev.jsonl")
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


def cut(groups: Sequence[Hashable], share: float) -> tuple[list[int], list[int]]:
    """Return the indices of a training and a held-out part, which depend on nothing but the arguments.

    Args:
        groups: The group of every example; a group stays on one side.
        share: Part of the examples that is held out, in (0, 1).
    """
    members: dict[Hashable, list[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)
    order = torch.randperm(len(members), generator=torch.Generator().manual_seed(CUT_SEED)).tolist()
    sides = list(members.values())
    train: list[int] = []
    for i in order:
        # A little slack: 22 * (1 - 0.5) must not become 10.
        if len(train) + len(sides[i]) <= len(groups) * (1 - share) + 1e-6:
            train += sides[i]
    chosen = set(train)
    return sorted(train), [i for i in range(len(groups)) if i not in chosen]


def _checked_cut(groups: Sequence[Hashable], share: float, path: str) -> tuple[list[int], list[int]]:
    train, held_out = cut(groups, share)
    if not train or not held_out:
        raise DataError(
            path, found=f"{len(groups)} training examples", expected=f"enough to cut validation_share={share:g} from"
        )
    return train, held_out


def _find(folder: Path, name: str) -> Path | None:
    return next((file for file in (folder / name, folder / f"{name}.gz") if file.is_file()), None)


def _split_file(folder: Path, name: str) -> Path:
    file = _find(folder, name)
    if file is None:
        there = ", ".join(sorted(f.name for f in folder.iterdir())[:10]) or "an empty folder"
        raise DataError(folder, found=there, expected=f"a file {name} or {name}.gz")
    return file


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


def _hub_example(task: str, row: Row) -> TextExample | ChoiceExample:
    if task == "boolq":
        return _boolq_example(row)
    if task == "piqa":
        return _piqa_example(row)
    texts = [row.text(column) for column in (("sentence",) if task == "cola" else ("sentence1", "sentence2"))]
    label = row.score("label") if task == "stsb" else row.index("label", 2)
    return TextExample(texts[0], texts[1] if len(texts) == 2 else None, label)


def _hub_images(path: str, splits: Sequence[str]) -> list[Images]:
    images = []
    for rows in hub_splits(path, None, splits):
        pairs = [(np.asarray(row.get("img")), row.index("fine_label", CIFAR_CLASSES)) for row in rows]
        pixels, labels = zip(*nonempty(pairs, rows.name), strict=True)
        images.append(_checked_images(rows.name, "hub", {"x_hub": np.stack(pixels), "y_hub": np.array(labels)}))
    return images
