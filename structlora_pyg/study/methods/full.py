"""Full fine-tuning, and a trained head alone."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from structlora_pyg.checks import ConfigError
from structlora_pyg.study.methods.adapted import Adapted
from structlora_pyg.study.methods.base import Method, Run, register
from structlora_pyg.tuner.export import save_base
from structlora_pyg.tuner.model import keep_statistics


class WholeModel(Adapted):
    """A model without adapters."""

    def state(self) -> dict[str, Tensor]:
        """Return the trained parameters and the buffers, such as running means, which training changes too."""
        trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        return {**trained, **dict(self.model.named_buffers())}

    def export(self, folder: Path) -> dict[str, float]:
        """Write the weights."""
        save_base(self.model, folder)
        return {}

    def merge(self) -> nn.Module:
        """Return the model."""
        return self.model


@register("full")
class FullFineTuning(Method):
    """Full fine-tuning: all weights; wants about a tenth of LoRA's learning rate."""

    folder = "model"
    ranked = False
    has_updates = False

    def problems(self) -> list[str]:
        """Return nothing: there is no adapter."""
        return []

    def build(self, base: nn.Module, calibrate: Run, train_step: Run) -> Adapted:
        """Return the model with everything trainable."""
        return WholeModel(base.requires_grad_(True))

    def keep_statistics(self) -> None:
        """Do nothing: they are trained with the rest."""


@register("head")
class HeadOnly(FullFineTuning):
    """Linear probing: only the head is trained; the floor of a comparison."""

    def build(self, base: nn.Module, calibrate: Run, train_step: Run) -> Adapted:
        """Return the model with a trainable head on frozen features.

        Raises:
            ConfigError: If there is no head.
        """
        heads = self.adapter.modules_to_save or []
        if not heads:
            raise ConfigError(["method.name=head has nothing to train: this task adds no head to the model"])
        base.requires_grad_(False)
        for name, module in base.named_modules():
            if any(f".{name}".endswith(f".{head}") for head in heads):
                module.requires_grad_(True)
        return WholeModel(base)

    def keep_statistics(self) -> None:
        """Keep those of the frozen features."""
        keep_statistics(self.model, self.adapter.modules_to_save or ())
