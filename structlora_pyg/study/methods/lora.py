"""LoRA, the relatives that PEFT has, StructLoRA on each of them, full fine-tuning, and a head alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft import LoraConfig, VeraConfig, get_peft_model
from torch import Tensor, nn
from torch_geometric.nn import Linear as PyGLinear

from structlora_pyg.analysis.stages import direction_importance
from structlora_pyg.analysis.structure import gate_summary, mean_sizes, stage_sizes
from structlora_pyg.checks import ConfigError
from structlora_pyg.config import StructLoraConfig
from structlora_pyg.stage_config import CoordinatorConfig, EncodingConfig, FilterConfig, GraphConfig, ScheduleConfig
from structlora_pyg.study.config import MethodConfig
from structlora_pyg.study.methods import Method, Run, register
from structlora_pyg.tuner.export import save_base
from structlora_pyg.tuner.layers import OWN_LAYERS
from structlora_pyg.tuner.model import get_structlora_model, keep_statistics
from structlora_pyg.tuner.targets import matches, plain_lora


@register("lora")
class PlainLora(Method):
    """Low-rank updates of chosen weights (arXiv 2106.09685).

    The adapter is stock PEFT's. With ``fused_slices``, or a start that PEFT does not know (``shared``, ``gradient``),
    it is a `StructLoraModel` without filter, coordinator and edges, which is exactly LoRA on those slices and from
    that start.
    """

    def build(self, base: nn.Module, calibrate: Run, train_step: Run) -> nn.Module:
        """Return the base with LoRA adapters."""
        if self.adapter.fused_slices or self.adapter.init_lora_weights in ("shared", "gradient"):
            self.coordinated = True
            return get_structlora_model(base, _without_coordination(self.adapter), train_step=train_step)
        return get_peft_model(base, lora_config(base, self.adapter))


@register("qlora")
class QLoRA(PlainLora):
    """LoRA on a base in 4-bit NormalFloat (arXiv 2305.14314); needs the extra 'quant'."""

    bits4 = True


@register("dora")
class DoRA(PlainLora):
    """Weight-decomposed LoRA: direction and magnitude (arXiv 2402.09353)."""

    dora = True


@register("lora_fa")
class LoraFA(PlainLora):
    """lora_A stays as drawn, lora_B has a preconditioned gradient (arXiv 2308.03303)."""

    fa = True
    slices = False  # the preconditioner would mix the directions of different slices


@register("vera")
class VeRA(Method):
    """Shared frozen random factors, two trained vectors per layer (arXiv 2310.11454)."""

    slices = False
    any_start = False
    ranked = False
    has_updates = False
    allocates = "has one rank for all layers"
    unscaled = "has no scaling"
    own_options = ("vera_r",)

    def build(self, base: nn.Module, calibrate: Run, train_step: Run) -> nn.Module:
        """Return the base with VeRA adapters on the layers that LoRA would adapt."""
        lora = lora_config(base, self.adapter)
        config = VeraConfig(
            r=self.options.vera_r,
            vera_dropout=lora.lora_dropout,
            projection_prng_key=self.adapter.seed,
            **shared_settings(lora, base),
        )
        return get_peft_model(base, config)


def lora_config(base: nn.Module, adapter: StructLoraConfig) -> LoraConfig:
    """Return the checked plain configuration, with our layer only where PEFT has none: for PyG's ``Linear``.

    Raises:
        ConfigError: With everything that does not fit the model.
    """
    checked = plain_lora(base, adapter)
    names = ("target_modules", "modules_to_save", "init_lora_weights")
    config = adapter.to_lora_config(**{name: getattr(checked, name) for name in names})
    config._register_custom_module({PyGLinear: OWN_LAYERS[PyGLinear]})
    return config


def shared_settings(lora: LoraConfig, base: nn.Module) -> dict[str, Any]:
    """Return what other adapters of PEFT take from a LoRA configuration, besides rank and scaling."""
    shared = {name: getattr(lora, name) for name in ("modules_to_save", "task_type", "bias")}
    if lora.exclude_modules:  # which VeRA's configuration does not have
        return {**shared, "target_modules": [n for n, _ in base.named_modules() if n and matches(lora, n)]}
    names = ("target_modules", "layers_to_transform", "layers_pattern")
    return {**shared, **{name: getattr(lora, name) for name in names}}


def _without_coordination(adapter: StructLoraConfig) -> StructLoraConfig:
    """Return a copy that makes a `StructLoraModel` do what LoRA does."""
    plain = copy.copy(adapter)
    plain.graph, plain.encoding = GraphConfig(edges="none"), EncodingConfig()
    plain.filter, plain.coordinator = FilterConfig(kind="none", beta=0.0), CoordinatorConfig(conv="none")
    plain.schedule = ScheduleConfig(warmup_steps=0, ramp_steps=0)
    return plain


@register("full")
class FullFineTuning(Method):
    """Full fine-tuning: all weights; wants about a tenth of LoRA's learning rate."""

    folder = "model"
    ranked = False
    has_updates = False

    def problems(self) -> list[str]:
        """Return nothing: there is no adapter."""
        return []

    def build(self, base: nn.Module, calibrate: Run, train_step: Run) -> nn.Module:
        """Return the model with everything trainable."""
        return base.requires_grad_(True)

    def state(self) -> dict[str, Tensor]:
        """Return the trained parameters and the buffers, such as running means, which training changes too."""
        return {**super().state(), **dict(self.model.named_buffers())}

    def export(self, folder: Path) -> dict[str, float]:
        """Write the weights."""
        save_base(self.model, folder)
        return {}

    def merge(self) -> nn.Module:
        """Return the model."""
        return self.model

    def keep_statistics(self) -> None:
        """Do nothing: they are trained with the rest."""


@register("head")
class HeadOnly(FullFineTuning):
    """Linear probing: only the head is trained; the floor of a comparison."""

    def build(self, base: nn.Module, calibrate: Run, train_step: Run) -> nn.Module:
        """Return the model with a trainable head on frozen features.

        Raises:
            ConfigError: If there is no head.
        """
        heads = self.adapter.modules_to_save or []
        if not heads:
            raise ConfigError("method.name=head has nothing to train: this task adds no head to the model")
        base.requires_grad_(False)
        for name, module in base.named_modules():
            if any(f".{name}".endswith(f".{head}") for head in heads):
                module.requires_grad_(True)
        return base

    def keep_statistics(self) -> None:
        """Keep those of the frozen features."""
        keep_statistics(self.model, self.adapter.modules_to_save or ())


FEWEST = 8  # examples held out
LEVEL_RATE = 0.05  # of the common noise level, on the scale of its logit, per optimizer step


@register("structlora")
class StructLora(Method):
    """Information-bottleneck filter and graph coordinator in training, plain LoRA after it (arXiv 2603.14228)."""

    is_structlora = True
    coordinated = True
    own_options = ("held_out", "teach_every", "teach_until")

    def build(self, base: nn.Module, calibrate: Run, train_step: Run) -> nn.Module:
        """Return the base with coordinated adapters."""
        return get_structlora_model(base, self.adapter, train_step=train_step)

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
        means, sizes = {"open": summary["open_gates"], "mean": summary["mean_gate"]}, stage_sizes(self.model)
        return {**means, **mean_sizes(sizes), "values": values.tolist(), "sizes": sizes}

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
