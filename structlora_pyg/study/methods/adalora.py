"""AdaLoRA (arXiv 2303.10512) with PEFT's layers and allocator.

PEFT leaves two things to the loop and to luck: `update_and_allocate` has to be called between ``optimizer.step()``
and ``zero_grad()``, and the orthogonality term is added only for models with a task type whose output has a loss. Here
a hook on the optimizer does the one and `AdaLora.penalty` the other.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners.adalora import AdaLoraLayer
from torch import Tensor, nn

from structlora_pyg.analysis.inspect import inspect_adapter
from structlora_pyg.analysis.structure import Structure
from structlora_pyg.checks import ConfigError
from structlora_pyg.study.methods import ADAPTER, Method, Run, register, write_lora
from structlora_pyg.study.methods.lora import lora_config, shared_settings

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
            raise ConfigError([f"method.name=adalora needs >= 2 optimizer steps to cut ranks, got {self.total_steps}"])
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
