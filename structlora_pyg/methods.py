"""The systems of the paper's tables behind one small interface: ``method.name=<name>``.

A `Method` adapts a base model, says what a training step minimises and does, and exports. Everything else (data, loss
of the task, optimizer, schedule, evaluation) is the training loop's and the same for all.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, VeraConfig, get_peft_model, get_peft_model_state_dict
from peft.optimizers import create_lorafa_optimizer
from safetensors.torch import load_file, save, save_model
from torch import Tensor, nn

from structlora_pyg.adalora import AdaLora
from structlora_pyg.config import ConfigError, MethodConfig, StructLoraConfig
from structlora_pyg.dylora import DyLora
from structlora_pyg.files import replace_file
from structlora_pyg.lora_dropout import LoraDropout
from structlora_pyg.model import StructLoraModel, get_structlora_model, plain_lora
from structlora_pyg.optim import parameter_groups
from structlora_pyg.quantization import dequantize_4bit, quantize_4bit
from structlora_pyg.regularizers import CosinePenalty, LaplacianPenalty
from structlora_pyg.sensitivity import sensitivity_config

STATE_FILE = "method_state.safetensors"


class Method:
    """Plain LoRA by stock PEFT, and the base class of the other methods.

    Args:
        adapter: Rank, scaling, targets; for StructLoRA graph, filter and coordinator too. Heads to be trained are in
            ``modules_to_save``.
        options: What single methods need besides.
        total_steps: Optimizer steps of the run, for methods with a schedule.

    Attributes:
        model: The adapted model, after `adapt`.
    """

    name = "lora"
    summary = "low-rank updates of chosen weights (arXiv 2106.09685)"

    def __init__(self, adapter: StructLoraConfig, options: MethodConfig, total_steps: int) -> None:
        self.adapter, self.options, self.total_steps = adapter, options, total_steps
        self.model: Any = None

    def adapt(self, base: nn.Module, calibrate: Callable[[], None], train_step: Callable[[], None]) -> nn.Module:
        """Return the model to train.

        Args:
            base: The pretrained model; it is changed in place.
            calibrate: Runs forward passes of `base` on some training batches.
            train_step: Runs forward and backward passes of `base` on some training batches.
        """
        self.model = self._adapted(base, calibrate, train_step)
        return self.model

    def _adapted(self, base: nn.Module, calibrate: Callable[[], None], train_step: Callable[[], None]) -> nn.Module:
        return get_peft_model(base, self._lora(base))

    def _lora(self, base: nn.Module, **changes: Any) -> LoraConfig:
        """Return the checked plain configuration, without our layers: the baselines are PEFT's own."""
        lora = plain_lora(base, self.adapter)
        values = {k: v for k, v in vars(copy.copy(lora)).items() if k in LoraConfig.__dataclass_fields__}
        values = {k: v for k, v in values.items() if LoraConfig.__dataclass_fields__[k].init}
        return LoraConfig(**{**values, **changes})

    def optimizer(self, lr: float, weight_decay: float) -> torch.optim.Optimizer:
        """Return AdamW over everything trainable."""
        return torch.optim.AdamW(parameter_groups(self.model, lr, weight_decay))

    def penalty(self) -> Tensor | float:
        """Return what the method adds to the loss of the last forward, where the output does not include it."""
        return 0.0

    def backward(self, closure: Callable[[], Tensor], backward: Callable[[Tensor], Any]) -> Tensor:
        """Run forward (`closure` returns the loss) and `backward`; return the detached loss."""
        loss = closure() + self.penalty()
        backward(loss)
        return loss.detach()

    def losses(self) -> dict[str, float]:
        """Return ``task`` and ``auxiliary`` of the last training loss, where known."""
        return {}

    def scores(self, closure: Callable[[], Tensor]) -> Tensor:
        """Return the prediction of `closure` as the method makes it in evaluation."""
        return closure()

    def parameter_counts(self) -> dict[str, int]:
        """Return trainable parameters: ``adapter`` (exported), ``heads`` (exported), ``training_only``."""
        counts = {"adapter": 0, "heads": 0, "training_only": 0}
        for name, p in self.model.named_parameters():
            if p.requires_grad:
                counts["adapter" if any(k in name for k in ("lora_", "vera_")) else "heads"] += p.numel()
        return counts

    def export(self, folder: Path) -> dict[str, float]:
        """Write what is left after training; return facts about it."""
        self.model.save_pretrained(str(folder))
        return {}

    def save(self, folder: Path) -> None:
        """Write everything that training changes."""
        state = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        tensors = {f"parameter.{n}": p.detach().cpu().contiguous().clone() for n, p in state.items()}
        extra = {f"extra.{n}": torch.as_tensor(v).cpu() for n, v in self.extra_state().items()}
        replace_file(folder / STATE_FILE, save({**tensors, **extra}))

    def load(self, folder: Path) -> None:
        """Restore what `save` wrote.

        Raises:
            ValueError: If the state does not fit.
        """
        state = load_file(folder / STATE_FILE)
        parameters = {f"parameter.{n}": p for n, p in self.model.named_parameters() if p.requires_grad}
        stored = {n: v for n, v in state.items() if n.startswith("parameter.")}
        if {n: p.shape for n, p in parameters.items()} != {n: v.shape for n, v in stored.items()}:
            raise ValueError(f"{folder / STATE_FILE} does not fit this model; was it written by {self.name}?")
        with torch.no_grad():
            for n, p in parameters.items():
                p.copy_(stored[n])
        self.load_extra_state({n.removeprefix("extra."): v for n, v in state.items() if n.startswith("extra.")})

    def extra_state(self) -> dict[str, Any]:
        """Return the method's own state besides parameters, as tensors or numbers."""
        return {}

    def load_extra_state(self, state: dict[str, Tensor]) -> None:
        """Restore `extra_state`."""


