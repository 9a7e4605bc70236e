"""Pictures and their classes: CIFAR-100 as arrays, and folders of picture files."""

from __future__ import annotations

import lzma
import math
import os
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from structlora_pyg.study.tasks.rows import DataError, content, hub_splits, nonempty, resolve
from structlora_pyg.study.tasks.subsets import checked_cut

CIFAR_CLASSES = 100
MOST_COMPRESSION = 1100  # deflate reaches 1032 on zeros
PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png")
LabelledFile = tuple[str, int]


class Images(NamedTuple):
    """Pictures of one size.

    Attributes:
        pixels: uint8, shape (N, height, width, 3).
        labels: int64, shape (N,).
    """

    pixels: np.ndarray
    labels: np.ndarray


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
    train, held_out = checked_cut(range(len(images[0].labels)), validation_share, path)
    pixels, labels = images[0]
    return Images(pixels[train], labels[train]), Images(pixels[held_out], labels[held_out])


def read_image_folder(
    path: str, validation_share: float = 0.0
) -> tuple[tuple[str, ...], list[LabelledFile], list[LabelledFile]]:
    """List the pictures of ``train/<class>/`` and ``val/<class>/``, without opening them.

    Args:
        path: Local folder with ``train`` and ``val``. The files of a class end in .jpg, .jpeg or .png.
        validation_share: If > 0, return a share cut from the training files instead of those of ``val``, which is then
            not looked at.

    Returns:
        The names of the classes, sorted, and the files of both splits with the index of their class.

    Raises:
        DataError: If a split is missing, a class is empty or holds other files, ``val`` has a class that ``train``
            lacks, or there are fewer than two classes.
    """
    folder = resolve(path)
    if folder is None or not folder.is_dir():
        raise DataError(path, found="no local folder", expected="a folder with train/<class>/ and val/<class>/")
    train = _class_folders(folder, "train")
    names = tuple(train)
    if len(names) < 2:
        raise DataError(folder / "train", found=f"the class {names[0]}", expected="two classes or more")
    files = _labelled(train, names)
    if validation_share:
        kept, held_out = checked_cut(range(len(files)), validation_share, path)
        return names, [files[i] for i in kept], [files[i] for i in held_out]
    val = _class_folders(folder, "val")
    unknown = [name for name in val if name not in train]
    if unknown:
        raise DataError(val[unknown[0]], found="a class that train lacks", expected=f"one of its {len(names)} classes")
    return names, files, _labelled(val, names)


def _class_folders(folder: Path, split: str) -> dict[str, Path]:
    """Return the folders of the classes of a split, by name, sorted."""
    place = folder / split
    if not place.is_dir():
        raise DataError(folder, found=content(folder), expected=f"a folder {split} with a folder for each class")
    entries = sorted(entry for entry in place.iterdir() if not entry.name.startswith("."))
    for entry in entries:
        if not entry.is_dir():
            raise DataError(entry, found="a file", expected="only a folder for each class here")
    if not entries:
        raise DataError(place, found="an empty folder", expected="a folder for each class")
    return {entry.name: entry for entry in entries}


def _labelled(folders: Mapping[str, Path], names: Sequence[str]) -> list[LabelledFile]:
    files = []
    for name, folder in folders.items():
        label, found = names.index(name), sorted(f for f in os.listdir(folder) if not f.startswith("."))
        if not found:
            raise DataError(folder, found="an empty class", expected="at least one picture")
        for file in found:
            if not file.lower().endswith(PICTURE_SUFFIXES):
                raise DataError(
                    folder / file,
                    found="another kind of file",
                    expected=f"names ending in {', '.join(PICTURE_SUFFIXES)}",
                )
            files.append((os.path.join(folder, file), label))
    return files


def _npz(file: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    damaged = (OSError, EOFError, ValueError, KeyError, NotImplementedError)
    try:
        archive = np.load(file, mmap_mode="r", allow_pickle=False)
        if isinstance(archive, np.ndarray):
            raise DataError(file, found="a single array", expected=f"an .npz with {', '.join(names)}")
        with archive:
            missing = [name for name in names if name not in archive]
            if missing:
                raise DataError(file, found=f"the arrays {', '.join(archive)}", expected=f"also {', '.join(missing)}")
            for name in names:
                _check_size(file, archive.zip, f"{name}.npy")
            return {name: archive[name] for name in names}
    except DataError:
        raise
    except (*damaged, zipfile.BadZipFile, zlib.error, lzma.LZMAError) as error:
        raise DataError(file, found=f"an unreadable archive ({error})", expected="a whole .npz file") from error


def _check_size(file: Path, archive: zipfile.ZipFile, name: str) -> None:
    """Refuse an array that is larger than what the archive can hold of it, before memory is taken for it."""
    with archive.open(name) as stream:
        read = np.lib.format.read_array_header_1_0
        if np.lib.format.read_magic(stream) != (1, 0):
            read = np.lib.format.read_array_header_2_0
        shape, _, dtype = read(stream)
    stored = archive.getinfo(name).compress_size
    if math.prod(shape) * dtype.itemsize > MOST_COMPRESSION * stored:
        raise DataError(file, found=f"{name} of shape {shape} in {stored} bytes", expected="a whole .npz file")


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


def _hub_images(path: str, splits: Sequence[str]) -> list[Images]:
    images = []
    for rows in hub_splits(path, None, splits):
        pairs = [(np.asarray(row.get("img")), row.index("fine_label", CIFAR_CLASSES)) for row in rows]
        pixels, labels = zip(*nonempty(pairs, rows.name), strict=True)
        images.append(_checked_images(rows.name, "hub", {"x_hub": np.stack(pixels), "y_hub": np.array(labels)}))
    return images
