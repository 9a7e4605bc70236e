"""Texts about pictures: COCO captions and VQAv2 in their official layouts, and small sets with pictures in a zip."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from structlora_pyg.study.tasks.data import DataError, Row, find, json_items, local_folder, needed_file
from structlora_pyg.study.tasks.images import DAMAGED
from structlora_pyg.study.tasks.splits import Split, file_split, two_parts

COCO_YEARS = ("2017", "2014")
VQA_QUESTIONS = "v2_OpenEnded_mscoco_{}_questions.json"
VQA_ANNOTATIONS = "v2_mscoco_{}_annotations.json"
PictureRoot = Path | zipfile.Path


class PictureText(NamedTuple):
    """What people wrote about a picture."""

    picture: str  # its name below the root
    prompt: str  # what they were asked, empty for captions; in a task, all that the model reads before its answer
    answer: str  # what training teaches to write: the most frequent answer, or the first caption
    references: tuple[str, ...]  # everything they wrote: ten answers in VQAv2, about five captions in COCO
    number: int = 0  # place in its part of a task


def read_captions(path: str, validation_share: float = 0.0) -> tuple[PictureRoot, list[Sequence[PictureText]]]:
    """Return where the pictures are, and the training and the evaluation part of captions; no picture is opened.

    Args:
        path: Local folder, in one of two layouts. COCO's: ``annotations/captions_train2017.json`` and
            ``captions_val2017.json``, pictures in ``train2017/`` and ``val2017/`` (2014 likewise). Or
            ``captions.jsonl`` with ``split`` (train or val), ``file`` and ``captions`` in each line, the pictures in
            ``images.zip`` or beside it.
        validation_share: If > 0, evaluate on a share cut from the training pictures; the other part is not read.

    Raises:
        DataError: If anything is missing or malformed, or a picture is not there.
    """
    folder = local_folder(path, "the folder of COCO captions")
    year = next((y for y in COCO_YEARS if find(folder, f"annotations/captions_train{y}.json")), None)
    if year is None and not find(folder, "captions.jsonl"):
        needed_file(folder, "captions.jsonl", f"annotations/captions_train{COCO_YEARS[0]}.json")

    def read(part: int) -> list[PictureText]:
        split = ("train", "val")[part]
        return _coco(folder, split, year) if year else _mini(folder, split)

    parts = two_parts(read, validation_share, path)
    return _picture_root(folder, parts), parts


def read_questions(path: str, validation_share: float = 0.0) -> tuple[PictureRoot, list[Sequence[PictureText]]]:
    """Return where the pictures are, and the training and the evaluation part of questions; no picture is opened.

    Args:
        path: Local folder, in one of two layouts. VQAv2's: ``v2_OpenEnded_mscoco_train2014_questions.json``,
            ``v2_mscoco_train2014_annotations.json`` and the pictures ``train2014/COCO_train2014_<image id>.jpg``; the
            same for ``val2014``. Or easy-VQA's: ``train_questions.json`` and ``test_questions.json``, lists of
            ``[question, answer, image number]``, and the pictures ``train/<number>.png`` and ``test/<number>.png``, in
            ``images.zip`` or in folders.
        validation_share: If > 0, evaluate on a share cut from the training questions, those about one picture on one
            side; the other part is not read.

    Raises:
        DataError: If anything is missing or malformed, or a picture is not there.
    """
    folder = local_folder(path, "the folder of VQAv2 or easy-VQA")
    official = find(folder, VQA_QUESTIONS.format("train2014"))
    if not official:
        needed_file(folder, "train_questions.json", VQA_QUESTIONS.format("train2014"))
    names, layout = (("train2014", "val2014"), _vqa) if official else (("train", "test"), _easy)
    parts = two_parts(lambda part: layout(folder, names[part]), validation_share, path, lambda item: item.picture)
    return _picture_root(folder, parts), parts


def _picture_root(folder: Path, parts: Iterable[Iterable[PictureText]]) -> PictureRoot:
    """Return ``images.zip`` or the folder, after checking that every picture is there and none leads out of it."""
    root: PictureRoot = folder
    if (folder / "images.zip").is_file():
        try:
            root = zipfile.Path(folder / "images.zip")
        except DAMAGED as error:
            found = f"an unreadable archive ({error})"
            raise DataError(folder / "images.zip", found=found, expected="a whole .zip file") from error
    for name in {item.picture: None for part in parts for item in part}:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise DataError(str(root), found=f"the picture {name}", expected="only names of pictures inside of it")
        if not (root / name).is_file():
            raise DataError(str(root), found=f"no picture {name}", expected="every picture that there is a text about")
    return root


def _captioned(picture: str, captions: Iterable[str]) -> PictureText:
    cleaned = tuple(" ".join(caption.split()) for caption in captions)
    return PictureText(picture, "", cleaned[0], cleaned)


def _coco(folder: Path, split: str, year: str) -> list[PictureText]:
    file = needed_file(folder, f"annotations/captions_{split}{year}.json")
    images = Split(file, partial(json_items, file, "images"))
    names = dict(images.examples(lambda row: (row.integer("id"), row.text("file_name"))))
    captions: dict[int, list[str]] = {key: [] for key in names}
    for row in json_items(file, "annotations"):
        key = row.integer("image_id")
        if key not in names:
            raise row.wrong(found=f"image_id = {key}", expected="the id of one of the images")
        captions[key].append(row.text("caption"))
    bare = next((key for key, texts in captions.items() if not texts), None)
    if bare is not None:
        raise DataError(file, found=f"no caption of image {bare}", expected="one or more for every image")
    return [_captioned(f"{split}{year}/{names[key]}", texts) for key, texts in captions.items()]


def _mini(folder: Path, split: str) -> list[PictureText]:
    file = needed_file(folder, "captions.jsonl")

    def example(row: Row) -> tuple[int, PictureText]:
        captions = row.get("captions")
        if not (isinstance(captions, list) and captions and all(isinstance(c, str) and c.strip() for c in captions)):
            raise row.wrong(found=f"captions = {captions!r}", expected="a list of texts that are not empty")
        return row.one_of("split", ("train", "val")), _captioned(row.text("file"), captions)

    wanted = ("train", "val").index(split)
    found = [item for there, item in file_split(file).examples(example) if there == wanted]
    if not found:
        raise DataError(file, found=f"no line with split = {split!r}", expected="at least one")
    return found


def _vqa(folder: Path, split: str) -> list[PictureText]:
    file = needed_file(folder, VQA_QUESTIONS.format(split))
    annotations = needed_file(folder, VQA_ANNOTATIONS.format(split))
    said = {row.integer("question_id"): row for row in json_items(annotations, "annotations")}

    def example(row: Row) -> PictureText:
        key = row.integer("question_id")
        if key not in said:
            raise row.wrong(found=f"question_id = {key}", expected=f"one that {annotations.name} has answers to")
        answers = said[key].get("answers")
        texts: list[Any] = [item.get("answer") if isinstance(item, dict) else None for item in answers or ()]
        if not texts or not all(isinstance(text, str) for text in texts):
            expected = "a list of objects, each with a text answer"
            raise said[key].wrong(found=f"answers = {answers!r}", expected=expected)
        picture = f"{split}/COCO_{split}_{row.integer('image_id'):012d}.jpg"
        return PictureText(picture, row.text("question"), said[key].text("multiple_choice_answer"), tuple(texts))

    return Split(file, partial(json_items, file, "questions")).examples(example)


def _easy(folder: Path, split: str) -> list[PictureText]:
    file = needed_file(folder, f"{split}_questions.json")

    def example(row: Row) -> PictureText:
        answer = row.text("answer")
        return PictureText(f"{split}/{row.integer('picture')}.png", row.text("question"), answer, (answer,))

    names = ("question", "answer", "picture")
    return Split(file, partial(json_items, file, names=names)).examples(example)
