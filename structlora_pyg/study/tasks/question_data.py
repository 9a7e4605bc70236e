"""Questions about pictures: VQA in its official layout, and easy-VQA."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from structlora_pyg.study.tasks.pictures import Pictures
from structlora_pyg.study.tasks.rows import (
    DataError,
    Row,
    content,
    find,
    json_items,
    json_tree,
    needed_file,
    nonempty,
    resolve,
)
from structlora_pyg.study.tasks.subsets import checked_cut

VQA_QUESTIONS = "v2_OpenEnded_mscoco_{split}_questions.json"
VQA_ANNOTATIONS = "v2_mscoco_{split}_annotations.json"
EASY_QUESTIONS = "{split}_questions.json"


class Question(NamedTuple):
    """A question about a picture.

    Attributes:
        picture: The picture's name.
        question: The question.
        answer: What training teaches to say, the most frequent answer.
        answers: What people answered: ten in VQA, one in easy-VQA.
    """

    picture: str
    question: str
    answer: str
    answers: tuple[str, ...]


def read_questions(path: str, validation_share: float = 0.0) -> tuple[Pictures, list[Question], list[Question]]:
    """Read questions about pictures, without opening the pictures.

    Args:
        path: Local folder, in one of two layouts. VQAv2's: ``v2_OpenEnded_mscoco_train2014_questions.json``,
            ``v2_mscoco_train2014_annotations.json`` and the pictures ``train2014/COCO_train2014_<image id>.jpg``; the
            same for ``val2014``. Or easy-VQA's: ``train_questions.json`` and ``test_questions.json``, lists of
            ``[question, answer, image number]``, plain or gzipped, and the pictures ``train/<number>.png`` and
            ``test/<number>.png``, in ``images.zip`` or in folders.
        validation_share: If > 0, return a share cut from the training questions instead of the evaluation split, which
            is then not read. Questions about one picture stay on one side.

    Raises:
        DataError: If anything is missing or malformed, or a picture is not there.
    """
    folder = resolve(path)
    if folder is None or not folder.is_dir():
        raise DataError(path, found="no local folder", expected="the folder of VQAv2 or easy-VQA")
    if find(folder, VQA_QUESTIONS.format(split="train2014")):
        splits = ("train2014",) if validation_share else ("train2014", "val2014")
        pictures, parts = Pictures(folder), [_vqa(folder, split) for split in splits]
    elif find(folder, EASY_QUESTIONS.format(split="train")):
        splits = ("train",) if validation_share else ("train", "test")
        archive = folder / "images.zip"
        pictures = Pictures(archive if archive.is_file() else folder)
        parts = [_easy(needed_file(folder, EASY_QUESTIONS.format(split=split)), split) for split in splits]
    else:
        expected = " (VQAv2), or ".join(
            q.format(split=s) for q, s in ((VQA_QUESTIONS, "train2014"), (EASY_QUESTIONS, "train"))
        )
        raise DataError(folder, found=content(folder), expected=f"{expected} (easy-VQA)")
    pictures.check({item.picture: None for part in parts for item in part})
    if not validation_share:
        return pictures, parts[0], parts[1]
    train, held_out = checked_cut([item.picture for item in parts[0]], validation_share, path)
    return pictures, [parts[0][i] for i in train], [parts[0][i] for i in held_out]


def _vqa(folder: Path, split: str) -> list[Question]:
    file = needed_file(folder, VQA_QUESTIONS.format(split=split))
    annotations = needed_file(folder, VQA_ANNOTATIONS.format(split=split))
    said = {row.number("question_id"): row for row in json_items(annotations, json_tree(annotations), "annotations")}
    questions = []
    for row in json_items(file, json_tree(file), "questions"):
        key = row.number("question_id")
        if key not in said:
            raise row.wrong(found=f"question_id = {key}", expected=f"one that {annotations.name} has answers to")
        picture = f"{split}/COCO_{split}_{row.number('image_id'):012d}.jpg"
        questions.append(
            Question(picture, row.text("question"), said[key].text("multiple_choice_answer"), _answers(said[key]))
        )
    return nonempty(questions, file)


def _answers(row: Row) -> tuple[str, ...]:
    answers = row.get("answers")
    texts = [item["answer"] for item in answers or () if isinstance(item, dict) and isinstance(item.get("answer"), str)]
    if not texts or len(texts) < len(answers):
        raise row.wrong(found=f"answers = {answers!r}", expected="a list of objects, each with a text answer")
    return tuple(texts)


def _easy(file: Path, split: str) -> list[Question]:
    tree = json_tree(file)
    if not isinstance(tree, list):
        raise DataError(file, found=f"a JSON {type(tree).__name__}", expected="a list of [question, answer, number]")
    questions = []
    for i, item in enumerate(tree):
        if not isinstance(item, list) or len(item) != 3:
            raise DataError(f"{file}, [{i}]", found=repr(item), expected="[question, answer, number of the picture]")
        row = Row(f"{file}, [{i}]", None, dict(zip(("question", "answer", "picture"), item, strict=True)))
        answer = row.text("answer")
        questions.append(Question(f"{split}/{row.number('picture')}.png", row.text("question"), answer, (answer,)))
    return nonempty(questions, file)
