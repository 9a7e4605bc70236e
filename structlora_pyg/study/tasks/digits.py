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

from structlora_pyg.checks import ConfigError, replace_file, require, short
from structlora_pyg.study.config import DataConfig, ModelConfig
from structlora_pyg.study.tasks import Batch, ScoringTask, Task, auxiliary, inputs_of, register
from structlora_pyg.study.tasks.loading import ModelError
from structlora_pyg.study.tasks.splits import subsample

logger = logging.getLogger(__name__)

CLASSES = 5  # 0-4 before, 5-9 after
HELD_OUT = 30  # pictures per class to choose settings by
PRETRAINING: dict[str, Any] = {"steps": 300, "batch_size": 64, "lr": 2e-3, "noise": 0.6, "weight_decay": 0.05}
Pictures = tuple[Tensor, Tensor]  # (n, 1, 8, 8) in [-1, 1]; (n,) classes from 0


@dataclass(frozen=True, kw_only=True)
class NetworkTask(ScoringTask):
    """Classification by a network that takes the tensors of a batch by name and returns logits (B, classes)."""

    metric: str = "accuracy"
    head: tuple[str, ...] = ("head",)

    def collate(self, examples: Sequence[Any]) -> Batch:
        """Return ``x`` (B, ...) and ``labels`` (B,) of pairs of a tensor and its class."""
        return dict(zip(("x", "labels"), default_collate(list(examples)), strict=True))

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return cross-entropy and the auxiliary loss."""
        return F.cross_entropy(self.scores(model, batch), batch["labels"]) + auxiliary(model, batch["labels"])

    def scores(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return logits (B, classes)."""
        dtype = next(self.model.parameters()).dtype
        return model(**{**inputs_of(batch), "x": batch["x"].to(dtype)}).float()


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
    held_out = first_of_each(y[train], HELD_OUT).numpy()
    chosen = {"validation": train[held_out], "pool": train[~held_out], "test": test}
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
            [f"data.train_limit={count}: data.task=digits draws equally many of {CLASSES} classes; {wanted}"]
        )
    order = torch.randperm(len(pool[1]), generator=torch.Generator().manual_seed(seed))
    chosen = order[first_of_each(pool[1][order], count // CLASSES)]
    return pool[0][chosen], pool[1][chosen]


@register(
    "digits",
    "which of the digits 5-9, by a model that knows 0-4? For trying things out, no download; accuracy",
    libraries=("timm",),
    brings_data=True,
)
def digits_task(model: ModelConfig, data: DataConfig, seed: int) -> Task:
    """Return the digits 5-9 and a vision transformer of timm that knows 0-4.

    With ``data.validation_share`` above 0 the validation pictures are evaluated, which are never trained on, instead of
    the test pictures.

    Raises:
        ConfigError: If there are fewer training examples than asked for.
        ModelError: If timm cannot build the model, or it does not fit pictures of 8 x 8 pixels in one channel.
    """
    timm, parts = require("timm", "study"), read_digits()

    def build() -> nn.Module:
        network = timm.create_model(model.architecture, num_classes=CLASSES, **model.overrides)
        network(parts["test"][0][:1])  # does it take such pictures?
        return network

    def batch() -> Batch:
        x, y = parts["known"]
        chosen = torch.randint(len(y), (PRETRAINING["batch_size"],))
        noise = PRETRAINING["noise"] * torch.randn_like(x[chosen])  # without it the features fit 0-4 and little else
        return {"x": x[chosen] + noise, "labels": y[chosen]}

    network = pretrained(model, {**PRETRAINING, "timm": timm.__version__}, build, batch)
    torch.manual_seed(seed)
    network.reset_classifier(CLASSES)
    held_out = list(zip(*parts["validation" if data.validation_share else "test"], strict=True))
    return NetworkTask(
        model=network.to(getattr(torch, model.dtype)),
        train_set=list(zip(*draw(parts["pool"], data, seed), strict=True)),
        eval_set=[held_out[i] for i in subsample(len(held_out), data.eval_limit, seed)],
        num_labels=CLASSES,
    )


def pretrained(
    model: ModelConfig, recipe: dict[str, Any], build: Callable[[], nn.Module], batch: Callable[[], Batch]
) -> Any:
    """Return a pretrained base, in evaluation mode, from its file in the folder ``model.path``, or make that file.

    Args:
        model: Its ``architecture`` and ``overrides`` are part of the recipe.
        recipe: What else the weights depend on; ``steps``, ``lr`` and ``weight_decay`` of the pretraining among it.
        build: Returns the network with new weights.
        batch: Draws inputs of the network by name, and ``labels``.

    Raises:
        ModelError: If the network cannot be built.
    """
    text = json.dumps({"model": [model.architecture, model.overrides], **recipe, "torch": torch.__version__})
    file = Path(model.path) / f"{model.architecture}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.safetensors"
    torch.manual_seed(0)
    try:
        network = build()
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        said = f"model.architecture={model.architecture} with model.overrides={model.overrides}"
        raise ModelError(f"{said} cannot be built for this task: {short(error)}") from error
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
        drawn = batch()
        F.cross_entropy(network(**inputs_of(drawn)), drawn["labels"]).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()  # at the end, too: later clipping would count what is left
    torch.set_num_threads(threads)
    replace_file(file, save({key: value.contiguous() for key, value in network.state_dict().items()}))
    return network.eval()
