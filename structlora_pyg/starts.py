"""Starts of lora_A that PEFT does not have, and that leave the base weights alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraGAConfig
from peft.tuners.lora.loraga import preprocess_loraga
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from structlora_pyg.adapters import AdapterSet
from structlora_pyg.targets import matches


def share_start(adapters: AdapterSet, seed: int) -> None:
    """Give the adapters of one role (name without numbers) and width one common draw of lora_A."""
    draws: dict[tuple[str, int, int], Tensor] = {}
    for a in adapters:
        weight = adapters.layers[a.layer].lora_A[adapters.adapter_name].weight
        key = (a.role, a.r, a.in_features)
        if key not in draws:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + len(draws))
            bound = a.in_features**-0.5  # PEFT's Kaiming-uniform start
            draws[key] = torch.empty(a.r, a.in_features).uniform_(-bound, bound, generator=generator)
        with torch.no_grad():
            weight[a.ranks].copy_(draws[key])


def weight_gradients(model: nn.Module, lora: LoraConfig, train_step: Callable[[], None]) -> dict[str, Tensor]:
    """Return the averaged loss gradient (d_out, d_in) of every target weight, estimated by PEFT's LoRA-GA code."""
    probe = copy.copy(lora)
    probe.lora_ga_config = LoraGAConfig()
    preprocess_loraga(model, probe, train_step)
    gradients = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)) and matches(lora, name):
            estimate: Any = module._peft_loraga_grad
            gradient = estimate.detach().float()
            gradients[name] = gradient.T if isinstance(module, Conv1D) else gradient
            del module._peft_loraga_grad
    return gradients


def align_start(adapters: AdapterSet, gradients: dict[str, Tensor]) -> None:
    """Set lora_A to the top right singular vectors of the gradient, at the norm of PEFT's start; lora_B stays 0.

    LoRA-GA (arXiv 2407.05000) starts from the same directions but moves the base weights too; here they stay.
    """
    for a in adapters:
        gradient = gradients[a.layer][a.rows]
        _, _, v = torch.linalg.svd(gradient, full_matrices=False)
        with torch.no_grad():
            weight = adapters.layers[a.layer].lora_A[adapters.adapter_name].weight
            weight[a.ranks].copy_(v[: a.r] * 3**-0.5)
