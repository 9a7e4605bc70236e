"""DyLoRA (arXiv 2210.07558): one adapter that works at every rank from 1 to r."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from structlora_pyg.study.methods.lora_folder import plain_config, write_lora_folder
from structlora_pyg.study.methods.variants import TrainingVariant
from structlora_pyg.tuner.model import StructLoraModel


class DyLora(TrainingVariant):
    r"""Trains on a random prefix of the directions, so that the first b of them are a good LoRA of rank b.

    In training, every forward of the model draws b uniformly from 1 to r, the same for all layers, and runs on
    :math:`\Delta W_b = (\alpha / b)\,B_{:, :b} A_{:b}` (with rank-stabilised scaling, :math:`\alpha / \sqrt b`). No
    training loop has to call anything. Out of training the model runs, and merges, at `rank`.

    Args:
        model: A `peft.PeftModel` with plain LoRA adapters of one rank r >= 2. It is changed in place.
        frozen: Train direction b only; the directions before it are used as they are. Their gradient is then 0, not
            None: an optimizer with momentum or weight decay still moves them a little.
        seed: Seed of the ranks drawn, >= 0.
        adapter_name: Which adapter.

    Raises:
        ValueError: If the adapter is not plain LoRA, has differing ranks or rank 1, or is coordinated.
    """

    def __init__(self, model: PeftModel, frozen: bool = False, seed: int = 0, adapter_name: str = "default") -> None:
        if isinstance(model, StructLoraModel):
            raise ValueError(
                "DyLoRA orders the directions of plain LoRA, not coordinated ones; use peft.get_peft_model"
            )
        super().__init__(model, adapter_name, seed)
        ranks = {layer.r[adapter_name] for layer in self.layers.values()}
        if len(ranks) > 1 or ranks == {1}:
            self.remove()
            raise ValueError(
                f"DyLoRA needs one rank r >= 2 for all layers, got {sorted(ranks)}; set r, no rank_pattern"
            )
        self.model, self.frozen = model, frozen
        self.r: int = ranks.pop()
        self.drawn = self.r  # rank of the last training forward
        self._rank = self.r

    @property
    def rank(self) -> int:
        """Rank b of evaluation and merging, in [1, r]; r at the start."""
        return self._rank

    @rank.setter
    def rank(self, rank: int) -> None:
        self._rank = self._checked(rank)

    def export(self, folder: str | Path, rank: int | None = None) -> None:
        """Write the plain LoRA folder of rank b, with `lora_alpha` unchanged.

        Args:
            folder: Where to write; files in it are replaced.
            rank: b in [1, r]; default: `rank`.

        Raises:
            RuntimeError: If the model was never trained.
            ValueError: If the rank is out of range, or a weight is not finite.
        """
        b = self.rank if rank is None else self._checked(rank)
        if self.draws == 0:
            raise RuntimeError("the model never ran in training mode, so there is nothing to export. Train it")
        config: Any = self.model.peft_config[self.adapter_name]
        state = get_peft_model_state_dict(self.model, adapter_name=self.adapter_name)
        for key, value in state.items():
            if key.endswith("lora_A.weight"):
                state[key] = value[:b]
            elif key.endswith("lora_B.weight"):
                state[key] = value[:, :b]
        plain = plain_config(self.model, config, b, config.lora_alpha, config.alpha_pattern)
        write_lora_folder(folder, state, plain)

    def draw(self) -> None:
        """Draw the rank of a training forward."""
        self.drawn = int(torch.randint(1, self.r + 1, (), generator=self.generator))

    def update(self, layer: Any, x: Tensor) -> Tensor:
        """Return the update of a layer for `x` (..., d_in)."""
        b = self.drawn if layer.training else self.rank
        A, B = self._factors(layer, b)
        if layer.training and self.frozen:
            A = torch.cat([A[:-1].detach(), A[-1:]])
            B = torch.cat([B[:, :-1].detach(), B[:, -1:]], dim=1)
        return F.linear(F.linear(x, A), B) * self._scaling(layer, b)

    @torch.no_grad()
    def update_weight(self, layer: Any) -> Tensor:
        """Return the update at `rank` in the layout of the layer's weight."""
        A, B = self._factors(layer, self.rank)
        delta = self._scaling(layer, self.rank) * (B @ A)
        return delta.T if isinstance(layer.get_base_layer(), Conv1D) else delta

    def _factors(self, layer: Any, b: int) -> tuple[Tensor, Tensor]:
        return layer.lora_A[self.adapter_name].weight[:b], layer.lora_B[self.adapter_name].weight[:, :b]

    def _scaling(self, layer: Any, b: int) -> float:
        """Return the scaling of a LoRA of rank b with the layer's lora_alpha."""
        ratio = self.r / b
        return layer.scaling[self.adapter_name] * (ratio**0.5 if layer.use_rslora[self.adapter_name] else ratio)

    def _checked(self, rank: int) -> int:
        if not 1 <= rank <= self.r:
            raise ValueError(f"rank must be in [1, {self.r}], got {rank!r}")
        return rank
