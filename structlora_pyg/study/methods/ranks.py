"""Methods that allocate ranks: Sensitivity-LoRA (arXiv 2509.09119) before training, AdaLoRA (arXiv 2303.10512) in it.

Sensitivity-LoRA takes the Hessian of a linear layer with inputs X (n, d_in) as H = 2/n X^T X, so forward passes without
labels are enough, and only its diagonal (d_in,) is needed::

    model, calibrate -> input_diagonals -> sensitivity_scores -> allocate_ranks -> LoRA with rank_pattern

AdaLoRA has PEFT's layers and allocator. PEFT leaves two things to the loop and to luck: `update_and_allocate` has to be
called between ``optimizer.step()`` and ``zero_grad()``, and the orthogonality term is added only for models with a task
type whose output has a loss. Here a hook on the optimizer does the one and `AdaLora.penalty` the other.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners.adalora import AdaLoraLayer
from torch import Tensor, nn

from structlora_pyg.analysis.inspect import inspect_adapter
from structlora_pyg.analysis.structure import Structure
from structlora_pyg.checks import ConfigError
from structlora_pyg.study.methods import ADAPTER, Method, Run, register, write_lora
from structlora_pyg.study.methods.lora import PlainLora, lora_config, shared_settings
from structlora_pyg.tuner.targets import LINEAR, matches

MASKS = ("attention_mask", "decoder_attention_mask")
TOP = 0.5  # share of the largest entries of a diagonal that count as the top
ENERGY = 0.85  # share of the trace that the effective rank has to reach
LARGEST = 4  # no rank exceeds this multiple of the average


@register("sensitivity_lora")
class SensitivityLora(PlainLora):
    """Ranks by the sensitivity of the weights, measured once without labels (arXiv 2509.09119)."""

    allocates = "allocates ranks itself"

    def build(self, base: nn.Module, calibrate: Run, train_step: Run) -> nn.Module:
        """Return the base with LoRA adapters of the ranks that calibration gives.

        The total rank is that of plain LoRA: its rank times the number of layers; so is the scaling of every layer. The
        paper states neither how to round nor how to scale; this is our choice.

        Raises:
            ConfigError: If a layer is not linear, or not in floating point.
            ValueError: If a layer never ran in calibration, or its inputs are not finite.
        """
        config, adapter = lora_config(base, self.adapter), self.adapter
        targets: dict[str, Any] = {n: m for n, m in base.named_modules() if n and matches(config, n)}
        for name, module in targets.items():
            if not isinstance(module, LINEAR) or not module.weight.is_floating_point():
                kind = f"{name} is a {type(module).__name__}, not a linear layer in floating point"
                raise ConfigError(f"method.name={self.name}: {kind}; take it out of adapter.target_modules")
        scores = sensitivity_scores(list(input_diagonals(base, list(targets), calibrate).values()))
        limits = [min(*module.weight.shape, LARGEST * config.r) for module in targets.values()]
        ranks = allocate_ranks(scores.tolist(), config.r * len(targets), limits)
        root = math.sqrt if config.use_rslora else float
        # PEFT reads a key as a regular expression for the end of a path.
        unique = [sum(bool(re.match(rf"(.*\.)?({n})$", other)) for other in targets) == 1 for n in targets]
        keys = [n if alone else f"^{re.escape(n)}" for n, alone in zip(targets, unique, strict=True)]
        adapter.target_modules, adapter.rank_pattern = config.target_modules, dict(zip(keys, ranks, strict=True))
        alphas = [config.lora_alpha * root(r) / root(config.r) for r in ranks]
        adapter.alpha_pattern = {k: int(a) if a.is_integer() else a for k, a in zip(keys, alphas, strict=True)}
        return super().build(base, calibrate, train_step)


def input_diagonals(model: nn.Module, names: Sequence[str], calibrate: Callable[[], None]) -> dict[str, Tensor]:
    """Return diag(2/n X^T X), (d_in,) in float64, of the inputs X (n, d_in) of every named layer.

    `calibrate` runs the model once, in eval mode, without gradients. Padding does not count: where the model's forward
    gets an ``attention_mask`` (or ``decoder_attention_mask``) of shape (batch, tokens), inputs are taken where it is
    not 0.

    Raises:
        ValueError: If a layer never ran, saw padding only, or saw values that are not finite.
    """
    sums: dict[str, Any] = dict.fromkeys(names, 0.0)
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
        hook = partial(accumulate, name)
        handles.append(model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True))
    try:
        model.eval()
        with torch.no_grad():
            calibrate()
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training
    if idle := [name for name in names if not tokens[name]]:
        raise ValueError(
            f"calibration brought no tokens to {idle[0]} ({len(idle)} of {len(names)} layers); it has to run the "
            "model, on inputs that reach every target layer and are not all padding"
        )
    diagonals = {name: 2.0 / tokens[name] * sums[name] for name in names}
    if broken := [name for name, diagonal in diagonals.items() if not torch.isfinite(diagonal).all()]:
        raise ValueError(f"the inputs of {broken[0]} are not finite in calibration; check base weights and data")
    return diagonals


def metrics(diagonal: Tensor) -> tuple[float, float, int]:
    """Return the three sensitivities (equations 8 to 10) of a weight with the Hessian's `diagonal` (d_in,), >= 0.

    S_g, the trace; S_T, the mean of the larger half of the entries; S_E, the least number of entries that hold 85 % of
    the trace.
    """
    ordered = diagonal.double().sort(descending=True).values
    running = ordered.cumsum(0)
    effective = int((running < ENERGY * running[-1]).sum()) + 1
    return float(running[-1]), float(ordered[: max(1, int(TOP * ordered.numel()))].mean()), effective


def sensitivity_scores(diagonals: Sequence[Tensor]) -> Tensor:
    """Return theta (N,) in float64 of N weights, to which ranks are proportional (equations 11 to 14).

    With c(S) = std(S) / mean(S)^2 over the weights: S_l = c(S_T) S_T + c(S_E) S_E and
    theta = c(S_g) S_g + c(S_l) S_l. A metric that is the same for all weights counts for nothing.
    """
    S_g, S_T, S_E = torch.tensor([metrics(diagonal) for diagonal in diagonals], dtype=torch.float64).unbind(1)
    S_l = _contrast(S_T) * S_T + _contrast(S_E) * S_E
    return _contrast(S_g) * S_g + _contrast(S_l) * S_l


def allocate_ranks(scores: Sequence[float], total: int, limits: Sequence[int]) -> list[int]:
    """Return integer ranks proportional to `scores` >= 0, from 1 to the limit of each, that add up to `total`.

    Shares beyond a bound go to the other weights in proportion; then the largest remainders are rounded up, the first
    of equal ones first, so weights of equal score differ by at most 1. Scores that are all 0 are all alike.

    Raises:
        ValueError: If the bounds leave no room for `total`.
    """
    if not len(scores) <= total <= sum(limits):
        raise ValueError(
            f"a total rank of {total} does not fit {len(scores)} weights with ranks from 1 to {list(limits)}: it has "
            f"to be in [{len(scores)}, {sum(limits)}]; change r"
        )
    weight = np.array(scores) / (max(scores) or 1.0)
    weight = weight.clip(1e-12)  # a score of 0 still takes what is above the limits of the others
    low, high = 0.0, max(limits) / weight.min()
    for _ in range(200):  # the factor with which the bounded shares add up to the total
        factor = (low + high) / 2
        low, high = (factor, high) if (factor * weight).clip(1, limits).sum() < total else (low, factor)
    shares = (high * weight).clip(1, limits)
    ranks = np.floor(shares + 1e-9).astype(int)
    order = sorted(range(len(ranks)), key=lambda i: (round(ranks[i] - shares[i], 9), -scores[i], i))
    for i in [i for i in order if ranks[i] < limits[i]][: total - int(ranks.sum())]:
        ranks[i] += 1
    return ranks.tolist()


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


AVERAGES = ("ipt", "exp_avg_ipt", "exp_avg_unc")  # what the allocator remembers of every parameter


@register("adalora")
class AdaLora(Method):
    r"""Singular-value form; the total rank shrinks to its budget while training (arXiv 2303.10512).

    .. math:: \Delta W = \frac{\alpha}{r_0}\,P\,diag(\Lambda)\,Q

    with P ``lora_B`` (d_out, r_0), Lambda ``lora_E`` (r_0, 1), Q ``lora_A`` (r_0, d_in), and r_0 1.5 times the rank.
    Ranks are cut from a tenth of the steps on, and stay as they are in the last three tenths.
    """

    slices = False
    any_start = False
    has_updates = False
    allocates = "allocates ranks itself"
    unscaled = "has no rank-stabilised scaling"

    def build(self, base: nn.Module, calibrate: Run, train_step: Run) -> nn.Module:
        """Return the base with AdaLoRA adapters.

        Raises:
            ConfigError: If there are too few steps to cut ranks by what earlier ones have measured.
        """
        if self.total_steps < 2:
            raise ConfigError(f"method.name=adalora needs >= 2 optimizer steps to cut ranks, got {self.total_steps}")
        self.lora: LoraConfig = lora_config(base, self.adapter)
        r = self.lora.r
        init_r = max(r + 1, round(1.5 * r))
        self.config = AdaLoraConfig(
            target_r=r,
            init_r=init_r,
            tinit=int(0.1 * self.total_steps),
            tfinal=int(0.3 * self.total_steps),
            total_step=self.total_steps,
            # PEFT scales by lora_alpha / init_r; this keeps the scaling of the LoRA it is compared with.
            lora_alpha=self.lora.lora_alpha * init_r / r,  # type: ignore[arg-type]
            lora_dropout=self.lora.lora_dropout,
            # With a task type PEFT would add the orthogonality term itself, to outputs that carry a loss.
            **{**shared_settings(self.lora, base), "task_type": None},
        )
        model = get_peft_model(base, self.config)
        self.lora.base_model_name_or_path = self.config.base_model_name_or_path
        self.layers: dict[str, Any] = {n: m for n, m in base.named_modules() if isinstance(m, AdaLoraLayer)}
        self.step = 0
        return model

    def optimizer(self, lr: float, weight_decay: float) -> torch.optim.Optimizer:
        """Return AdamW, with the rank allocation behind every step of it."""
        optimizer = super().optimizer(lr, weight_decay)
        optimizer.register_step_post_hook(self._allocate)
        return optimizer

    def _allocate(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict[str, Any]) -> None:
        """Allocate ranks; the gradients of the step are still there."""
        for path, layer in self.layers.items():
            if any(getattr(layer, kind)[ADAPTER].grad is None for kind in ("lora_A", "lora_B", "lora_E")):
                raise RuntimeError(
                    f"{path} has no gradient after an optimizer step, so AdaLoRA cannot tell how important it is. Was "
                    "backward called, and does every adapted layer take part in the forward?"
                )
        self.step += 1
        self.model.base_model.update_and_allocate(self.step)

    def penalty(self) -> Tensor:
        """Return the mean of ``||P^T P - I||`` and ``||Q Q^T - I||`` (Frobenius), times its weight of 0.5."""
        norms = []
        for layer in self.layers.values():
            P, Q = layer.lora_B[ADAPTER], layer.lora_A[ADAPTER]
            for covariance in (P.T @ P, Q @ Q.T):
                identity = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
                norms.append(torch.linalg.matrix_norm(covariance - identity))
        return self.config.orth_reg_weight * torch.stack(norms).mean()

    def ranks(self) -> dict[str, int]:
        """Return the number of directions in use of every layer."""
        return {path: int((layer.lora_E[ADAPTER] != 0).sum()) for path, layer in self.layers.items()}

    def structure(self) -> Structure:
        """Return the structure of the plain LoRA that the export writes: the layers hold singular values."""
        with TemporaryDirectory() as folder:
            self.export(Path(folder))
            return inspect_adapter(folder).structure

    @torch.no_grad()
    def export(self, folder: Path) -> dict[str, float]:
        """Write a plain LoRA with lora_E and the scaling folded into lora_B.

        Every layer gets the largest rank in use (zero-padding is exact), because serving engines drop
        ``rank_pattern``; lora_alpha equals that rank. `peft.convert_to_lora` does not take AdaLoRA's layers.

        Returns:
            ``rank`` of the folder, and ``total_rank``, the number of directions in use.

        Raises:
            ValueError: If a weight is not finite.
        """
        ranks, lora = self.ranks(), ("lora_A", "lora_B", "lora_E")
        rank = max(1, *ranks.values())
        settled, self.config.rank_pattern = self.config.rank_pattern, None  # PEFT would rewrite it
        state = {k: v for k, v in get_peft_model_state_dict(self.model).items() if k.rpartition(".")[2] not in lora}
        self.config.rank_pattern = settled
        for path, layer in self.layers.items():
            used = layer.lora_E[ADAPTER].flatten() != 0
            missing = rank - int(used.sum())
            scale = layer.lora_E[ADAPTER][used].T * layer.scaling[ADAPTER] / (layer.ranknum[ADAPTER] + 1e-5)
            B = layer.lora_B[ADAPTER][:, used] * scale
            state[f"base_model.model.{path}.lora_A.weight"] = nn.functional.pad(
                layer.lora_A[ADAPTER][used], (0, 0, 0, missing)
            )
            state[f"base_model.model.{path}.lora_B.weight"] = nn.functional.pad(B, (0, missing))
        write_lora(folder, self.lora, state, rank, rank)
        return {"rank": float(rank), "total_rank": float(sum(ranks.values()))}

    def extra_state(self) -> dict[str, Any]:
        """Return the step, the importance averages of the allocator, and the directions it has settled on."""
        allocator, settled = self.model.base_model.rankallocator, self.config.rank_pattern or {}
        averages = {f"{kind}:{n}": v for kind in AVERAGES for n, v in getattr(allocator, kind).items()}
        return {"step": self.step, **averages, **{f"rank_pattern:{n}": torch.tensor(v) for n, v in settled.items()}}

    def load_extra_state(self, state: dict[str, Tensor]) -> None:
        """Restore the allocator."""
        allocator, device = self.model.base_model.rankallocator, next(self.model.parameters()).device
        self.step = int(state.pop("step"))
        allocator.reset_ipt()
        self.config.rank_pattern = {}
        for key, value in state.items():
            kind, _, name = key.partition(":")
            if kind == "rank_pattern":
                self.config.rank_pattern[name] = value.tolist()
            else:
                getattr(allocator, kind)[name] = value.to(device)
