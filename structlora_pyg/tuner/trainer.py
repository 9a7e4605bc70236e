"""Lessons for the noise levels in `transformers.Trainer`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from transformers import Trainer, TrainerCallback


class TeachLevels(TrainerCallback):
    """Teaches the noise levels by held-out loss while `transformers.Trainer` trains, as `StructLoraModel.teach` does.

    ``trainer.add_callback(TeachLevels(trainer, held_out))``

    Args:
        trainer: The trainer of a `StructLoraModel`; its collator, batch sizes and ``compute_loss`` are used.
        held_out: Examples that it does not train on, at least eight; those of the final evaluation are not theirs.
        every: Optimizer steps between two lessons, each about as dear as three training steps, >= 1.
        rate: Step of a lesson for each of these optimizer steps, on the scale of the common level's logit.
        until: Share of the training after which the levels stay, in (0, 1]; late steps are small, and teach noise.
    """

    def __init__(
        self, trainer: Trainer, held_out: Any, every: int = 10, rate: float = 0.05, until: float = 0.5
    ) -> None:
        self.trainer, self.every, self.rate, self.until = trainer, every, rate, until
        self._training = _endless(trainer.get_train_dataloader)
        self._held_out = _endless(lambda: trainer.get_eval_dataloader(held_out))

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Give a lesson, after an optimizer step."""
        if state.global_step % self.every or state.global_step > self.until * state.max_steps:
            return
        with torch.random.fork_rng():  # training draws what it would have drawn
            train, held_out = next(self._training), next(self._held_out)
        losses = ((lambda batch=b: self.trainer.compute_loss(model, dict(batch))) for b in (train, held_out))
        self.trainer.accelerator.unwrap_model(model).teach(*losses, rate=self.rate * self.every)


def _endless(loader: Callable[[], Iterable[Any]]) -> Iterator[Any]:
    """Yield batches for ever."""
    while True:
        yield from loader()