class FullFineTuning(Method):
    """All weights are trained."""

    name = "full"
    summary = "full fine-tuning: all weights; wants about a tenth of LoRA's learning rate"

    def _adapted(self, base: nn.Module, calibrate: Callable[[], None], train_step: Callable[[], None]) -> nn.Module:
        return base.requires_grad_(True)

    def parameter_counts(self) -> dict[str, int]:
        """Return all parameters as ``heads``: there is no adapter."""
        total = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        return {"adapter": 0, "heads": total, "training_only": 0}

    def export(self, folder: Path) -> dict[str, float]:
        """Write the weights."""
        folder.mkdir(parents=True, exist_ok=True)
        if hasattr(type(self.model), "save_pretrained"):
            self.model.save_pretrained(folder)
        else:
            save_model(self.model, str(folder / "model.safetensors"))
        return {}


class StructLora(Method):
    """LoRA with filter and coordinator."""

    name = "structlora"
    summary = "information-bottleneck filter and graph coordinator in training, plain LoRA after it (arXiv 2603.14228)"

    def _adapted(self, base: nn.Module, calibrate: Callable[[], None], train_step: Callable[[], None]) -> nn.Module:
        aligned = self.adapter.init_lora_weights == "gradient"
        return get_structlora_model(base, self.adapter, train_step=train_step if aligned else None)

    def losses(self) -> dict[str, float]:
        """Return ``task`` and ``auxiliary`` of the last training loss."""
        return self.model.losses()

    def parameter_counts(self) -> dict[str, int]:
        """Return trainable parameters by what becomes of them."""
        return self.model.parameter_counts()

    def export(self, folder: Path) -> dict[str, float]:
        """Write the plain LoRA, verified."""
        return self.model.export(folder)

    def save(self, folder: Path) -> None:
        """Write adapter and training state."""
        self.model.save_pretrained(str(folder))

    def load(self, folder: Path) -> None:
        """Restore the training state."""
        self.model.load_training_state(folder)


class DoRA(Method):
    """LoRA of the direction, and a trained magnitude a row."""

    name = "dora"
    summary = "weight-decomposed LoRA: direction and magnitude (arXiv 2402.09353)"

    def _lora(self, base: nn.Module, **changes: Any) -> LoraConfig:
        return super()._lora(base, use_dora=True, **changes)


class QLoRA(Method):
    """LoRA on a 4-bit base."""

    name = "qlora"
    summary = "LoRA on a base in 4-bit NormalFloat (arXiv 2305.14314); needs the extra 'quant'"

    def _adapted(self, base: nn.Module, calibrate: Callable[[], None], train_step: Callable[[], None]) -> nn.Module:
        return super()._adapted(_quantised(base, self.adapter), calibrate, train_step)


class SensitivityLora(Method):
    """LoRA whose ranks follow the sensitivity of the weights."""

    name = "sensitivity_lora"
    summary = "ranks by the sensitivity of the weights, measured once without labels (arXiv 2509.09119)"

    def _adapted(self, base: nn.Module, calibrate: Callable[[], None], train_step: Callable[[], None]) -> nn.Module:
        return get_peft_model(base, sensitivity_config(base, self._lora(base), calibrate))


