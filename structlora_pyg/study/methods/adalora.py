"""AdaLoRA (arXiv 2303.10512) with PEFT's layers and allocator: what a training loop has to do around them.

PEFT leaves two things to the loop and to luck: `update_and_allocate` has to be called between ``optimizer.step()``
and ``zero_grad()``, and the orthogonality term is only added for models with a task type. `AdaLora` does both.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.adalora import AdaLoraLayer
from torch import Tensor, nn

from structlora_pyg.checks import ConfigError
from structlora_pyg.study.methods.lora_folder import plain_config, write_lora_folder

logger = logging.getLogger(__name__)


class AdaLora:
    r"""Steps the rank allocation of an AdaLoRA model and adds its orthogonality term.

    .. math:: \Delta W = \frac{\alpha}{r_0}\,P\,diag(\Lambda)\,Q

    with P ``lora_B`` (d_out, r_0), Lambda ``lora_E`` (r_0, 1), Q ``lora_A`` (r_0, d_in), and r_0 ``init_r``. An
    ordinary loop works as it is; it must not call `update_and_allocate` itself::

        model = peft.get_peft_model(base, peft.AdaLoraConfig(..., total_step=1000))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        adalora = AdaLora(model, optimizer)
        for batch in batches:
            model(**batch).loss.backward()
            optimizer.step()  # the hook on it allocates ranks
            optimizer.zero_grad()
        adalora.export("adapter")

    Outputs with ``.loss`` include the orthogonality term in training mode, once: PEFT adds it to models with a task
    type, this class to all others. For outputs without, add `auxiliary_loss` to the loss.

    Args:
        model: A `peft.PeftModel` with a trainable AdaLoRA adapter.
        optimizer: The optimizer that holds its parameters (the torch one, where a library wraps it).
        adapter_name: Which adapter.

    Attributes:
        step: Optimizer steps so far; allocation follows ``total_step`` of the configuration by it.

    Raises:
        ConfigError: Values with which AdaLoRA would not allocate, all at once.
        ValueError: A model without AdaLoRA, or an optimizer that does not hold its parameters.
    """

    def __init__(self, model: PeftModel, optimizer: torch.optim.Optimizer, adapter_name: str = "default") -> None:
        config = model.peft_config.get(adapter_name)
        if not isinstance(config, AdaLoraConfig):
            raise ValueError(f"AdaLora needs a peft.AdaLoraConfig for {adapter_name!r}, got {type(config).__name__}")
        found = _problems(config)
        if found:
            raise ConfigError(found)
        self.model, self.adapter_name, self.config = model, adapter_name, config
        self.layers: dict[str, Any] = {  # both AdaLoraLayer and nn.Module, a type that has no name
            path: module
            for path, module in model.get_base_model().named_modules()
            if isinstance(module, AdaLoraLayer) and adapter_name in module.lora_A
        }
        for path, layer in self.layers.items():
            if isinstance(layer.get_base_layer(), nn.Conv2d):
                raise ValueError(f"{path} is a Conv2d, whose update is no plain LoRA; leave it out of target_modules")
        self.step = 0
        self._parameters = {
            f"{path}.{kind}": getattr(layer, kind)[adapter_name]
            for path, layer in self.layers.items()
            for kind in ("lora_A", "lora_B", "lora_E")
        }
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        missing = [name for name, p in self._parameters.items() if id(p) not in held or not p.requires_grad]
        if missing:
            raise ValueError(
                f"the optimizer does not train {missing[0]} ({len(missing)} of {len(self._parameters)} parameters of "
                "the adapter); build it from model.parameters(), after get_peft_model"
            )
        self._in_tuner = False  # inside the forward of PEFT's AdaLoraModel, which adds the term itself
        self._included = False
        self._losses: dict[str, Tensor] = {}
        tuner, base = model.base_model, model.get_base_model()
        self._handles = [
            optimizer.register_step_post_hook(self._after_step),
            tuner.register_forward_pre_hook(self._enter_tuner),
            tuner.register_forward_hook(self._leave_tuner, always_call=True),
            base.register_forward_hook(self._after_forward),
        ]

    def orthogonality(self) -> Tensor:
        """Return PEFT's term: the mean of ``||P^T P - I||`` and ``||Q Q^T - I||`` (Frobenius), times its weight."""
        norms = []
        for layer in self.layers.values():
            P, Q = layer.lora_B[self.adapter_name], layer.lora_A[self.adapter_name]
            for covariance in (P.T @ P, Q @ Q.T):
                identity = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
                norms.append(torch.linalg.matrix_norm(covariance - identity))
        return self.config.orth_reg_weight * torch.stack(norms).mean()

    def auxiliary_loss(self) -> Tensor:
        """Return the orthogonality term, or 0 where the last output's ``loss`` includes it or the mode is eval."""
        if self._included or not self.model.training:
            return torch.zeros(())
        return self.orthogonality()

    def losses(self) -> dict[str, float]:
        """Return the parts of the last training loss that the output carried: ``task`` and ``auxiliary``."""
        return {name: float(value) for name, value in self._losses.items()}

    def ranks(self) -> dict[str, int]:
        """Return the number of directions in use of every layer."""
        return {path: int((layer.lora_E[self.adapter_name] != 0).sum()) for path, layer in self.layers.items()}

    @torch.no_grad()
    def export(self, folder: str | Path) -> dict[str, int]:
        """Write the plain LoRA folder with lora_E and the scaling folded into lora_B.

        Every layer gets the largest rank in use (zero-padding is exact), because serving engines drop
        ``rank_pattern``; lora_alpha equals that rank.

        Args:
            folder: Where to write; files in it are replaced.

        Returns:
            The number of directions in use of every layer, before padding.

        Raises:
            RuntimeError: If the optimizer never stepped.
            ValueError: If a weight is not finite.
        """
        if self.step == 0:
            raise RuntimeError("no optimizer step was seen, so there is nothing to export. Train the model")
        last = self.config.total_step - self.config.tfinal  # type: ignore[operator]
        if self.step < last:
            logger.warning(
                "training ended after %d steps, while ranks were cut until step %d: the budget of target_r=%d was not "
                "reached. Set total_step to the number of optimizer steps",
                self.step,
                last,
                self.config.target_r,
            )
        name, ranks = self.adapter_name, self.ranks()
        rank = max(1, *ranks.values())
        state = {
            key: value
            for key, value in get_peft_model_state_dict(self.model, adapter_name=name).items()
            if key.rpartition(".")[2] not in ("lora_A", "lora_B", "lora_E")
        }
        for path, layer in self.layers.items():
            used = layer.lora_E[name].flatten() != 0
            A = layer.lora_A[name][used]
            scale = layer.lora_E[name][used].T * layer.scaling[name] / (layer.ranknum[name] + 1e-5)
            B = layer.lora_B[name][:, used] * scale
            missing = rank - A.size(0)
            state[f"base_model.model.{path}.lora_A.weight"] = nn.functional.pad(A, (0, 0, 0, missing))
            state[f"base_model.model.{path}.lora_B.weight"] = nn.functional.pad(B, (0, missing))
        write_lora_folder(folder, state, plain_config(self.model, self.config, rank, rank))
        return ranks

    def remove(self) -> None:
        """Take the hooks off the optimizer and the model."""
        for handle in self._handles:
            handle.remove()

    def _after_step(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict[str, Any]) -> None:
        """Allocate ranks; the gradients of the step are still there."""
        without = [name for name, p in self._parameters.items() if p.grad is None]
        if without:
            raise RuntimeError(
                f"{without[0]} has no gradient after an optimizer step ({len(without)} of {len(self._parameters)} "
                "parameters of the adapter), so AdaLoRA cannot tell how important it is. Was backward called, and does "
                "every adapted layer take part in the forward?"
            )
        self.step += 1
        tuner: Any = self.model.base_model
        tuner.update_and_allocate(self.step)

    def _enter_tuner(self, module: nn.Module, args: tuple) -> None:
        self._in_tuner = True

    def _leave_tuner(self, module: nn.Module, args: tuple, output: Any) -> None:
        self._in_tuner = False
        loss = getattr(output, "loss", None)
        self._included = isinstance(loss, Tensor)
        if isinstance(loss, Tensor) and module.training:
            extra = self.orthogonality().detach()
            self._losses = {"task": loss.detach() - extra, "auxiliary": extra}

    def _after_forward(self, module: nn.Module, args: tuple, output: Any) -> Any:
        """Add the term to an output that carries ``loss``, where PEFT does not."""
        if self._in_tuner:
            return None
        loss = getattr(output, "loss", None)
        self._included = isinstance(loss, Tensor)
        if not isinstance(loss, Tensor) or not module.training:
            return None
        extra = self.orthogonality()
        self._losses = {"task": loss.detach(), "auxiliary": extra.detach()}
        if isinstance(output, dict):
            output["loss"] = loss + extra.to(loss)
        else:
            output.loss = loss + extra.to(loss)
        return output


