"""The demo's world: handwritten digits, and a small vision transformer that has only ever seen 0 to 4."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from structlora_pyg.files import replace_file

logger = logging.getLogger(__name__)

CLASSES = 5  # 0-4 before, 5-9 after
VALIDATION = 30  # pictures a class
ARCHITECTURE: dict[str, Any] = {
    "img_size": 8,
    "patch_size": 2,
    "in_chans": 1,
    "num_classes": CLASSES,
    "embed_dim": 64,
    "depth": 6,
    "num_heads": 4,
}


@dataclass(frozen=True, kw_only=True)
class Images:
    """Pictures with their classes.

    Attributes:
        x: (n, 1, 8, 8) float32 in [-1, 1].
        y: (n,) classes from 0.
    """

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: Tensor) -> Images:
        return Images(x=self.x[index], y=self.y[index])

    def split(self, per_class: int) -> tuple[Images, Images]:
        """Return the first `per_class` pictures of every class, and the others.

        Raises:
            ValueError: If a class would have none left, or none at all is asked for.
        """
        least = int(torch.bincount(self.y).min())
        if not 1 <= per_class < least:
            raise ValueError(f"per_class must be in [1, {least - 1}], got {per_class}")
        place = (self.y.unsqueeze(1) == self.y.unsqueeze(0)).tril(-1).sum(1)  # rank among those of its class
        return self[place < per_class], self[place >= per_class]


@dataclass(frozen=True, kw_only=True)
class Digits:
    """scikit-learn's handwritten digits, cut into the parts of the demo; the same for everybody.

    Attributes:
        known: Digits 0-4, to pretrain with.
        pool: Digits 5-9 (classes 0-4) from which training examples are drawn.
        validation: 30 more of each class, to choose a learning rate by.
        test: Half of all digits 5-9, looked at once a run.
    """

    known: Images
    pool: Images
    validation: Images
    test: Images

    @classmethod
    def load(cls) -> Digits:
        """Load and cut the digits; nothing is downloaded."""
        raw = load_digits()
        x = torch.tensor(raw.images, dtype=torch.float32).unsqueeze(1) / 8.0 - 1.0
        y = torch.tensor(raw.target, dtype=torch.long)
        new = torch.nonzero(y >= CLASSES).flatten()
        train, test = train_test_split(new.numpy(), test_size=0.5, random_state=0, stratify=y[new].numpy())
        validation, pool = Images(x=x[train], y=y[train] - CLASSES).split(VALIDATION)
        known = y < CLASSES
        return cls(
            known=Images(x=x[known], y=y[known]),
            pool=pool,
            validation=validation,
            test=Images(x=x[test], y=y[test] - CLASSES),
        )

    def draw(self, per_class: int, seed: int) -> Images:
        """Return `per_class` training examples a class, drawn from the pool."""
        order = torch.randperm(len(self.pool), generator=torch.Generator().manual_seed(seed))
        return self.pool[order].split(per_class)[0]


def cache_folder() -> Path:
    """Return ``$XDG_CACHE_HOME/structlora_pyg``, or ``~/.cache/structlora_pyg``; it need not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "structlora_pyg"


def pretrained_vit(digits: Digits, steps: int = 300, on_step: Callable[[], Any] | None = None) -> VisionTransformer:
    """Return a vision transformer pretrained on the digits 0-4, from the cache if it is there.

    The cache file is named by a hash of the recipe (architecture, training, versions of torch and timm) and carries a
    checksum; a damaged one is built again.

    Args:
        digits: The data.
        steps: Optimizer steps of the pretraining, >= 1.
        on_step: Called after every step, for a progress bar.
    """
    recipe = {
        "architecture": ARCHITECTURE,
        "steps": steps,
        "batch_size": 64,
        "lr": 2e-3,
        "noise": 0.6,
        "weight_decay": 0.05,
        "seed": 0,
        "torch": torch.__version__,
        "timm": timm.__version__,
    }
    text = json.dumps(recipe, sort_keys=True)
    file = cache_folder() / f"digits_vit_{hashlib.sha256(text.encode()).hexdigest()[:16]}.safetensors"
    model = VisionTransformer(**ARCHITECTURE)
    state = _read(file, model)
    if state is None:
        with torch.random.fork_rng():
            torch.manual_seed(recipe["seed"])
            model = VisionTransformer(**ARCHITECTURE)
            _pretrain(model, digits.known, recipe, on_step)
        state = {name: value.detach().clone() for name, value in model.state_dict().items()}
        try:
            replace_file(file, save(state, metadata={"recipe": text, "checksum": _checksum(state)}))
        except OSError as error:
            logger.warning("the pretrained model cannot be kept in %s (%s); it is trained anew each time", file, error)
    model.load_state_dict(state)
    return model.eval()


def with_new_head(base: VisionTransformer, seed: int) -> VisionTransformer:
    """Return a copy of the pretrained model with a fresh head for the digits 5-9, drawn with the seed."""
    model = VisionTransformer(**ARCHITECTURE)
    model.load_state_dict(base.state_dict())
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model.reset_classifier(CLASSES)
    return model


def _pretrain(
    model: VisionTransformer, data: Images, recipe: dict[str, Any], on_step: Callable[[], Any] | None
) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe["lr"], weight_decay=recipe["weight_decay"])
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe["lr"], total_steps=recipe["steps"], pct_start=0.1)
    model.train()
    for _ in range(recipe["steps"]):
        batch = data[torch.randint(len(data), (recipe["batch_size"],))]
        x = batch.x + recipe["noise"] * torch.randn_like(batch.x)  # without it the features fit 0-4 and little else
        optimizer.zero_grad()
        F.cross_entropy(model(x), batch.y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if on_step is not None:
            on_step()


def _read(file: Path, model: nn.Module) -> dict[str, Tensor] | None:
    """Return the weights in a cache file, or None if it is not there or not whole."""
    if not file.is_file():
        return None
    try:
        with safe_open(file, framework="pt") as handle:
            state = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 - not a mapping
            checksum = (handle.metadata() or {}).get("checksum")
    except (SafetensorError, OSError) as error:
        logger.warning("%s is damaged (%s); the model is trained again", file, error)
        return None
    want = {name: value.shape for name, value in model.state_dict().items()}
    if checksum != _checksum(state) or want != {name: value.shape for name, value in state.items()}:
        logger.warning("%s is damaged (its checksum differs); the model is trained again", file)
        return None
    return state


def _checksum(state: dict[str, Tensor]) -> str:
    total = hashlib.sha256()
    for name in sorted(state):
        total.update(name.encode())
        total.update(state[name].contiguous().numpy().tobytes())
    return total.hexdigest()
