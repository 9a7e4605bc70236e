"""Parameter groups for any optimizer."""

from __future__ import annotations

from typing import Any

from torch import nn


def parameter_groups(model: nn.Module, lr: float, weight_decay: float = 0.01) -> list[dict[str, Any]]:
    """Return the trainable parameters in two groups: decayed, and free of weight decay.

    Gate logits, the coordinator's gain, biases and other vectors are free of decay. Gates need no learning rate of
    their own: `IBFilter` stores them divided by ``lr_scale``, so that they move that much faster in every loop.

    Args:
        model: A model from `get_structlora_model` (or any module).
        lr: Learning rate of both groups, > 0.
        weight_decay: Decay of the first group, >= 0.

    Raises:
        ValueError: If nothing is trainable.
    """
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (free if parameter.dim() < 2 or name.endswith("gate_offset") else decayed).append(parameter)
    if not decayed and not free:
        raise ValueError("no parameter is trainable; was the adapter loaded with is_trainable=False?")
    groups = [
        {"params": decayed, "lr": lr, "weight_decay": weight_decay},
        {"params": free, "lr": lr, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
