"""Captions of pictures: COCO in its official layout, or one file of captions beside an archive of pictures."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from structlora_pyg.study.tasks.pictures import Pictures
from structlora_pyg.study.tasks.rows import (
    DataError,
    content,
    find,
    json_items,
    json_rows,
    json_tree,
    needed_file,
    nonempty,
    resolve,
)
from structlora_pyg.study.tasks.subsets import checked_cut

COCO_YEARS = ("2017", "2014")
MINI_FILE = "captions.jsonl"


class Captioned(NamedTuple):
    """A picture by its name, and what people wrote about it."""

    picture: str
    captions: tuple[str, ...]


def read_captions(path: str, validation_share: float = 0.0) -> tuple[Pictures, list[Captioned], list[Captioned]]:
    """Read pictures with captions, without opening the pictures.

    Args:
        path: Local folder, in one of two layouts. COCO's: ``annotations/captions_train2017.json`` and
            ``captions_val2017.json``, pictures in ``train2017/`` and ``val2017/`` (2014 likewise). Or
            ``captions.jsonl`` with ``split`` (train or val), ``file`` and ``captions`` in each line, the pictures in
            ``images.zip`` or beside it.
        validation_share: If > 0, return a share cut from the training pictures instead of the validation split, which
            is then not read.

    Returns:
        The pictures, and both splits. Line breaks and spaces around captions are not kept.

    Raises:
        DataError: If anything is missing or malformed, or a picture is not there.
    """
    folder = resolve(path)
    if folder is None or not folder.is_dir():
        raise DataError(path, found="no local folder", expected="the folder of COCO captions")
    splits = ("train",) if validation_share else ("train", "val")
    year = next((y for y in COCO_YEARS if find(folder, f"annotations/captions_train{y}.json")), None)
    if year is not None:
        pictures, parts = Pictures(folder), [_coco(folder, split, year) for split in splits]
    elif find(folder, MINI_FILE):
        archive = folder / "images.zip"
        pictures = Pictures(archive if archive.is_file() else folder)
        parts = _mini(needed_file(folder, MINI_FILE), splits)
    else:
        raise DataError(
            folder, found=content(folder), expected=f"annotations/captions_train2017.json (COCO), or {MINI_FILE}"
        )
    pictures.check(item.picture for part in parts for item in part)
    if not validation_share:
        return pictures, parts[0], parts[1]
    train, held_out = checked_cut(range(len(parts[0])), validation_share, path)
    return pictures, [parts[0][i] for i in train], [parts[0][i] for i in held_out]


def _coco(folder: Path, split: str, year: str) -> list[Captioned]:
    file = needed_file(folder, f"annotations/captions_{split}{year}.json")
    tree = json_tree(file)
    names = {row.number("id"): row.text("file_name") for row in json_items(file, tree, "images")}
    captions: dict[int, list[str]] = {key: [] for key in names}
    for row in json_items(file, tree, "annotations"):
        key = row.number("image_id")
        if key not in names:
            raise row.wrong(found=f"image_id = {key}", expected="the id of one of the images")
        captions[key].append(_clean(row.text("caption")))
    bare = next((key for key, texts in captions.items() if not texts), None)
    if bare is not None:
        raise DataError(file, found=f"no caption of image {bare}", expected="one or more for every image")
    return nonempty([Captioned(f"{split}{year}/{names[key]}", tuple(texts)) for key, texts in captions.items()], file)


def _mini(file: Path, splits: Iterable[str]) -> list[list[Captioned]]:
    parts: dict[str, list[Captioned]] = {"train": [], "val": []}
    for row in json_rows(file):
        captions = row.get("captions")
        good = isinstance(captions, list) and captions and all(isinstance(c, str) and c.strip() for c in captions)
        if not good:
            raise row.wrong(found=f"captions = {captions!r}", expected="a list of texts that are not empty")
        split = ("train", "val")[row.one_of("split", ("train", "val"))]
        parts[split].append(Captioned(row.text("file"), tuple(_clean(caption) for caption in captions)))
    return [nonempty(parts[split], f"{file}, split {split}") for split in splits]


def _clean(text: str) -> str:
    return " ".join(text.split())
