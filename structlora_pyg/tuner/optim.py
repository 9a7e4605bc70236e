"""Parameter groups for any optimizer, and the optimizer of LoRA-FA."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import compress
from typing import Any

import torch
from peft.optimizers import create_lorafa_optimizer
from torch import Tensor, nn


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


def set_head_rate(optimizer: torch.optim.Optimizer, model: nn.Module, head: Iterable[str], lr: float) -> None:
    """Give a new head a learning rate of its own, in place, before a scheduler is made.

    A head that is drawn at random wants a higher rate than the pretrained weights that full fine-tuning moves (VeRA,
    arXiv 2310.11454, tunes the two apart).

    Args:
        optimizer: Holds the trainable parameters of `model`.
        model: A model, adapted or not.
        head: Names of the head's modules, as in PEFT's ``modules_to_save``.
        lr: Learning rate of the head, > 0.

    Raises:
        ValueError: If nothing of the head is trained.
    """
    trained = [(f".{name}.", p) for name, p in model.named_parameters() if p.requires_grad]
    chosen = {id(p) for name, p in trained if any(f".{h}." in name for h in head)}
    if not chosen:
        raise ValueError(f"no parameter of the head {list(head)} is trained, so that it can have no rate of its own")
    for group in list(optimizer.param_groups):
        ours = [id(p) in chosen for p in group["params"]]
        if all(ours):
            group["lr"] = lr
        elif any(ours):
            columns = [k for k, v in group.items() if isinstance(v, list) and len(v) == len(ours)]  # LoRA-FA has names
            own = {k: list(compress(group[k], ours)) for k in columns}
            group.update({k: list(compress(group[k], [not our for our in ours])) for k in columns})
            optimizer.add_param_group({**group, **own, "lr": lr})


def lora_fa_optimizer(model: Any, r: int, lora_alpha: int, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """Return PEFT's LoRA-FA optimizer, with the decay that AdamW has in the other methods."""
    optimizer = create_lorafa_optimizer(model, r, lora_alpha, lr, weight_decay)
    (group,) = optimizer.param_groups
    groups = parameter_groups(model, lr, weight_decay)
    decayed = {id(p) for g in groups if g["weight_decay"] > 0 for p in g["params"]}
    columns = ("params", "names", "scaling_factors")
    rows = list(zip(*(group[c] for c in columns), strict=True))
    parts = (  # a lora_A, which is frozen, goes before its lora_B
        (weight_decay, [row for row in rows if ".lora_" in row[1] or id(row[0]) in decayed]),
        (0.0, [r for r in rows if r[0].requires_grad and ".lora_" not in r[1] and id(r[0]) not in decayed]),
    )
    optimizer.param_groups.clear()
    for decay, part in parts:
        if part:
            values = dict(zip(columns, map(list, zip(*part, strict=True)), strict=True))
            optimizer.add_param_group({**group, **values, "weight_decay": decay})

    def to_parameters(loaded: torch.optim.Optimizer) -> None:
        # This optimizer keeps its state by name, so that torch does not move it to the device of its parameters.
        device = next(model.parameters()).device
        for values in loaded.state.values():
            values.update({k: v.to(device) for k, v in values.items() if isinstance(v, Tensor)})

    optimizer.register_load_state_dict_post_hook(to_parameters)
    return optimizer
