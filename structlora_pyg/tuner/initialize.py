"""Starts of lora_A that PEFT does not have, and that leave the base weights alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from structlora_pyg.checks import ConfigError
from structlora_pyg.data.adapters import AdapterSet
from structlora_pyg.tuner.layers import base_weight
from structlora_pyg.tuner.targets import matches

ROWS = 16  # inputs of a layer that a forward pass is asked for


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


class Start(NamedTuple):
    """What a start along the gradient knows of a weight: its gradient (d_out, d_in), and some inputs (k, d_in)."""

    gradient: Tensor
    inputs: Tensor | None


def weight_gradients(model: nn.Module, lora: LoraConfig, train_step: Callable[[], None]) -> dict[str, Start]:
    """Return for every target weight its gradient, summed over the backward passes of `train_step`, and some inputs.

    Raises:
        ConfigError: A quantised base, which has no gradients; a `train_step` that reaches no gradient.
    """
    targets = {name: module for name, module in model.named_modules() if name and matches(lora, name)}
    weights = {name: base_weight(module) for name, module in targets.items()}
    # The second adapter of an attention, under the path that it will have.
    outputs = {n: m for n, m in targets.items() if isinstance(m, nn.MultiheadAttention)}
    weights |= {f"{n}.base_layer.out_proj": m.out_proj.weight for n, m in outputs.items()}
    if not all(weight.is_floating_point() for weight in weights.values()):
        raise ConfigError(["init_lora_weights='gradient' needs gradients, which quantised weights have not; use True"])
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    seen: dict[str, list[Tensor]] = {name: [] for name in weights}

    def see(name: str, args: tuple) -> None:
        if args and torch.is_tensor(args[0]) and args[0].is_floating_point():
            rows = args[0].detach().flatten(0, -2)
            seen[name].append(rows[:: max(1, len(rows) // ROWS)].float())

    hooks = [m.register_forward_pre_hook(lambda _, args, name=n: see(name, args)) for n, m in targets.items()]
    try:
        for p, _, _ in before:
            p.grad = None
            p.requires_grad_(any(p is weight for weight in weights.values()))
        train_step()
        found = {name: weight.grad for name, weight in weights.items()}
    finally:
        for hook in hooks:
            hook.remove()
        for p, trained, gradient in before:
            p.requires_grad_(trained)
            p.grad = gradient
    if missing := [name for name, gradient in found.items() if gradient is None]:
        raise ConfigError([f"train_step gave {missing[0]} no gradient; it has to run forward and loss.backward()"])
    conv1d = {name for name, module in targets.items() if isinstance(module, Conv1D)}
    gradients = {n: (g.T if n in conv1d else g).detach().float() for n, g in found.items() if g is not None}
    return {n: Start(g, torch.cat(seen[n]) if seen[n] else None) for n, g in gradients.items()}


def align_start(adapters: AdapterSet, starts: dict[str, Start]) -> None:
    r"""Set lora_A to the top right singular vectors of the gradient; lora_B stays 0.

    The rank codes A x keep the mean square that they have at PEFT's start, :math:`r \, \lVert x \rVert^2 / 3 d_{in}`:
    under Adam the first steps of the update grow with it, so that larger codes would be a hidden learning rate. Where
    no inputs were seen, A keeps its norm instead. LoRA-GA (arXiv 2407.05000) starts from the same directions but moves
    the base weights too; here they stay.
    """
    for a in adapters:
        gradient, inputs = starts[a.layer]
        v = torch.linalg.svd(gradient[a.rows], full_matrices=False).Vh[: a.r]
        size = torch.tensor(3**-0.5)
        if inputs is not None and inputs.size(1) == v.size(1) and bool(inputs.any()):
            usual = a.r * inputs.square().sum() / (3 * inputs.size(1))
            size = (usual / (inputs @ v.T).square().sum()).sqrt()
        with torch.no_grad():
            adapters.layers[a.layer].lora_A[adapters.adapter_name].weight[a.ranks].copy_(v * size.to(v))
