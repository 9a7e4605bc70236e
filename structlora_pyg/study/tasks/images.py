"""A picture into a class: CIFAR-100 from memory, folders such as ImageNet's from their files."""

from __future__ import annotations

import contextlib
import lzma
import math
import os
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from structlora_pyg.checks import require, short
from structlora_pyg.study.config import DataConfig, ModelConfig
from structlora_pyg.study.tasks import Batch, ScoringTask, Task, register
from structlora_pyg.study.tasks.data import DataError, local_folder, resolve
from structlora_pyg.study.tasks.loading import load_image_model
from structlora_pyg.study.tasks.splits import drawn, find_split, two_parts

LIBRARIES = ("transformers", "timm")
CIFAR_CLASSES, SPLITS = 100, ("train", "test")
PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png")
CROP_AREA, CROP_RATIO = (0.08, 1.0), (3 / 4, 4 / 3)  # of random parts, as ImageNet is trained
THREADS = min(16, os.cpu_count() or 1)  # that decode pictures
DAMAGED = (
    OSError, EOFError, SyntaxError, ValueError, KeyError, NotImplementedError, zipfile.BadZipFile, zlib.error,
    lzma.LZMAError, Image.DecompressionBombError,
)  # fmt: skip


class Picture(NamedTuple):
    """A picture, uint8 of shape (3, height, width), and its class."""

    pixels: Tensor
    label: int


class PictureFile(NamedTuple):
    """A picture not read yet, its class, and whether a random part of it is wanted instead of its centre."""

    file: str
    label: int
    random: bool


@contextlib.contextmanager
def opened(file: Path | zipfile.Path | str) -> Iterator[Image.Image]:
    """Give a picture whose pixels are not read yet.

    Raises:
        DataError: If it is no picture, or turns out to be damaged while it is used; it names the file.
    """
    try:
        with Image.open(file.open("rb") if isinstance(file, zipfile.Path) else file) as picture:
            yield picture
    except DAMAGED as error:
        expected = "a whole JPEG or PNG file; copy it again"
        raise DataError(str(file), found=f"an unreadable picture ({error})", expected=expected) from error


