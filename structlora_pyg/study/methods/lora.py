"""LoRA, and the relatives that PEFT has: QLoRA, DoRA, LoRA-FA and VeRA."""

from __future__ import annotations

import copy
from typing import Any

from peft import LoraConfig, VeraConfig, get_peft_model
from torch import nn
from torch_geometric.nn import Linear as PyGLinear

from structlora_pyg.config import StructLoraConfig
from structlora_pyg.stage_config import CoordinatorConfig, EncodingConfig, FilterConfig, GraphConfig, ScheduleConfig
from structlora_pyg.study.methods.adapted import Adapted, Coordinated
from structlora_pyg.study.methods.base import Method, Run, register
from structlora_pyg.tuner.layers import OWN_LAYERS
from structlora_pyg.tuner.model import get_structlora_model
from structlora_pyg.tuner.targets import matches, plain_lora


@register("lora")
class PlainLora(Method):
    """Low-rank updates of chosen weights (arXiv 2106.09685).

    The adapter is stock PEFT's. With ``fused_slices``, or a start that PEFT does not know (``shared``, ``gradient``),
    it is a `StructLoraModel` without filter, coordinator and edges, which is exactly LoRA on those slices and from
    that start.
    """

    def build(self, base: nn.Module, calibrate: Run, train_step: Run) -> Adapted:
        """Return the base with LoRA adapters."""
        if self.adapter.fused_slices or self.adapter.init_lora_weights in ("shared", "gradient"):
            plain = _without_coordination(self.adapter)
            return Coordinated(get_structlora_model(base, plain, train_step=train_step))
        return Adapted(get_peft_model(base, lora_config(base, self.adapter)))


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
    own_options = ("vera_r",)

    def problems(self) -> list[str]:
        """Return the settings of LoRA that VeRA has no counterpart for."""
        return [*super().problems(), *self.ignored("has one rank for all layers", "has no scaling")]

    def build(self, base: nn.Module, calibrate: Run, train_step: Run) -> Adapted:
        """Return the base with VeRA adapters on the layers that LoRA would adapt."""
        lora = lora_config(base, self.adapter)
        config = VeraConfig(
            r=self.options.vera_r,
            vera_dropout=lora.lora_dropout,
            projection_prng_key=self.adapter.seed,
            **shared_settings(lora, base),
        )
        return Adapted(get_peft_model(base, config))


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
