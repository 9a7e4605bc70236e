"""Sensitivity-LoRA (arXiv 2509.09119): ranks that follow how sensitive each weight is.

The Hessian of a linear layer with inputs X (n, d_in) is taken as H = 2/n X^T X, so forward passes without labels are
enough, and only its diagonal (d_in,) is needed::

    model, calibrate -> input_diagonals -> sensitivity_scores -> allocate_ranks -> LoraConfig with rank_pattern
"""

from __future__ import annotations

import copy
import inspect
import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor, nn
from torch_geometric.nn import Linear as PyGLinear
from transformers.pytorch_utils import Conv1D

from structlora_pyg.tuner.targets import HEADS, LINEAR

Config = TypeVar("Config", bound=LoraConfig)

MASKS = ("attention_mask", "decoder_attention_mask")


def sensitivity_config(
    model: nn.Module,
    config: Config,
    calibrate: Callable[[], None],
    largest: float = 4.0,
    top_fraction: float = 0.5,
    energy: float = 0.85,
) -> Config:
    """Return a copy of a LoRA configuration whose ranks follow the sensitivity of the weights.

    The total rank is that of `config`: its rank times the number of target layers. The scaling of every layer stays
    that of `config` as well. The paper states neither how to round nor how to scale; this is our choice.

    Args:
        model: The base model, before adapters are injected.
        config: What to copy, with `target_modules`. `rank_pattern` and `alpha_pattern` are set here and have to be
            empty. A `StructLoraConfig` gives a `StructLoraConfig`.
        calibrate: Runs `model` on some batches of training data. It is called once, in eval mode, without gradients.
        largest: No rank exceeds this multiple of the average, >= 1 (nor the width of its layer).
        top_fraction: See `sensitivity_scores`.
        energy: See `sensitivity_scores`.

    Raises:
        ValueError: If no layer matches, a layer is not linear or never ran, its inputs are not finite, patterns are
            set already, or the model carries adapters.
    """
    config = copy.copy(config)
    if config.target_modules == "all-linear":
        config.target_modules = _all_linear(model)
    targets = _targets(model, config)
    if config.rank_pattern or config.alpha_pattern:
        raise ValueError(
            "rank_pattern and alpha_pattern are what sensitivity_config computes; leave both empty, "
            f"got rank_pattern={config.rank_pattern}, alpha_pattern={config.alpha_pattern}"
        )
    if not largest >= 1:
        raise ValueError(f"largest must be >= 1 (a multiple of the average rank), got {largest!r}; 4 is the default")
    diagonals = input_diagonals(model, list(targets), calibrate)
    scores = sensitivity_scores(list(diagonals.values()), top_fraction, energy)
    limits = [min(*widths, math.floor(largest * config.r)) for widths in targets.values()]
    ranks = allocate_ranks(scores.tolist(), config.r * len(targets), limits)
    root = math.sqrt if config.use_rslora else float
    keys = _pattern_keys(list(targets))
    config.rank_pattern = dict(zip(keys, ranks, strict=True))
    alphas = [config.lora_alpha * root(r) / root(config.r) for r in ranks]
    config.alpha_pattern = {k: int(a) if a.is_integer() else a for k, a in zip(keys, alphas, strict=True)}
    return config