@dataclass(frozen=True, kw_only=True)
class ImageTask(ScoringTask):
    """A picture into a class. Resizing, mirroring and normalising happen on the model's device.

    Args:
        image_size: Side in pixels that the model sees.
        mean: Mean of the colours, in [0, 1], that pictures are normalised with.
        std: Standard deviation of the colours.
    """

    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def collate(self, examples: Sequence[Any]) -> Batch:
        """Return ``pixels`` uint8 of shape (B, 3, height, width) and ``labels`` (B,)."""
        labels = torch.tensor([e.label for e in examples])
        return {"pixels": torch.stack([e.pixels for e in examples]), "labels": labels}

    def pixel_values(self, pixels: Tensor, mirror: bool) -> Tensor:
        """Return normalised pictures of shape (B, 3, image_size, image_size), half of them mirrored if `mirror`.

        The draw comes from the CPU's generator, so that a resumed run repeats it on every device.
        """
        x = pixels.float() / 255
        if mirror:
            mirrored = (torch.rand(len(x)) < 0.5).to(x.device)
            x = torch.where(mirrored.view(-1, 1, 1, 1), x.flip(-1), x)
        size = (self.image_size, self.image_size)
        if x.shape[-2:] != size:
            x = F.interpolate(x, size, mode="bicubic", antialias=True).clamp(0, 1)
        mean, std = (torch.tensor(v, device=x.device).view(1, 3, 1, 1) for v in (self.mean, self.std))
        return ((x - mean) / std).to(next(self.model.parameters()).dtype)

    def scores(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return logits (B, classes)."""
        x = self.pixel_values(batch["pixels"], mirror=model.training)
        return model(pixel_values=x).logits if isinstance(self.model, PreTrainedModel) else model(x)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return cross-entropy and the auxiliary loss."""
        if isinstance(self.model, PreTrainedModel):
            x = self.pixel_values(batch["pixels"], mirror=model.training)
            return model(pixel_values=x, labels=batch["labels"]).loss
        return super().loss(model, batch)


@dataclass(frozen=True, kw_only=True)
class ImageFolderTask(ImageTask):
    """A picture file into a class. Files are read when their batch is made.

    Training sees random parts of a picture (8 % to 100 % of its area) and half of them mirrored, evaluation the centre:
    the short side is scaled to ``image_size / crop_pct``, then a square of `image_size` is cut out.

    Args:
        crop_pct: Side of the square as a share of the scaled short side, in (0, 1].
    """

    crop_pct: float

    def collate(self, examples: Sequence[PictureFile]) -> Batch:
        """Return ``pixels`` uint8 of shape (B, 3, image_size, image_size) and ``labels`` (B,).

        Random parts are drawn in order from the CPU's generator, so that a resumed run repeats them; then threads
        decode. (timm's training transforms draw in the threads, from Python's generator.)

        Raises:
            DataError: If a file is no picture or damaged; it names the file.
        """
        parts = [self._random_part(e.file) if e.random else None for e in examples]
        with ThreadPoolExecutor(THREADS) as pool:
            pixels = list(pool.map(self._pixels, [e.file for e in examples], parts))
        return {"pixels": torch.stack(pixels), "labels": torch.tensor([e.label for e in examples])}

    def _random_part(self, file: str) -> tuple[int, int, int, int]:
        draw = require("torchvision.transforms", "study").RandomResizedCrop.get_params
        with opened(file) as picture:
            return draw(picture, CROP_AREA, CROP_RATIO)

    def _pixels(self, file: str, part: tuple[int, int, int, int] | None) -> Tensor:
        transforms = require("torchvision.transforms.functional", "study")
        bicubic, side = transforms.InterpolationMode.BICUBIC, [self.image_size, self.image_size]
        with opened(file) as picture:
            rgb = picture.convert("RGB")
        if part is not None:
            return transforms.pil_to_tensor(transforms.resized_crop(rgb, *part, side, bicubic))
        scaled = transforms.resize(rgb, math.floor(self.image_size / self.crop_pct), bicubic)
        return transforms.pil_to_tensor(transforms.center_crop(scaled, side))


@register("cifar100", "which of 100 classes does a picture show? CIFAR-100; accuracy, top-5", libraries=LIBRARIES)
def cifar_task(model: ModelConfig, data: DataConfig, seed: int) -> Task:
    """Return CIFAR-100."""
    parts = two_parts(lambda k: [*zip(*read_images(data.path, k), strict=True)], data.validation_share, data.path)
    train, held_out = (
        [Picture(torch.from_numpy(x).permute(2, 0, 1), int(y)) for x, y in part] for part in drawn(parts, data, seed)
    )
    options = load_image_model(model, data.image_size, CIFAR_CLASSES)
    del options["crop_pct"]
    side = {"height": data.image_size, "width": data.image_size}
    return ImageTask(
        train_set=train, eval_set=held_out, metric="accuracy", other_metrics=("top5",), num_labels=CIFAR_CLASSES,
        image_size=data.image_size, preprocessor=_processor(options, size=side, do_center_crop=False), **options,
    )  # fmt: skip


@register(
    "image_folder", "which class does a picture show? train/<class>/ and val/<class>/, as ImageNet; accuracy, top-5",
    libraries=LIBRARIES,
)  # fmt: skip
def image_folder_task(model: ModelConfig, data: DataConfig, seed: int) -> Task:
    """Return a folder of pictures, such as ImageNet."""
    classes, parts = read_image_folder(data.path, data.validation_share)
    train, held_out = drawn(parts, data, seed)
    options = load_image_model(model, data.image_size, len(classes))
    shortest = math.floor(data.image_size / options["crop_pct"])
    side = {"height": data.image_size, "width": data.image_size}
    return ImageFolderTask(
        train_set=[PictureFile(*file, random=True) for file in train],
        eval_set=[PictureFile(*file, random=False) for file in held_out],
        metric="accuracy", other_metrics=("top5",) if len(classes) > 5 else (), num_labels=len(classes),
        image_size=data.image_size, classes=classes,
        preprocessor=_processor(options, size={"shortest_edge": shortest}, crop_size=side), **options,
    )  # fmt: skip


def _processor(options: Mapping[str, Any], **values: Any) -> Any:
    """Return a Transformers image processor that does to pictures what evaluation does."""
    return transformers.CLIPImageProcessor(image_mean=options["mean"], image_std=options["std"], resample=3, **values)


def read_images(path: str, part: int) -> tuple[np.ndarray, np.ndarray]:
    """Return pixels, uint8 (N, height, width, 3), and labels, int64 (N,) in [0, 100), of CIFAR-100.

    Args:
        path: An ``.npz`` with arrays ``x_train``, ``y_train``, ``x_test``, ``y_test``, a folder that holds one such
            file, or a hub id.
        part: 0 for the training split, 1 for the test split.

    Raises:
        DataError: If anything is missing or malformed.
    """
    file, split = resolve(path), SPLITS[part]
    if isinstance(file, Path) and file.is_dir() and not any(file.rglob("*.parquet")):  # else it is as the hub has it
        found = sorted(file.glob("*.npz"))
        if len(found) != 1:
            there = ", ".join(f.name for f in found) or "no .npz file"
            raise DataError(file, found=there, expected="exactly one .npz file, or the path of the file itself")
        file = found[0]
    if not isinstance(file, Path) or file.is_dir():
        rows = find_split(path, [(name,) for name in SPLITS], part)
        pairs = rows.examples(lambda row: (np.asarray(row.get("img")), row.one_of("fine_label", range(CIFAR_CLASSES))))
        x, y = (np.stack(values) for values in zip(*pairs, strict=True))
    else:
        try:
            with np.load(file, mmap_mode="r", allow_pickle=False) as archive:
                x, y = (archive[f"{name}_{split}"] for name in "xy")
        except (MemoryError, AttributeError, TypeError, *DAMAGED) as error:  # a damaged header may ask for terabytes
            expected = f"a whole .npz file with x_{split} and y_{split}"
            raise DataError(file, found=f"an unreadable archive ({short(error)})", expected=expected) from error
    if x.dtype != np.uint8 or x.ndim != 4 or x.shape[-1] != 3 or not x.size:
        found_here = f"x_{split} of {x.dtype} and shape {x.shape}"
        raise DataError(file, found=found_here, expected="uint8 (N, height, width, 3)")
    if y.shape != x.shape[:1] or not np.issubdtype(y.dtype, np.integer):
        raise DataError(file, found=f"y_{split} of {y.dtype} and shape {y.shape}", expected=f"integers ({len(x)},)")
    bad = np.flatnonzero((y < 0) | (y >= CIFAR_CLASSES))
    if bad.size:
        expected = f"labels from 0 to {CIFAR_CLASSES - 1}"
        raise DataError(file, found=f"y_{split}[{bad[0]}] = {y[bad[0]]}", expected=expected)
    return x, y.astype(np.int64)


def read_image_folder(
    path: str, validation_share: float = 0.0
) -> tuple[tuple[str, ...], list[Sequence[tuple[str, int]]]]:
    """Return the classes of ``train/<class>/``, sorted, and the pictures of both splits with the index of their class.

    Pictures, ending in .jpg, .jpeg or .png, are not opened. With a `validation_share` a share cut from the training
    files stands in the place of those of ``val/<class>/``, which is then not looked at.

    Raises:
        DataError: If a split or a class has no picture, ``val`` has a class of its own, or there is a single class.
    """
    folder = local_folder(path, "a folder with train/<class>/ and val/<class>/")
    classes, train = _listed(folder / "train")
    if len(classes) < 2:
        raise DataError(folder / "train", found=f"the class {classes[0]}", expected="two classes or more")

    def evaluated() -> list[tuple[str, int]]:
        there, files = _listed(folder / "val")
        if unknown := sorted(set(there) - set(classes)):
            found = "a class that train lacks"
            raise DataError(folder / "val" / unknown[0], found=found, expected=f"one of its {len(classes)} classes")
        return [(file, classes.index(there[label])) for file, label in files]

    return classes, two_parts(lambda part: evaluated() if part else train, validation_share, path)


def _listed(place: Path) -> tuple[tuple[str, ...], list[tuple[str, int]]]:
    """Return the classes of a split and its pictures, both sorted."""
    folders = require("torchvision.datasets", "study")
    try:
        listed = folders.DatasetFolder(str(place), loader=str, extensions=PICTURE_SUFFIXES)
    except OSError as error:
        expected = f"a folder for each class, with pictures ending in {', '.join(PICTURE_SUFFIXES)}"
        raise DataError(place, found=short(error), expected=expected) from error
    return tuple(listed.classes), listed.samples
