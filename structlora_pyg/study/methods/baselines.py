"""The systems that StructLoRA is compared with: full fine-tuning, the variants of LoRA, and a trained head alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, VeraConfig, get_peft_model
from torch import Tensor, nn
from transformers.utils import ModelOutput

from structlora_pyg.checks import ConfigError
from structlora_pyg.study.methods.adalora import AdaLora
from structlora_pyg.study.methods.base import Method, Run
from structlora_pyg.study.methods.dylora import DyLora
from structlora_pyg.study.methods.lora_dropout import LoraDropout
from structlora_pyg.study.methods.regularizers import CosinePenalty, LaplacianPenalty
from structlora_pyg.study.methods.sensitivity import sensitivity_config
from structlora_pyg.study.methods.variants import TrainingVariant
from structlora_pyg.tuner.export import save_base
from structlora_pyg.tuner.model import keep_statistics
from structlora_pyg.tuner.optim import lora_fa_optimizer
from structlora_pyg.tuner.targets import matches


class FullFineTuning(Method):
    """All weights are trained."""

    name = "full"
    summary = "full fine-tuning: all weights; wants about a tenth of LoRA's learning rate"
    folder = "model"
    ranked = False
    has_updates = False

    def problems(self) -> list[str]:
        """Return nothing: there is no adapter."""
        return []

    def _adapted(self, base: nn.Module, calibrate: Run, train_step: Run) -> nn.Module:
        return base.requires_grad_(True)

    def parameter_counts(self) -> dict[str, int]:
        """Return all parameters as ``heads``: there is no adapter."""
        total = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        return {"adapter": 0, "heads": total, "training_only": 0}

    def export(self, folder: Path) -> dict[str, float]:
        """Write the weights."""
        save_base(self.model, folder)
        return {}

    def merge(self) -> nn.Module:
        """Return the model."""
        return self.model

    def keep_statistics(self) -> None:
        """Do nothing: they are trained with the rest."""

    def extra_state(self) -> dict[str, Any]:
        """Return the buffers, such as running means, which training changes too."""
        return dict(self.model.named_buffers())

    def load_extra_state(self, state: dict[str, Tensor]) -> None:
        """Restore the buffers."""
        for name, buffer in self.model.named_buffers():
            buffer.copy_(state[name])


class HeadOnly(FullFineTuning):
    """The head is trained on frozen features: what every other method has to beat."""

    name = "head"
    summary = "linear probing: only the head is trained; the floor of a comparison"

    def _adapted(self, base: nn.Module, calibrate: Run, train_step: Run) -> nn.Module:
        heads = self.adapter.modules_to_save or []
        if not heads:
            raise ConfigError(["method.name=head has nothing to train: this task adds no head to the model"])
        base.requires_grad_(False)
        for name, module in base.named_modules():
            if any(f".{name}".endswith(f".{head}") for head in heads):
                module.requires_grad_(True)
        return base

    def keep_statistics(self) -> None:
        """Keep those of the frozen features."""
        keep_statistics(self.model, self.adapter.modules_to_save or ())


class DoRA(Method):
    """LoRA of the direction, and a trained magnitude a row."""

    name = "dora"
    summary = "weight-decomposed LoRA: direction and magnitude (arXiv 2402.09353)"
    dora = True


class QLoRA(Method):
    """LoRA on a 4-bit base."""

    name = "qlora"
    summary = "LoRA on a base in 4-bit NormalFloat (arXiv 2305.14314); needs the extra 'quant'"
    bits4 = True


class AdaLoraMethod(Method):
    """LoRA in singular-value form whose total rank shrinks to a budget."""

    name = "adalora"
    summary = "singular-value form; the total rank shrinks to its budget while training (arXiv 2303.10512)"
    slices = False
    any_start = False
    has_updates = False

    def problems(self) -> list[str]:
        """Return the settings that AdaLoRA's allocation of ranks contradicts, or that PEFT's AdaLoRA lacks."""
        return [*super().problems(), *_ignored(self, "allocates ranks itself", "has no rank-stabilised scaling")]

    def _adapted(self, base: nn.Module, calibrate: Run, train_step: Run) -> nn.Module:
        lora = self._lora(base)
        init_r = max(lora.r + 1, round(1.5 * lora.r))
        config = AdaLoraConfig(
            target_r=lora.r,
            init_r=init_r,
            tinit=int(0.1 * self.total_steps),
            tfinal=int(0.3 * self.total_steps),
            total_step=self.total_steps,
            # PEFT scales by lora_alpha / init_r; this keeps the scaling of the LoRA it is compared with.
            lora_alpha=lora.lora_alpha * init_r / lora.r,  # type: ignore[arg-type]
            **_common(lora, base),
            lora_dropout=lora.lora_dropout,
        )
        return get_peft_model(base, config)

    def optimizer(self, lr: float, weight_decay: float) -> torch.optim.Optimizer:
        """Return AdamW, with the rank allocation behind every step of it."""
        optimizer = super().optimizer(lr, weight_decay)
        self.adalora = AdaLora(self.model, optimizer)
        return optimizer

    def penalty(self) -> Tensor | float:
        """Return the orthogonality term where the output's loss does not include it."""
        return self.adalora.auxiliary_loss()

    def losses(self) -> dict[str, float]:
        """Return ``auxiliary``, and ``task`` where the output carried a loss."""
        return self.adalora.losses() or super().losses()

    def export(self, folder: Path) -> dict[str, float]:
        """Write a plain LoRA of the largest rank in use."""
        ranks = self.adalora.export(folder)
        return {"rank": float(max(ranks.values())), "total_rank": float(sum(ranks.values()))}

    def extra_state(self) -> dict[str, Any]:
        """Return the step, the importance averages of the allocator, and the directions it has settled on."""
        allocator, settled = self.model.base_model.rankallocator, self.adalora.config.rank_pattern or {}
        state: dict[str, Any] = {"step": self.adalora.step}
        for kind in ("ipt", "exp_avg_ipt", "exp_avg_unc"):
            state |= {f"{kind}:{n}": v for n, v in getattr(allocator, kind).items()}
        return state | {f"rank_pattern:{n}": torch.tensor(v) for n, v in settled.items()}

    def load_extra_state(self, state: dict[str, Tensor]) -> None:
        """Restore the allocator."""
        allocator, device = self.model.base_model.rankallocator, next(self.model.parameters()).device
        self.adalora.step = int(state["step"])
        allocator.reset_ipt()
        settled = {}
        for key, value in state.items():
            kind, _, name = key.partition(":")
            if kind == "rank_pattern":
                settled[name] = value.tolist()
            elif name:
                getattr(allocator, kind)[name] = value.to(device)
        self.adalora.config.rank_pattern = settled


