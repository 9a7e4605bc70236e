"""Handwritten digits: a small vision transformer that was pretrained on 0-4 learns 5-9 from a few examples of each.

Nothing is downloaded: the pictures come with scikit-learn, and the base is pretrained the first time (a few seconds).
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.utils.data import default_collate
from tqdm.auto import tqdm

from structlora_pyg.checks import ConfigError, require
from structlora_pyg.files import replace_file, short
from structlora_pyg.study.config import DataConfig, ModelConfig
from structlora_pyg.study.tasks.base import Batch, ScoringTask, Task, auxiliary, inputs_of, register
from structlora_pyg.study.tasks.limits import subsample
from structlora_pyg.study.tasks.loading import ModelError

logger = logging.getLogger(__name__)

CLASSES = 5  # 0-4 before, 5-9 after
HELD_OUT = 30  # pictures per class to choose settings by
PRETRAINING: dict[str, Any] = {"steps": 300, "batch_size": 64, "lr": 2e-3, "noise": 0.6, "weight_decay": 0.05}
Pictures = tuple[Tensor, Tensor]  # (n, 1, 8, 8) in [-1, 1]; (n,) classes from 0


@dataclass(frozen=True, kw_only=True)
class NetworkTask(ScoringTask):
    """Classification by a network that takes the tensors of a batch by name and returns logits (B, classes)."""

    def collate(self, examples: Sequence[Any]) -> Batch:
        """Return ``x`` (B, ...) and ``labels`` (B,) of pairs of a tensor and its class."""
        return dict(zip(("x", "labels"), default_collate(list(examples)), strict=True))

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return cross-entropy and the auxiliary loss."""
        return F.cross_entropy(self.scores(model, batch), batch["labels"]) + auxiliary(model, batch["labels"])

    def scores(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return logits (B, classes)."""
        kind = next(self.model.parameters()).dtype
        inputs = {k: v.to(kind) if v.is_floating_point() else v for k, v in inputs_of(batch).items()}
        return model(**inputs).float()


def read_digits() -> dict[str, Pictures]:
    """Return scikit-learn's handwritten digits in four parts, the same for everybody.

    Returns:
        ``known``: the digits 0-4, to pretrain with. Of the digits 5-9 ``test``, half of them; ``validation``, 30 others
        of each class; ``pool``, the rest, from which training examples are drawn.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    raw = load_digits()
    x = torch.tensor(raw.images, dtype=torch.float32).unsqueeze(1) / 8.0 - 1.0
    y = torch.tensor(raw.target, dtype=torch.long)
    new = torch.nonzero(y >= CLASSES).flatten()
    train, test = train_test_split(new.numpy(), test_size=0.5, random_state=0, stratify=y[new].numpy())
    held_out = first_of_each(y[train], HELD_OUT)
    chosen = {"validation": train[held_out.numpy()], "pool": train[~held_out.numpy()], "test": test}
    parts = {name: (x[index], y[index] - CLASSES) for name, index in chosen.items()}
    return {"known": (x[y < CLASSES], y[y < CLASSES]), **parts}


def first_of_each(labels: Tensor, count: int) -> Tensor:
    """Return a mask (n,) of the first `count` examples of every class, given classes (n,)."""
    return (labels.unsqueeze(1) == labels).tril(-1).sum(1) < count


def draw(pool: Pictures, data: DataConfig, seed: int) -> Pictures:
    """Return the training examples of a seed, equally many of every class unless all are wanted.

    Raises:
        ConfigError: If ``data.train_limit`` cannot be met.
    """
    least = int(torch.bincount(pool[1]).min())
    if data.train_limit is None and data.train_fraction == 1.0:
        return pool
    count = data.train_limit or CLASSES * max(1, round(data.train_fraction * least))
    if count % CLASSES or count > CLASSES * least:
        wanted = f"give a multiple of {CLASSES} up to {CLASSES * least}"
        raise ConfigError(
            [f"data.train_limit={count}: task=digits draws equally many examples of {CLASSES} classes; {wanted}"]
        )
    order = torch.randperm(len(pool[1]), generator=torch.Generator().manual_seed(seed))
    chosen = order[first_of_each(pool[1][order], count // CLASSES)]
    return pool[0][chosen], pool[1][chosen]


@register(
    "digits",
    "which of the digits 5-9, by a model that knows 0-4? For trying things out, no download; accuracy",
    libraries=("timm",),
)
def digits_task(model: ModelConfig, data: DataConfig, seed: int) -> Task:
    """Return the digits 5-9 and a vision transformer of timm that knows 0-4.

    With ``data.validation_share`` above 0 the validation pictures are evaluated, which are never trained on, instead of
    the test pictures.

    Raises:
        ConfigError, DataError: If there are fewer examples than asked for.
        ModelError: If timm cannot build the model, or it does not fit pictures of 8 x 8 pixels in one channel.
    """
    timm = require("timm", "study")
    parts = read_digits()

    def build() -> nn.Module:
        try:
            network = timm.create_model(model.architecture or "", num_classes=CLASSES, **model.overrides)
            network(parts["test"][0][:1])
        except (RuntimeError, TypeError, ValueError, AssertionError) as error:
            raise ModelError(
                f"model.architecture={model.architecture} with model.overrides={model.overrides} is no model of timm "
                f"for pictures of 8 x 8 pixels in one channel: {short(error)}"
            ) from error
        return network

    def batch() -> tuple[dict[str, Tensor], Tensor]:
        x, y = parts["known"]
        chosen = torch.randint(len(y), (PRETRAINING["batch_size"],))
        noise = PRETRAINING["noise"] * torch.randn_like(x[chosen])  # without it the features fit 0-4 and little else
        return {"x": x[chosen] + noise}, y[chosen]

    recipe = {"architecture": model.architecture, **model.overrides, **PRETRAINING, "timm": timm.__version__}
    network: Any = pretrained(Path(model.path), "digits", recipe, build, batch)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network.reset_classifier(CLASSES)
    held_out = list(zip(*parts["validation" if data.validation_share else "test"], strict=True))
    return NetworkTask(
        model=network.to(getattr(torch, model.dtype)),
        train_set=list(zip(*draw(parts["pool"], data, seed), strict=True)),
        eval_set=[held_out[i] for i in subsample(len(held_out), data.eval_limit, seed, "data.eval_limit")],
        metric="accuracy",
        num_labels=CLASSES,
        head=("head",),
    )


def pretrained(
    folder: Path,
    name: str,
    recipe: dict[str, Any],
    build: Callable[[], nn.Module],
    batch: Callable[[], tuple[dict[str, Tensor], Tensor]],
) -> nn.Module:
    """Return a pretrained base, in evaluation mode, from its file in a folder, or pretrain it and keep it there.

    Args:
        folder: Where bases are kept; it need not exist.
        name: Beginning of the file's name; a hash of recipe and version of torch follows.
        recipe: All that the weights depend on, with ``steps``, ``lr`` and ``weight_decay`` of the pretraining.
        build: Returns the network with new weights.
        batch: Draws the inputs of the network by name and their classes.
    """
    text = json.dumps({**recipe, "torch": torch.__version__}, sort_keys=True)
    file = folder / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.safetensors"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = build()
        try:
            network.load_state_dict(load_file(file))
            return network.eval()
        except (OSError, SafetensorError, RuntimeError) as error:
            if file.exists():
                logger.warning("%s is damaged (%s); the base is pretrained again", file, short(error))
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # the same base on every machine; more threads would not be faster
        torch.manual_seed(0)
        network, steps, lr = build().train(), recipe["steps"], recipe["lr"]
        optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=recipe["weight_decay"])
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
        for _ in tqdm(range(steps), desc="pretraining the base", unit="step", disable=None):
            inputs, labels = batch()
            optimizer.zero_grad()
            F.cross_entropy(network(**inputs), labels).backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        torch.set_num_threads(threads)
    network.zero_grad()  # clipping would count what is left
    replace_file(file, save({key: value.contiguous() for key, value in network.state_dict().items()}))
    return network.eval()
