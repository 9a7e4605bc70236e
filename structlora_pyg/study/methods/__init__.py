"""The systems of the paper's tables behind one small interface: ``method.name=<name>``.

A `Method` adapts a base model, says what a training step minimises and does, and exports. Everything else (data, loss
of the task, schedule, evaluation) is the training loop's and the same for all. `METHODS` lists them by name.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from structlora_pyg.checks import ConfigError, not_one_of
from structlora_pyg.config import StructLoraConfig
from structlora_pyg.study.methods.base import Method, Run, follows_gradient
from structlora_pyg.study.methods.baselines import (
    AdaLoraMethod,
    DoRA,
    DyLoraMethod,
    FullFineTuning,
    HeadOnly,
    LoraCosine,
    LoraDropoutMethod,
    LoraFA,
    LoraLaplacian,
    QLoRA,
    SensitivityLora,
    VeRA,
)
from structlora_pyg.study.run_config import MethodConfig
from structlora_pyg.tuner.model import get_structlora_model
from structlora_pyg.tuner.optim import lora_fa_optimizer


class StructLora(Method):
    """LoRA with filter and coordinator."""

    name = "structlora"
    summary = "information-bottleneck filter and graph coordinator in training, plain LoRA after it (arXiv 2603.14228)"
    is_structlora = True

    def _adapted(self, base: nn.Module, calibrate: Run, train_step: Run) -> nn.Module:
        aligned = follows_gradient(self.adapter)
        return get_structlora_model(base, self.adapter, train_step=train_step if aligned else None)


class StructQLoRA(StructLora):
    """StructLoRA on a 4-bit base."""

    name = "structlora_qlora"
    summary = "StructLoRA on a base in 4-bit NormalFloat; needs the extra 'quant'"
    bits4 = True


class StructDoRA(StructLora):
    """StructLoRA with DoRA's magnitudes."""

    name = "structlora_dora"
    summary = "StructLoRA with DoRA's magnitudes"
    dora = True


class StructLoraFA(StructLora):
    """StructLoRA with a frozen lora_A and LoRA-FA's optimizer."""

    name = "structlora_fa"
    summary = "StructLoRA with LoRA-FA: lora_A stays as drawn, lora_B has a preconditioned gradient"
    slices = False

    def optimizer(self, lr: float, weight_decay: float) -> torch.optim.Optimizer:
        """Return PEFT's LoRA-FA optimizer, which freezes lora_A."""
        return lora_fa_optimizer(self.model, self.adapter.r, self.adapter.lora_alpha, lr, weight_decay)


METHODS: dict[str, type[Method]] = {
    m.name: m
    for m in (
        FullFineTuning, HeadOnly, Method, QLoRA, DoRA, AdaLoraMethod, SensitivityLora, LoraDropoutMethod, DyLoraMethod,
        LoraFA, VeRA, LoraCosine, LoraLaplacian, StructLora, StructQLoRA, StructDoRA, StructLoraFA,
    )
}  # fmt: skip


def make_method(adapter: StructLoraConfig, options: MethodConfig, total_steps: int) -> Method:
    """Return the method that `options.name` names.

    Raises:
        ConfigError: Settings of the adapter that the method cannot follow.
    """
    return METHODS[options.name](adapter, options, total_steps)


def unknown_method(name: str) -> list[str]:
    """Return a problem if no method has that name, with the nearest that is there."""
    return [] if name in METHODS else [not_one_of("method.name", name, METHODS)]


def method_problems(adapter: StructLoraConfig, options: MethodConfig) -> list[str]:
    """Return an unknown name, options of other methods, and what `make_method` would raise; empty if all is well."""
    if found := unknown_method(options.name):
        return found
    for field in dataclasses.fields(MethodConfig):
        users = [name for name, method in METHODS.items() if field.name in method.own_options]
        if field.name != "name" and getattr(options, field.name) != field.default and options.name not in users:
            belongs = f"it belongs to {', '.join(users)}"
            found.append(f"method.{field.name} has no effect with method.name={options.name}; {belongs}")
    try:
        make_method(adapter, options, total_steps=1)
    except ConfigError as error:
        found += error.problems
    return found
