"""StructLoRA, alone and stacked on other methods."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from structlora_pyg.analysis.importance import direction_importance
from structlora_pyg.analysis.structure import gate_summary, stage_sizes
from structlora_pyg.config import StructLoraConfig
from structlora_pyg.study.config import MethodConfig
from structlora_pyg.study.methods.adapted import Adapted, Coordinated
from structlora_pyg.study.methods.base import Method, Run, register
from structlora_pyg.tuner.model import get_structlora_model

FEWEST = 8  # examples held out
LEVEL_RATE = 0.025  # of the common noise level, on the scale of its logit, per optimizer step


@register("structlora")
class StructLora(Method):
    """Information-bottleneck filter and graph coordinator in training, plain LoRA after it (arXiv 2603.14228)."""

    is_structlora = True
    own_options = ("held_out", "teach_every")

    def build(self, base: nn.Module, calibrate: Run, train_step: Run) -> Adapted:
        """Return the base with coordinated adapters."""
        return Coordinated(get_structlora_model(base, self.adapter, train_step=train_step))

    @classmethod
    def held_out(cls, adapter: StructLoraConfig, options: MethodConfig, examples: int) -> int:
        """Return the share of ``method.held_out``; none where it is too small to tell anything."""
        count = round(options.held_out * examples) if adapter.taught else 0
        return count if count >= FEWEST else 0

    def teach(self, step: int, train_loss: Callable[[], Tensor], held_out_loss: Callable[[], Tensor]) -> None:
        """Teach the noise levels every ``method.teach_every`` steps."""
        every = self.options.teach_every
        if step % every == 0:
            self.model.teach(train_loss, held_out_loss, rate=LEVEL_RATE * every)

    def gates(self) -> dict[str, Any]:
        """Return the gates, and how far filter and coordinator move each adapter."""
        summary, values = gate_summary(self.model), self.model.adapter_graph().gate
        means = {"open": summary["open_gates"], "mean": summary["mean_gate"]}
        return {**means, "values": values.tolist(), "sizes": stage_sizes(self.model)}

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

    fa = True
    slices = False  # the preconditioner would mix the directions of different slices