class LoraDropoutMethod(Method):
    """LoRA with masks over input columns and output rows."""

    name = "lora_dropout"
    summary = "masks on columns of A and rows of B, averaged over several a step (arXiv 2404.09610)"

    def _adapted(self, base: nn.Module, calibrate: Callable[[], None], train_step: Callable[[], None]) -> nn.Module:
        model = super()._adapted(base, calibrate, train_step)
        assert isinstance(model, PeftModel)
        self.variant = LoraDropout(model, p=self.options.dropout, samples=self.options.samples, seed=self.adapter.seed)
        return model

    def backward(self, closure: Callable[[], Tensor], backward: Callable[[Tensor], Any]) -> Tensor:
        """Run one forward and backward a mask set, on the mean loss."""
        return self.variant.backward(closure, backward)

    def scores(self, closure: Callable[[], Tensor]) -> Tensor:
        """Return the ensemble's prediction with ``method.ensemble=true``, else that of the merged adapter."""
        return self.variant.ensemble(closure) if self.options.ensemble else closure()

    def extra_state(self) -> dict[str, Any]:
        """Return the state of the mask generator."""
        return {"generator": self.variant.generator.get_state(), "draws": self.variant.draws}

    def load_extra_state(self, state: dict[str, Tensor]) -> None:
        """Restore the mask generator."""
        self.variant.generator.set_state(state["generator"])
        self.variant.draws = int(state["draws"])


class DyLoraMethod(Method):
    """LoRA that works at every rank."""

    name = "dylora"
    summary = "a random prefix of the directions a step, so that every smaller rank works too (arXiv 2210.07558)"

    def _adapted(self, base: nn.Module, calibrate: Callable[[], None], train_step: Callable[[], None]) -> nn.Module:
        model = super()._adapted(base, calibrate, train_step)
        assert isinstance(model, PeftModel)
        self.variant = DyLora(model, seed=self.adapter.seed)
        return model

    def export(self, folder: Path) -> dict[str, float]:
        """Write the plain LoRA of full rank."""
        self.variant.export(folder)
        return {"rank": float(self.variant.rank)}

    def extra_state(self) -> dict[str, Any]:
        """Return the state of the rank generator."""
        return {"generator": self.variant.generator.get_state(), "draws": self.variant.draws}

    def load_extra_state(self, state: dict[str, Tensor]) -> None:
        """Restore the rank generator."""
        self.variant.generator.set_state(state["generator"])
        self.variant.draws = int(state["draws"])


