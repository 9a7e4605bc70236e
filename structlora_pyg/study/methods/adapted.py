"""A model as a method trains it, and its life on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from structlora_pyg.stage_config import Policy
from structlora_pyg.tuner.alarms import Alarms, TrainingAlarms


class Adapted:
    """A model as a method trains it, and its life on disk; this one is a `peft.PeftModel` as PEFT made it.

    Args:
        model: The adapted model.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    def losses(self) -> dict[str, float]:
        """Return the parts of the last training loss that the model knows of."""
        return {}

    def parameter_counts(self) -> dict[str, int]:
        """Return trainable parameters: ``adapter`` (exported), ``heads`` (exported), ``training_only``."""
        counts = {"adapter": 0, "heads": 0, "training_only": 0}
        for name, p in self.model.named_parameters():
            if p.requires_grad:
                counts["adapter" if ".lora_" in name or ".vera_" in name else "heads"] += p.numel()
        return counts

    def alarms(self, policy: Policy) -> Alarms:
        """Return the alarms of the training; `policy` is that of the configuration."""
        return TrainingAlarms(self.model, policy)

    def state(self) -> dict[str, Tensor]:
        """Return what a checkpoint has to keep, besides what `save` writes: trained parameters, frozen factors."""
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad or ".lora_" in n}

    def save(self, folder: Path) -> None:
        """Write what `state` leaves out."""

    def load(self, folder: Path) -> None:
        """Restore what `save` wrote."""

    def export(self, folder: Path) -> dict[str, float]:
        """Write what is left after training; return facts about it."""
        self.model.save_pretrained(str(folder))
        return {}

    def merge(self) -> nn.Module:
        """Return the base with the trained update in its weights."""
        return self.model.merge_and_unload()


class Coordinated(Adapted):
    """A `StructLoraModel`, which keeps and exports its own state."""

    def losses(self) -> dict[str, float]:
        """Return ``auxiliary``, and ``task`` where the output carried a loss."""
        return self.model.losses()

    def parameter_counts(self) -> dict[str, int]:
        """Return trainable parameters, those of filter and coordinator as ``training_only``."""
        return self.model.parameter_counts()

    def alarms(self, policy: Policy) -> Alarms:
        """Return those of the model itself."""
        return self.model.hooks.alarms

    def state(self) -> dict[str, Tensor]:
        """Return nothing: `save` writes all of it."""
        return {}

    def save(self, folder: Path) -> None:
        """Write the training state."""
        self.model.save_pretrained(str(folder))

    def load(self, folder: Path) -> None:
        """Restore the training state."""
        self.model.load_training_state(folder)

    def export(self, folder: Path) -> dict[str, float]:
        """Write the plain LoRA with gates and coordination folded in."""
        return self.model.export(folder)