class SensitivityLora(Method):
    """LoRA whose ranks follow the sensitivity of the weights."""

    name = "sensitivity_lora"
    summary = "ranks by the sensitivity of the weights, measured once without labels (arXiv 2509.09119)"

    def problems(self) -> list[str]:
        """Return patterns that would contradict the allocation."""
        return [*super().problems(), *_ignored(self, "allocates ranks itself")]

    def _adapted(self, base: nn.Module, calibrate: Run, train_step: Run) -> nn.Module:
        lora = self._lora(base)
        allocated = sensitivity_config(base, lora, calibrate)
        self.adapter.target_modules = lora.target_modules
        self.adapter.rank_pattern, self.adapter.alpha_pattern = allocated.rank_pattern, allocated.alpha_pattern
        return super()._adapted(base, calibrate, train_step)


class _Variant(Method):
    """A method whose training forward draws something random, from a generator of its own."""

    def _adapted(self, base: nn.Module, calibrate: Run, train_step: Run) -> nn.Module:
        model = super()._adapted(base, calibrate, train_step)
        assert isinstance(model, PeftModel)
        self.variant = self._variant(model)
        return model

    def _variant(self, model: PeftModel) -> TrainingVariant:
        raise NotImplementedError

    def extra_state(self) -> dict[str, Any]:
        """Return the state of the generator."""
        return {"generator": self.variant.generator.get_state(), "draws": self.variant.draws}

    def load_extra_state(self, state: dict[str, Tensor]) -> None:
        """Restore the generator."""
        self.variant.generator.set_state(state["generator"])
        self.variant.draws = int(state["draws"])


class LoraDropoutMethod(_Variant):
    """LoRA with masks over input columns and output rows."""

    name = "lora_dropout"
    summary = "masks on columns of A and rows of B, averaged over several a step (arXiv 2404.09610)"
    own_options = ("dropout", "samples", "ensemble")
    variant: LoraDropout

    def _variant(self, model: PeftModel) -> LoraDropout:
        return LoraDropout(model, p=self.options.dropout, samples=self.options.samples, seed=self.adapter.seed)

    def backward(self, closure: Callable[[], Tensor], backward: Callable[[Tensor], Any]) -> Tensor:
        """Run one forward and backward a mask set, on the mean loss."""
        return self.variant.backward(closure, backward)

    def predictor(self, model: nn.Module) -> nn.Module:
        """Return the ensemble over mask sets with ``method.ensemble=true``, else the model without masks."""
        return _Ensemble(model, self.variant) if self.options.ensemble else model