def _problems(config: AdaLoraConfig) -> list[str]:
    """Return every value with which AdaLoRA would not cut ranks, or fail while it does; empty if there is none."""
    found = []
    if not 1 <= config.target_r < config.init_r:
        found.append(
            f"target_r must be in [1, init_r), got target_r={config.target_r}, init_r={config.init_r}: there is "
            "nothing to cut. init_r = 1.5 target_r is usual"
        )
    total = config.total_step or 0
    if config.tinit >= total - config.tfinal:
        found.append(
            f"tinit must be < total_step - tfinal, got tinit={config.tinit}, tfinal={config.tfinal}, "
            f"total_step={config.total_step}: no step is left to cut ranks in"
        )
    elif total - config.tfinal < 2:
        found.append(
            f"total_step - tfinal must be >= 2, got total_step={config.total_step}, tfinal={config.tfinal}: ranks are "
            "cut by what the steps before have measured"
        )
    if config.deltaT < 1:
        found.append(f"deltaT must be >= 1, got {config.deltaT}")
    for name, value in (("beta1", config.beta1), ("beta2", config.beta2)):
        if not 0 < value < 1:
            found.append(f"{name} must be in (0, 1), got {value}; 0.85 is the default")
    if config.orth_reg_weight < 0:
        found.append(f"orth_reg_weight must be >= 0, got {config.orth_reg_weight}; 0.5 is the default")
    return found