def input_diagonals(model: nn.Module, names: Sequence[str], calibrate: Callable[[], None]) -> dict[str, Tensor]:
    """Return diag(2/n X^T X), (d_in,) in float64, of the inputs X (n, d_in) of every named layer.

    Padding does not count: where the model's forward gets an ``attention_mask`` (or ``decoder_attention_mask``) of
    shape (batch, tokens), inputs of shape (batch, tokens, d_in) or (batch * tokens, d_in) are taken where it is not 0.

    Args:
        model: The model; its modes are restored afterwards.
        names: Paths of linear layers.
        calibrate: Runs `model` on some batches. It is called once, in eval mode, without gradients.

    Raises:
        ValueError: If a layer never ran, saw padding only, or saw values that are not finite.
    """
    sums: dict[str, Tensor | float] = dict.fromkeys(names, 0.0)
    tokens = dict.fromkeys(names, 0)
    masks: list[Tensor] = []
    signature = inspect.signature(model.forward)

    def remember_masks(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given = {**signature.bind_partial(*args, **kwargs).arguments, **kwargs}
        masks[:] = [given[name] for name in MASKS if isinstance(given.get(name), Tensor)]

    def accumulate(name: str, _: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        x = _without_padding((*args, *kwargs.values())[0], masks)
        sums[name] = sums[name] + x.double().square().sum(0)
        tokens[name] += x.size(0)

    modes = [(module, module.training) for module in model.modules()]
    handles = [model.register_forward_pre_hook(remember_masks, with_kwargs=True)]
    for name in names:
        layer = model.get_submodule(name)
        handles.append(layer.register_forward_pre_hook(partial(accumulate, name), with_kwargs=True))
    try:
        model.eval()
        with torch.no_grad():
            calibrate()
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training
    idle = [name for name in names if tokens[name] == 0]
    if idle:
        raise ValueError(
            f"calibration gave no tokens to {_some(idle)}; calibrate() has to run the model, on inputs that reach "
            "every target layer and are not all padding"
        )
    diagonals = {name: 2.0 / tokens[name] * torch.as_tensor(sums[name]) for name in names}
    broken = [name for name, diagonal in diagonals.items() if not torch.isfinite(diagonal).all()]
    if broken:
        raise ValueError(f"the inputs of {_some(broken)} are not finite in calibration; check base weights and data")
    return diagonals


def metrics(diagonal: Tensor, top_fraction: float = 0.5, energy: float = 0.85) -> tuple[float, float, int]:
    """Return the three sensitivities of one weight (equations 8 to 10).

    Args:
        diagonal: (d_in,) diagonal of the Hessian, >= 0.
        top_fraction: The k = `top_fraction` d_in largest entries count as the top, in (0, 1].
        energy: Share of the trace that the effective rank has to reach, in (0, 1].

    Returns:
        S_g, the trace; S_T, the mean of the top entries; S_E, the least number of entries that hold `energy`.

    Raises:
        ValueError: If a fraction is outside (0, 1].
    """
    for name, value in (("top_fraction", top_fraction), ("energy", energy)):
        if not 0 < value <= 1:
            raise ValueError(f"{name} must be in (0, 1], got {value!r}")
    ordered = diagonal.double().sort(descending=True).values
    k = max(1, math.floor(top_fraction * ordered.numel() + 1e-9))
    running = ordered.cumsum(0)
    effective = int((running < energy * running[-1]).sum()) + 1
    return float(running[-1]), float(ordered[:k].mean()), effective


def sensitivity_scores(diagonals: Sequence[Tensor], top_fraction: float = 0.5, energy: float = 0.85) -> Tensor:
    """Return theta (N,) in float64 of N weights, to which ranks are proportional (equations 11 to 14).

    With c(S) = std(S) / mean(S)^2 over the weights: S_l = c(S_T) S_T + c(S_E) S_E and
    theta = c(S_g) S_g + c(S_l) S_l. A metric that is the same for all weights counts for nothing.

    Args:
        diagonals: The diagonal of each weight's Hessian, see `input_diagonals`.
        top_fraction: See `metrics`.
        energy: See `metrics`.
    """
    rows = [metrics(diagonal, top_fraction, energy) for diagonal in diagonals]
    S_g, S_T, S_E = torch.tensor(rows, dtype=torch.float64).unbind(1)
    S_l = _contrast(S_T) * S_T + _contrast(S_E) * S_E
    return _contrast(S_g) * S_g + _contrast(S_l) * S_l


def allocate_ranks(scores: Sequence[float], total: int, limits: Sequence[int], smallest: int = 1) -> list[int]:
    """Return integer ranks proportional to `scores`, between `smallest` and `limits`, that add up to `total`.

    Shares beyond a bound go to the other weights in proportion; then the largest remainders are rounded up, the first
    of equal ones first, so weights of equal score differ by at most 1.

    Args:
        scores: Non-negative scores; all 0 means all alike.
        total: Sum of the ranks.
        limits: Largest rank of each weight.
        smallest: Smallest rank; PEFT knows no rank 0.

    Raises:
        ValueError: If the bounds leave no room for `total`, or a score is negative or not finite.
    """
    n = len(scores)
    if any(not math.isfinite(s) or s < 0 for s in scores):
        raise ValueError(f"scores must be finite and >= 0, got {list(scores)}")
    if len(limits) != n or any(limit < smallest for limit in limits):
        raise ValueError(f"limits must hold {n} ranks >= {smallest}, got {list(limits)}")
    if not n * smallest <= total <= sum(limits):
        raise ValueError(
            f"a total rank of {total} does not fit {n} weights with ranks from {smallest} to {list(limits)}: it has "
            f"to be in [{n * smallest}, {sum(limits)}]; change r, or raise `largest`"
        )
    shares: list[float] = [0.0] * n
    free, left = list(range(n)), float(total)
    while free:
        weight = {i: scores[i] for i in free}
        if not any(weight.values()):
            weight = dict.fromkeys(free, 1.0)
        whole = math.fsum(weight.values())
        quota = {i: left * (weight[i] / whole) for i in free}
        low = [i for i in free if quota[i] < smallest]
        high = [i for i in free if quota[i] > limits[i]]
        missing, excess = sum(smallest - quota[i] for i in low), sum(quota[i] - limits[i] for i in high)
        # Only the side that weighs more is certainly at its bound; the other may come back inside.
        fixed = low if missing >= excess else high
        for i in fixed or free:
            shares[i] = quota[i] if not fixed else smallest if fixed is low else limits[i]
        left -= sum(shares[i] for i in fixed)
        free = [i for i in free if i not in fixed] if fixed else []
    ranks = [math.floor(share + 1e-9) for share in shares]
    order = sorted(range(n), key=lambda i: ranks[i] - shares[i])
    for i in [i for i in order if ranks[i] < limits[i]][: total - sum(ranks)]:
        ranks[i] += 1
    return ranks


def _contrast(values: Tensor) -> Tensor:
    """Return std / mean^2, 0 where the values do not differ."""
    mean, std = values.mean(), values.std(correction=0)
    return std / mean.square() if std > 0 else torch.zeros_like(std)


def _without_padding(x: Tensor, masks: Sequence[Tensor]) -> Tensor:
    """Return the inputs (n, d_in) of the tokens that are not padding."""
    for mask in masks:
        if mask.dim() == 2 and (x.shape[:-1] == mask.shape or x.shape[:-1] == (mask.numel(),)):
            return x.flatten(0, -2)[mask.flatten().to(x.device) != 0]
    return x.flatten(0, -2)


def _all_linear(model: nn.Module) -> list[str]:
    """Return the paths of all linear layers but the output head."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    linear = [name for name, module in model.named_modules() if isinstance(module, LINEAR) and module is not head]
    return [name for name in linear if name.split(".")[-1] not in HEADS]


def _targets(model: nn.Module, config: LoraConfig) -> dict[str, tuple[int, int]]:
    """Return the width (d_in, d_out) of every layer that `config` adapts."""
    if isinstance(model, PeftModel):
        raise ValueError("calibrate the base model before adapters are injected; got a PeftModel")
    if not config.target_modules:
        raise ValueError(
            "target_modules is missing; name the layers, for instance ['q_proj', 'v_proj'], or give 'all-linear'"
        )
    widths: dict[str, tuple[int, int]] = {}
    for name, module in model.named_modules():
        if name and check_target_module_exists(config, name):
            widths[name] = _widths(name, module)
    if not widths:
        raise ValueError(f"no module of the model matches target_modules={config.target_modules!r}")
    return widths


def _widths(name: str, module: nn.Module) -> tuple[int, int]:
    if isinstance(module, Conv1D):
        return module.weight.size(0), module.weight.size(1)
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, PyGLinear):
        return module.in_channels, module.out_channels
    raise ValueError(
        f"{name} is a {type(module).__name__}, not a linear layer; leave it out of target_modules or name it in "
        "exclude_modules"
    )


def _pattern_keys(names: Sequence[str]) -> list[str]:
    """Return a key of PEFT's patterns for every path: the path, anchored only where it would match others as well.

    PEFT reads a key as a regular expression for the end of a path.
    """

    def matched(key: str) -> list[str]:
        return [name for name in names if re.match(rf"(.*\.)?({key})$", name)]

    return [name if matched(name) == [name] else f"^{re.escape(name)}" for name in names]


def _some(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
