"""StructLoRA, alone and stacked on other methods."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from structlora_pyg.analysis.importance import direction_importance
from structlora_pyg.analysis.structure import gate_summary
from structlora_pyg.study.methods.base import Adapted, Coordinated, Method, Run, register
from structlora_pyg.tuner.model import get_structlora_model
from structlora_pyg.tuner.optim import lora_fa_optimizer


@register("structlora")
class StructLora(Method):
    """Information-bottleneck filter and graph coordinator in training, plain LoRA after it (arXiv 2603.14228)."""

    is_structlora = True

    def build(self, base: nn.Module, calibrate: Run, train_step: Run) -> Adapted:
        """Return the base with coordinated adapters."""
        return Coordinated(get_structlora_model(base, self.adapter, train_step=train_step))

    def gates(self) -> dict[str, Any]:
        """Return the gates."""
        summary, values = gate_summary(self.model), self.model.adapter_graph().gate
        return {"open": summary["open_gates"], "mean": summary["mean_gate"], "values": values.tolist()}

    def importance(self, loss: Callable[[], Tensor]) -> dict[str, float | None]:
        """Return the rank correlations."""
        return direction_importance(self.model, loss).correlations()


@register("structlora_qlora")
class StructQLoRA(StructLora):
    """StructLoRA on a base in 4-bit NormalFloat; needs the extra 'quant'."""

    bits4 = True


@register("structlora_dora")
class StructDoRA(StructLora):
    """StructLoRA with DoRA's magnitudes."""

    dora = True


@register("structlora_fa")
class StructLoraFA(StructLora):
    """StructLoRA with LoRA-FA: lora_A stays as drawn, lora_B has a preconditioned gradient."""

    slices = False  # the preconditioner would mix the directions of different slices

    def optimizer(self, lr: float, weight_decay: float) -> torch.optim.Optimizer:
        """Return PEFT's LoRA-FA optimizer, which freezes lora_A."""
        return lora_fa_optimizer(self.model, self.adapter.r, self.adapter.lora_alpha, lr, weight_decay)