class AdaLoraMethod(Method):
    """LoRA in singular-value form whose total rank shrinks to a budget."""

    name = "adalora"
    summary = "singular-value form; the total rank shrinks to its budget while training (arXiv 2303.10512)"

    def _adapted(self, base: nn.Module, calibrate: Callable[[], None], train_step: Callable[[], None]) -> nn.Module:
        lora = self._lora(base)
        if lora.rank_pattern:
            raise ConfigError(["method.name=adalora allocates ranks itself: leave fused_slices and rank_pattern out"])
        cut, settle = int(0.1 * self.total_steps), int(0.3 * self.total_steps)
        config = AdaLoraConfig(
            target_r=lora.r,
            init_r=max(lora.r + 1, round(1.5 * lora.r)),
            tinit=cut,
            tfinal=settle,
            total_step=self.total_steps,
            # PEFT scales by lora_alpha / init_r; this keeps the scaling of the LoRA it is compared with.
            lora_alpha=lora.lora_alpha * max(lora.r + 1, round(1.5 * lora.r)) / lora.r,  # type: ignore[arg-type]
            target_modules=lora.target_modules,
            modules_to_save=lora.modules_to_save,
            task_type=lora.task_type,
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
        """Return ``task`` and ``auxiliary``."""
        return self.adalora.losses()

    def export(self, folder: Path) -> dict[str, float]:
        """Write a plain LoRA of the largest rank in use."""
        ranks = self.adalora.export(folder)
        return {"rank": float(max(ranks.values())), "total_rank": float(sum(ranks.values()))}

    def extra_state(self) -> dict[str, Any]:
        """Return step and importance averages of the allocator."""
        allocator = self.model.base_model.rankallocator
        state: dict[str, Any] = {"step": self.adalora.step}
        for kind in ("ipt", "exp_avg_ipt", "exp_avg_unc"):
            state |= {f"{kind}:{n}": v for n, v in getattr(allocator, kind).items()}
        return state

    def load_extra_state(self, state: dict[str, Tensor]) -> None:
        """Restore the allocator."""
        allocator = self.model.base_model.rankallocator
        self.adalora.step = int(state.pop("step"))
        for key, value in state.items():
            kind, _, name = key.partition(":")
            getattr(allocator, kind)[name] = value


class LoraFA(Method):
    """LoRA with a frozen lora_A."""

    name = "lora_fa"
    summary = "lora_A stays as drawn, lora_B has a preconditioned gradient (arXiv 2308.03303)"

    def optimizer(self, lr: float, weight_decay: float) -> torch.optim.Optimizer:
        """Return PEFT's LoRA-FA optimizer, which freezes lora_A."""
        a = self.adapter
        return create_lorafa_optimizer(self.model, a.r, int(a.lora_alpha), lr, weight_decay)


class VeRA(Method):
    """One frozen random pair for all layers, and two trained vectors a layer."""

    name = "vera"
    summary = "shared frozen random factors, two trained vectors a layer (arXiv 2310.11454)"

    def _adapted(self, base: nn.Module, calibrate: Callable[[], None], train_step: Callable[[], None]) -> nn.Module:
        lora = self._lora(base)
        if lora.rank_pattern:
            raise ConfigError(["method.name=vera has one rank for all layers: leave fused_slices and rank_pattern out"])
        config = VeraConfig(
            r=self.options.vera_r,
            target_modules=lora.target_modules,
            modules_to_save=lora.modules_to_save,
            task_type=lora.task_type,
            projection_prng_key=self.adapter.seed,
        )
        return get_peft_model(base, config)


class LoraCosine(Method):
    """LoRA with a fixed penalty on the angle between neighbouring updates."""

    name = "lora_cos"
    summary = "LoRA with a penalty on the angle between updates of neighbouring layers"

    def _adapted(self, base: nn.Module, calibrate: Callable[[], None], train_step: Callable[[], None]) -> nn.Module:
        model = super()._adapted(base, calibrate, train_step)
        assert isinstance(model, PeftModel)
        self.term: Callable[[], Tensor] = self._term(model)
        return model

    def _term(self, model: PeftModel) -> Callable[[], Tensor]:
        return CosinePenalty(model)

    def penalty(self) -> Tensor | float:
        """Return the weighted penalty."""
        return self.options.weight * self.term().float()


class LoraLaplacian(LoraCosine):
    """LoRA with a fixed penalty on the distance of neighbouring updates."""

    name = "lora_laplacian"
    summary = "LoRA with a penalty on the distance between updates of neighbouring layers"

    def _term(self, model: PeftModel) -> Callable[[], Tensor]:
        return LaplacianPenalty(model)


class StructQLoRA(StructLora):
    """StructLoRA on a 4-bit base."""

    name = "structlora_qlora"
    summary = "StructLoRA on a base in 4-bit NormalFloat; needs the extra 'quant'"

    def _adapted(self, base: nn.Module, calibrate: Callable[[], None], train_step: Callable[[], None]) -> nn.Module:
        return super()._adapted(_quantised(base, self.adapter), calibrate, train_step)


class StructDoRA(StructLora):
    """StructLoRA with DoRA's magnitudes."""

    name = "structlora_dora"
    summary = "StructLoRA with DoRA's magnitudes"

    def _adapted(self, base: nn.Module, calibrate: Callable[[], None], train_step: Callable[[], None]) -> nn.Module:
        self.adapter = copy.copy(self.adapter)
        self.adapter.use_dora = True
        return super()._adapted(base, calibrate, train_step)


class StructLoraFA(StructLora):
    """StructLoRA with a frozen lora_A."""

    name = "structlora_fa"
    summary = "StructLoRA with a frozen lora_A"

    def _adapted(self, base: nn.Module, calibrate: Callable[[], None], train_step: Callable[[], None]) -> nn.Module:
        model = super()._adapted(base, calibrate, train_step)
        assert isinstance(model, StructLoraModel)
        for layer in model.coordination.adapters.layers.values():
            layer.lora_A[model.coordination.adapters.adapter_name].weight.requires_grad_(False)
        return model


METHODS: dict[str, type[Method]] = {
    m.name: m
    for m in (
        FullFineTuning, Method, QLoRA, DoRA, AdaLoraMethod, SensitivityLora, LoraDropoutMethod, DyLoraMethod, LoraFA,
        VeRA, LoraCosine, LoraLaplacian, StructLora, StructQLoRA, StructDoRA, StructLoraFA,
    )
}  # fmt: skip


def make_method(adapter: StructLoraConfig, options: MethodConfig, total_steps: int) -> Method:
    """Return the method that `options.name` names."""
    return METHODS[options.name](adapter, options, total_steps)


def load_exported(base: nn.Module, folder: Path, adapter: StructLoraConfig) -> nn.Module:
    """Return a base model with the merged weights of an exported adapter, dequantised first where it is in 4 bit."""
    merged: Any = PeftModel.from_pretrained(dequantize_4bit(base), str(folder))
    return merged.merge_and_unload()


def adapter_state(model: PeftModel) -> dict[str, Tensor]:
    """Return the adapter's tensors under PEFT's keys."""
    return get_peft_model_state_dict(model)


@contextlib.contextmanager
def as_the_method_predicts(method: Method) -> Iterator[Method]:
    """Evaluate with the method's own way of predicting."""
    yield method


def _quantised(base: nn.Module, adapter: StructLoraConfig) -> nn.Module:
    return quantize_4bit(base, skip=list(adapter.modules_to_save or []))
