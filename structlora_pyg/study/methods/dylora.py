"""DyLoRA (arXiv 2210.07558): one adapter that works at every rank from 1 to r."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from structlora_pyg.study.methods.base import Adapted, Run, register, write_lora
from structlora_pyg.study.methods.dropout import RandomLora, TrainingVariant, plain_lora_layers


class DyLora(TrainingVariant):
    r"""Trains on a random prefix of the directions, so that the first b of them are a good LoRA of rank b.

    In training, every forward of the model draws b uniformly from 1 to r, the same for all layers, and runs on
    :math:`\Delta W_b = (\alpha / b)\,B_{:, :b} A_{:b}` (with rank-stabilised scaling, :math:`\alpha / \sqrt b`). No
    training loop has to call anything. Out of training the model runs, and merges, at `rank`.

    Args:
        model: A `peft.PeftModel` with plain LoRA adapters of one rank r >= 2. It is changed in place.
        seed: Seed of the ranks drawn, >= 0.
        adapter_name: Which adapter.

    Attributes:
        r: Rank of the adapter.
        rank: Rank b of evaluation and merging, in [1, r]; r at the start.

    Raises:
        ValueError: If the adapter is not plain LoRA, or has differing ranks or rank 1.
    """

    def __init__(self, model: PeftModel, seed: int = 0, adapter_name: str = "default") -> None:
        ranks = {layer.r[adapter_name] for layer in plain_lora_layers(model, adapter_name, "DyLora").values()}
        if len(ranks) > 1 or ranks == {1}:
            raise ValueError(
                f"DyLora needs one rank r >= 2 for all layers, got {sorted(ranks)}; set r, no rank_pattern"
            )
        super().__init__(model, seed, adapter_name)
        self.r = self.rank = self.drawn = ranks.pop()  # drawn: rank of the last training forward

    def export(self, folder: str | Path, rank: int | None = None) -> None:
        """Write the plain LoRA folder of rank b, with `lora_alpha` unchanged.

        Args:
            folder: Where to write; files in it are replaced.
            rank: b in [1, r]; default: `rank`.

        Raises:
            ValueError: If the rank is out of range, or a weight is not finite.
        """
        b = self.rank if rank is None else rank
        if not 1 <= b <= self.r:
            raise ValueError(f"rank must be in [1, {self.r}], got {b!r}")
        config: Any = self.model.peft_config[self.adapter_name]
        state = get_peft_model_state_dict(self.model, adapter_name=self.adapter_name)
        for key, value in state.items():
            if key.endswith("lora_A.weight"):
                state[key] = value[:b]
            elif key.endswith("lora_B.weight"):
                state[key] = value[:, :b]
        write_lora(folder, config, state, b, config.lora_alpha)

    def draw(self) -> None:
        """Draw the rank of a training forward."""
        self.drawn = int(torch.randint(1, self.r + 1, (), generator=self.generator))

    def update(self, layer: Any, x: Tensor) -> Tensor:
        """Return the update of a layer for `x` (..., d_in)."""
        A, B, scaling = self._prefix(layer, self.drawn if layer.training else self.rank)
        return F.linear(F.linear(x, A), B) * scaling

    @torch.no_grad()
    def update_weight(self, layer: Any) -> Tensor:
        """Return the update at `rank` in the layout of the layer's weight."""
        A, B, scaling = self._prefix(layer, self.rank)
        delta = scaling * (B @ A)
        return delta.T if isinstance(layer.get_base_layer(), Conv1D) else delta

    def _prefix(self, layer: Any, b: int) -> tuple[Tensor, Tensor, float]:
        """Return A (b, d_in) and B (d_out, b) of the first b directions, and the scaling of a LoRA of rank b."""
        name, ratio = self.adapter_name, self.r / b
        scaling = layer.scaling[name] * (ratio**0.5 if layer.use_rslora[name] else ratio)
        return layer.lora_A[name].weight[:b], layer.lora_B[name].weight[:, :b], scaling


@register("dylora")
class DyLoraMethod(RandomLora):
    """A random prefix of the directions per step, so that every smaller rank works too (arXiv 2210.07558)."""

    slices = False
    variant: DyLora

    def problems(self) -> list[str]:
        """Return settings with which there is no one order of directions."""
        found, adapter = super().problems(), self.adapter
        if adapter.r < 2 or adapter.rank_pattern:
            found.append("method.name=dylora needs one rank >= 2 for all layers; set adapter.r, no rank_pattern")
        if adapter.init_lora_weights in ("shared", "gradient"):
            start = adapter.init_lora_weights
            found.append(f"method.name=dylora cannot start from init_lora_weights={start}; leave it out")
        return found

    def build(self, base: nn.Module, calibrate: Run, train_step: Run) -> Adapted:
        """Return the base with LoRA adapters whose rank is drawn."""
        adapted = super().build(base, calibrate, train_step)
        self.variant = DyLora(adapted.model, self.adapter.seed)
        return adapted

    def export(self, folder: Path) -> dict[str, float]:
        """Write the plain LoRA of full rank."""
        self.variant.export(folder)
        return {"rank": float(self.variant.rank)}
