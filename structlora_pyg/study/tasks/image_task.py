"""A picture into a class: CIFAR-100 from memory, folders such as ImageNet's from their files."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF
from transformers import PreTrainedModel

from structlora_pyg.files import replace_file
from structlora_pyg.study.config import DataConfig, ModelConfig
from structlora_pyg.study.loading import ImageModel, load_image_model, load_timm_model
from structlora_pyg.study.metrics import class_metrics, joined, top5
from structlora_pyg.study.tasks.base import Batch, Examples, Task, auxiliary, drawn, evaluation, limited
from structlora_pyg.study.tasks.image_data import CIFAR_CLASSES, Images, LabelledFile, read_image_folder, read_images
from structlora_pyg.study.tasks.pictures import open_picture

CROP_AREA = (0.08, 1.0)  # of random crops, as a share of the picture; with CROP_RATIO what ImageNet is trained with
CROP_RATIO = (3 / 4, 4 / 3)
THREADS = min(16, os.cpu_count() or 1)  # that decode pictures


class Picture(NamedTuple):
    """A picture, uint8 of shape (3, height, width), and its class."""

    pixels: Tensor
    label: int


class PictureFile(NamedTuple):
    """A picture not read yet, its class, and whether a random part of it is wanted instead of its centre."""

    file: str
    label: int
    random: bool


@dataclass(frozen=True, kw_only=True)
class ImageTask(Task):
    """A picture into a class. Resizing, flipping and normalising happen on the model's device."""

    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def collate(self, examples: Sequence[Picture]) -> Batch:
        """Return ``pixels`` uint8 of shape (B, 3, height, width) and ``labels`` (B,)."""
        labels = torch.tensor([e.label for e in examples])
        return {"pixels": torch.stack([e.pixels for e in examples]), "labels": labels}

    def pixel_values(self, pixels: Tensor, flip: bool) -> Tensor:
        """Return normalised pictures of shape (B, 3, image_size, image_size), half of them mirrored if `flip`.

        The draw comes from the CPU's generator, so that a resumed run repeats it on every device.
        """
        x = pixels.float() / 255
        if flip:
            mirrored = (torch.rand(len(x)) < 0.5).to(x.device)
            x = torch.where(mirrored.view(-1, 1, 1, 1), x.flip(-1), x)
        if x.shape[-2:] != (self.image_size, self.image_size):
            size = (self.image_size, self.image_size)
            x = F.interpolate(x, size, mode="bicubic", antialias=True).clamp(0, 1)
        mean, std = (torch.tensor(v, device=x.device).view(1, 3, 1, 1) for v in (self.mean, self.std))
        return (x - mean) / std

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return cross-entropy and the auxiliary loss."""
        x = self._ready(batch["pixels"], flip=model.training)
        if isinstance(self.model, PreTrainedModel):
            return model(pixel_values=x, labels=batch["labels"]).loss
        return F.cross_entropy(model(x).float(), batch["labels"]) + auxiliary(model, batch["labels"])

    def evaluate(self, model: nn.Module, loader: Iterable[Batch]) -> dict[str, float]:
        """Return ``loss`` and ``accuracy``; with more than five classes ``top5`` too."""
        pairs = []
        with evaluation(model) as device:
            for batch in loader:
                x = self._ready(batch["pixels"].to(device), flip=False)
                logits = model(pixel_values=x).logits if isinstance(self.model, PreTrainedModel) else model(x)
                pairs.append((logits.float().cpu(), batch["labels"]))
        logits, labels = joined(pairs)
        metrics = class_metrics(logits, labels)
        return metrics if self.num_labels <= 5 else {**metrics, "top5": top5(logits, labels)}

    def save_extras(self, folder: Path) -> None:
        """Write ``preprocessor_config.json`` with size, mean and standard deviation."""
        self._save_preprocessor(folder, size={"height": self.image_size, "width": self.image_size})

    def _save_preprocessor(self, folder: Path, **values: Any) -> None:
        values |= {"image_mean": self.mean, "image_std": self.std, "resample": 3, "do_normalize": True}
        replace_file(folder / "preprocessor_config.json", json.dumps(values, indent=2) + "\n")

    def _ready(self, pixels: Tensor, flip: bool) -> Tensor:
        return self.pixel_values(pixels, flip).to(next(self.model.parameters()).dtype)


@dataclass(frozen=True, kw_only=True)
class ImageFolderTask(ImageTask):
    """A picture file into a class. Files are read when their batch is made.

    Training sees random parts of a picture (8 % to 100 % of its area) and half of them mirrored, evaluation the centre:
    the short side is scaled to ``image_size / crop_pct``, then a square of `image_size` is cut out.

    Args:
        crop_pct: Side of the square as a share of the scaled short side, in (0, 1].
        classes: Names of the classes, in the order of their indices.
    """

    crop_pct: float
    classes: tuple[str, ...]

    def collate(self, examples: Sequence[PictureFile]) -> Batch:  # type: ignore[override]
        """Return ``pixels`` uint8 of shape (B, 3, image_size, image_size) and ``labels`` (B,).

        Random parts are drawn from the CPU's generator, one number a picture, so that a resumed run repeats them.

        Raises:
            DataError: If a file is no picture or damaged; it names the file.
        """
        wanted = [e.random for e in examples]
        seeds = torch.randint(2**62, (len(examples),)).tolist() if any(wanted) else [0] * len(examples)
        with ThreadPoolExecutor(THREADS) as pool:
            pixels = list(pool.map(self._pixels, examples, seeds))
        return {"pixels": torch.stack(pixels), "labels": torch.tensor([e.label for e in examples])}

    def save_extras(self, folder: Path) -> None:
        """Write ``preprocessor_config.json``, and the names of the classes as ``classes.json``."""
        scaled = {"shortest_edge": math.floor(self.image_size / self.crop_pct)}
        side = {"height": self.image_size, "width": self.image_size}
        self._save_preprocessor(folder, size=scaled, do_center_crop=True, crop_size=side)
        replace_file(folder / "classes.json", json.dumps(self.classes, indent=0) + "\n")

    def _pixels(self, example: PictureFile, seed: int) -> Tensor:
        picture = open_picture(example.file)
        side = [self.image_size, self.image_size]
        if example.random:
            top, left, height, width = random_part(picture.height, picture.width, seed)
            part = TF.resized_crop(picture, top, left, height, width, side, InterpolationMode.BICUBIC)
        else:
            scaled = TF.resize(picture, math.floor(self.image_size / self.crop_pct), InterpolationMode.BICUBIC)
            part = TF.center_crop(scaled, side)
        return TF.pil_to_tensor(part)


def random_part(height: int, width: int, seed: int) -> tuple[int, int, int, int]:
    """Return top, left, height and width of a random part of a picture; the same seed gives the same part.

    Ten draws of area (uniform) and ratio of the sides (uniform on a logarithmic scale) are tried; if none fits, as in a
    very long picture, the largest part of an allowed ratio is taken from the middle.
    """
    generator = torch.Generator().manual_seed(seed)
    low, high = (math.log(ratio) for ratio in CROP_RATIO)
    for area, ratio, down, right in torch.rand(10, 4, generator=generator, dtype=torch.double).tolist():
        target = height * width * (CROP_AREA[0] + area * (CROP_AREA[1] - CROP_AREA[0]))
        aspect = math.exp(low + ratio * (high - low))
        h, w = round(math.sqrt(target / aspect)), round(math.sqrt(target * aspect))
        if 0 < h <= height and 0 < w <= width:
            return int(down * (height - h + 1)), int(right * (width - w + 1)), h, w
    h = min(height, max(1, round(width / CROP_RATIO[0])))
    w = min(width, max(1, round(height * CROP_RATIO[1])))
    return (height - h) // 2, (width - w) // 2, h, w


def cifar_task(model: ModelConfig, data: DataConfig, seed: int) -> Task:
    """Return CIFAR-100; see `structlora_pyg.study.tasks.registry.load_task`."""
    splits = read_images(data.path, data.validation_share)
    indices = limited(len(splits[0].labels), len(splits[1].labels), data, seed)
    train, held_out = (_pictures(*part) for part in zip(splits, indices, strict=True))
    loaded = _load(model, data.image_size, CIFAR_CLASSES)
    return ImageTask(
        model=loaded.network, train_set=train, eval_set=held_out, metric="accuracy", num_labels=CIFAR_CLASSES,
        head=loaded.head, image_size=data.image_size, mean=loaded.mean, std=loaded.std,
    )  # fmt: skip


def image_folder_task(model: ModelConfig, data: DataConfig, seed: int) -> Task:
    """Return a folder of pictures, such as ImageNet; see `structlora_pyg.study.tasks.registry.load_task`."""
    classes, *splits = read_image_folder(data.path, data.validation_share)
    train, held_out = drawn(splits, data, seed)
    loaded = _load(model, data.image_size, len(classes))
    return ImageFolderTask(
        model=loaded.network, train_set=_files(train, random=True), eval_set=_files(held_out, random=False),
        metric="accuracy", num_labels=len(classes), head=loaded.head, image_size=data.image_size, mean=loaded.mean,
        std=loaded.std, crop_pct=loaded.crop_pct, classes=classes,
    )  # fmt: skip


def _load(model: ModelConfig, image_size: int, classes: int) -> ImageModel:
    return (load_timm_model if model.library == "timm" else load_image_model)(model, image_size, classes)


def _files(files: Sequence[LabelledFile], random: bool) -> Examples[PictureFile]:
    return Examples([PictureFile(file, label, random) for file, label in files])


def _pictures(images: Images, indices: Sequence[int]) -> Examples[Picture]:
    pixels = torch.from_numpy(images.pixels[indices]).permute(0, 3, 1, 2)
    return Examples([Picture(x, int(y)) for x, y in zip(pixels, images.labels[indices], strict=True)])