class _Ensemble(nn.Module):
    """A model whose logits are the mean over mask sets; its output has no loss, which would be that of one set."""

    def __init__(self, model: nn.Module, variant: LoraDropout) -> None:
        super().__init__()
        self.model, self.variant = model, variant
        self.training = model.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return mean logits, in the form in which the model gives its own."""
        bare = True

        def logits() -> Tensor:
            nonlocal bare
            output = self.model(*args, **kwargs)
            bare = isinstance(output, Tensor)
            return output if bare else output.logits

        mean = self.variant.ensemble(logits)
        return mean if bare else ModelOutput(logits=mean)


class DyLoraMethod(_Variant):
    """LoRA that works at every rank."""

    name = "dylora"
    summary = "a random prefix of the directions a step, so that every smaller rank works too (arXiv 2210.07558)"
    slices = False
    variant: DyLora

    def problems(self) -> list[str]:
        """Return settings with which there is no one order of directions."""
        found, adapter = super().problems(), self.adapter
        if adapter.r < 2 or adapter.rank_pattern:
            found.append("method.name=dylora needs one rank >= 2 for all layers; set adapter.r, no rank_pattern")
        if adapter.init_lora_weights in ("shared", "gradient"):
            found.append(
                f"method.name=dylora cannot start from init_lora_weights={adapter.init_lora_weights}; leave it out"
            )
        return found

    def _variant(self, model: PeftModel) -> DyLora:
        return DyLora(model, seed=self.adapter.seed)

    def export(self, folder: Path) -> dict[str, float]:
        """Write the plain LoRA of full rank."""
        self.variant.export(folder)
        return {"rank": float(self.variant.rank)}


class LoraFA(Method):
    """LoRA with a frozen lora_A."""

    name = "lora_fa"
    summary = "lora_A stays as drawn, lora_B has a preconditioned gradient (arXiv 2308.03303)"
    slices = False  # the preconditioner would mix the directions of different slices

    def optimizer(self, lr: float, weight_decay: float) -> torch.optim.Optimizer:
        """Return PEFT's LoRA-FA optimizer, which freezes lora_A."""
        return lora_fa_optimizer(self.model, self.adapter.r, self.adapter.lora_alpha, lr, weight_decay)


class VeRA(Method):
    """One frozen random pair for all layers, and two trained vectors a layer."""

    name = "vera"
    own_options = ("vera_r",)
    summary = "shared frozen random factors, two trained vectors a layer (arXiv 2310.11454)"
    slices = False
    any_start = False
    ranked = False
    has_updates = False

    def problems(self) -> list[str]:
        """Return the settings of LoRA that VeRA has no counterpart for."""
        return [*super().problems(), *_ignored(self, "has one rank for all layers", "has no scaling")]

    def _adapted(self, base: nn.Module, calibrate: Run, train_step: Run) -> nn.Module:
        lora = self._lora(base)
        config = VeraConfig(
            r=self.options.vera_r,
            vera_dropout=lora.lora_dropout,
            projection_prng_key=self.adapter.seed,
            **_common(lora, base),
        )
        return get_peft_model(base, config)


class LoraCosine(Method):
    """LoRA with a fixed penalty on the angle between neighbouring updates."""

    name = "lora_cos"
    own_options = ("weight",)
    summary = "LoRA with a penalty on the angle between updates of neighbouring layers"

    def _adapted(self, base: nn.Module, calibrate: Run, train_step: Run) -> nn.Module:
        model = super()._adapted(base, calibrate, train_step)
        assert isinstance(model, PeftModel)
        self.term = self._term(model)
        return model

    def _term(self, model: PeftModel) -> Callable[[], Tensor]:
        return CosinePenalty(model)

    def penalty(self) -> Tensor | float:
        """Return the weighted penalty."""
        return self.options.weight * self.term().float()

    def losses(self) -> dict[str, float]:
        """Return ``auxiliary``, the weighted penalty."""
        return {"auxiliary": self._penalty}


class LoraLaplacian(LoraCosine):
    """LoRA with a fixed penalty on the distance of neighbouring updates."""

    name = "lora_laplacian"
    summary = "LoRA with a penalty on the distance between updates of neighbouring layers"

    def _term(self, model: PeftModel) -> Callable[[], Tensor]:
        return LaplacianPenalty(model)


def _ignored(method: Method, patterns: str, scaling: str | None = None) -> list[str]:
    """Return the settings of LoRA that a method could only ignore: patterns of ranks, and rank-stabilised scaling."""
    adapter, found = method.adapter, []
    if adapter.rank_pattern or adapter.alpha_pattern:
        found.append(f"method.name={method.name} {patterns}; leave rank_pattern and alpha_pattern out")
    if scaling and adapter.use_rslora:
        found.append(f"method.name={method.name} {scaling}; leave adapter.use_rslora out")
    return found


def _common(lora: LoraConfig, base: nn.Module) -> dict[str, Any]:
    """Return what other adapters of PEFT take from a LoRA configuration, besides rank and scaling."""
    common = {name: getattr(lora, name) for name in ("modules_to_save", "task_type", "bias")}
    if lora.exclude_modules:  # which VeRA's configuration does not have
        return {**common, "target_modules": [n for n, _ in base.named_modules() if n and matches(lora, n)]}
    names = ("target_modules", "layers_to_transform", "layers_pattern")
    return {**common, **{name: getattr(lora, name) for name in names}}
