"""The systems of the paper's tables behind one small interface: ``method.name=<name>``.

A `Method` adapts a base model, says what a training step minimises and does, and exports. Everything else (data, loss
of the task, schedule, evaluation) is the training loop's and the same for all. `METHODS` lists them by name.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, VeraConfig, get_peft_model
from peft.optimizers import create_lorafa_optimizer
from safetensors.torch import load_file, save
from torch import Tensor, nn
from transformers.utils import ModelOutput

from structlora_pyg.adalora import AdaLora
from structlora_pyg.config import (
    ConfigError,
    CoordinatorConfig,
    EncodingConfig,
    FilterConfig,
    GraphConfig,
    MethodConfig,
    ScheduleConfig,
    StructLoraConfig,
)
from structlora_pyg.dylora import DyLora
from structlora_pyg.export import save_base
from structlora_pyg.files import replace_file
from structlora_pyg.lora_dropout import LoraDropout
from structlora_pyg.model import StructLoraModel, get_structlora_model
from structlora_pyg.optim import parameter_groups
from structlora_pyg.quantization import quantize_4bit
from structlora_pyg.regularizers import CosinePenalty, LaplacianPenalty
from structlora_pyg.sensitivity import sensitivity_config
from structlora_pyg.targets import plain_lora
from structlora_pyg.variants import TrainingVariant

STATE_FILE = "method_state.safetensors"
Run = Callable[[], None]


class Method:
    """LoRA, and the base class of the other methods.

    The adapter is stock PEFT's. With ``fused_slices``, or a start that PEFT does not know (``shared``, ``gradient``),
    it is a `StructLoraModel` without filter, coordinator and edges, which is exactly LoRA on those slices and from
    that start.

    Args:
        adapter: Rank, scaling, targets; for StructLoRA graph, filter and coordinator too. Heads to be trained are in
            ``modules_to_save``.
        options: What single methods need besides.
        total_steps: Optimizer steps of the run, for methods with a schedule.

    Attributes:
        model: The adapted model, after `adapt`.
        name: Value of ``method.name``.
        summary: What it does, in a line.
        folder: Folder of a run that `export` writes to.
        coordinates: Whether filter, graph and coordinator act.

    Raises:
        ConfigError: Settings of the adapter that the method cannot follow.
    """

    name = "lora"
    summary = "low-rank updates of chosen weights (arXiv 2106.09685)"
    folder = "adapter"
    coordinates = False
    slices = True  # can adapt slices of a fused projection
    any_start = True  # follows init_lora_weights
    watchable = True  # trains LoRA updates, whose structure can be measured at any step
    dora = False
    bits4 = False

    def __init__(self, adapter: StructLoraConfig, options: MethodConfig, total_steps: int) -> None:
        self.adapter, self.options, self.total_steps = copy.copy(adapter), options, total_steps
        found = self.problems()
        if found:
            raise ConfigError(found)
        self.adapter.use_dora = self.dora or adapter.use_dora
        self.model: Any = None
        self._penalty = 0.0

    def problems(self) -> list[str]:
        """Return the settings that the method could only ignore, empty if there is none."""
        adapter, found, who = self.adapter, [], f"method.name={self.name}"
        if adapter.fused_slices and not self.slices:
            found.append(f"{who} cannot adapt single slices; leave adapter.fused_slices out to adapt whole layers")
        if adapter.init_lora_weights is not True and not self.any_start:
            found.append(f"{who} has a start of its own; leave adapter.init_lora_weights out")
        if adapter.use_dora and not (self.dora or self.coordinates):
            found.append(f"adapter.use_dora=true makes {who} another method; set method.name=dora")
        if self.bits4 and find_spec("bitsandbytes") is None:
            found.append(f"{who} needs bitsandbytes; pip install structlora-pyg[quant]")
        return found

    def adapt(self, base: nn.Module, calibrate: Run, train_step: Run) -> nn.Module:
        """Return the model to train, which `model` holds from now on.

        Args:
            base: The pretrained model; it is changed in place.
            calibrate: Runs forward passes of `base` on some training batches.
            train_step: Runs forward and backward passes of `base` on some training batches.

        Raises:
            ConfigError, ValueError: If the adapter does not fit the model.
        """
        if self.bits4:
            base = quantize_base(base, self.adapter.modules_to_save or ())
        self.model = self._adapted(base, calibrate, train_step)
        return self.model

    def _adapted(self, base: nn.Module, calibrate: Run, train_step: Run) -> nn.Module:
        if not self._on_our_layers():
            return get_peft_model(base, self._lora(base))
        plain = _without_coordination(self.adapter)
        return get_structlora_model(base, plain, train_step=train_step if _follows_gradient(plain) else None)

    def _on_our_layers(self) -> bool:
        return bool(self.adapter.fused_slices) or self.adapter.init_lora_weights in ("shared", "gradient")

    def _lora(self, base: nn.Module) -> LoraConfig:
        """Return the checked plain configuration, without our layers: the baselines are PEFT's own."""
        checked = plain_lora(base, self.adapter)
        return self.adapter.to_lora_config(
            target_modules=checked.target_modules,
            modules_to_save=checked.modules_to_save,
            init_lora_weights=checked.init_lora_weights,
        )

    def optimizer(self, lr: float, weight_decay: float) -> torch.optim.Optimizer:
        """Return AdamW over everything trainable; biases, other vectors and gates have no decay."""
        return torch.optim.AdamW(parameter_groups(self.model, lr, weight_decay))

    def penalty(self) -> Tensor | float:
        """Return what the method adds to the loss of the last forward, where the output does not include it."""
        return 0.0

    def backward(self, closure: Callable[[], Tensor], backward: Callable[[Tensor], Any]) -> Tensor:
        """Run a forward and a backward pass.

        Args:
            closure: Runs the model in training mode and returns the loss.
            backward: What runs the backward pass.

        Returns:
            The detached loss with all of its parts.
        """
        loss, extra = closure(), self.penalty()
        self._penalty = float(torch.as_tensor(extra).detach())
        loss = loss + extra
        backward(loss)
        return loss.detach()

    def losses(self) -> dict[str, float]:
        """Return the parts of the last training loss: ``auxiliary``, and ``task`` where it is not the rest."""
        return self.model.losses() if isinstance(self.model, StructLoraModel) else {"auxiliary": self._penalty}

    def predictor(self, model: nn.Module) -> nn.Module:
        """Return what predicts in evaluation, given `model` as it is trained (possibly wrapped)."""
        return model

    def parameter_counts(self) -> dict[str, int]:
        """Return trainable parameters: ``adapter`` (exported), ``heads`` (exported), ``training_only``."""
        if isinstance(self.model, StructLoraModel):
            return self.model.parameter_counts()
        counts = {"adapter": 0, "heads": 0, "training_only": 0}
        for name, p in self.model.named_parameters():
            if p.requires_grad:
                counts["adapter" if "lora_" in name or "vera_" in name else "heads"] += p.numel()
        return counts

    def export(self, folder: Path) -> dict[str, float]:
        """Write what is left after training; return facts about it."""
        if isinstance(self.model, StructLoraModel):
            return self.model.export(folder)
        self.model.save_pretrained(str(folder))
        return {}

    def merge(self) -> nn.Module:
        """Return the base with the trained update in its weights; the method cannot be used after it.

        Raises:
            ConfigError: On a 4-bit base, whose weights would round the update away.
        """
        if self.bits4:
            raise ConfigError(
                [
                    f"merge=true has no use with method.name={self.name}: 4-bit weights would round the update away. "
                    "Export the adapter, and load it on the dequantised base (structlora_pyg.quantization)"
                ]
            )
        return self.model.merge_and_unload()

    def save(self, folder: Path) -> None:
        """Write everything that training changes.

        Raises:
            ValueError: If a parameter is not finite.
        """
        extra = {f"extra.{n}": torch.as_tensor(v) for n, v in self.extra_state().items()}
        if isinstance(self.model, StructLoraModel):
            self.model.save_pretrained(str(folder))
        state = {**self._parameters(), **extra}
        broken = [n for n, v in state.items() if v.is_floating_point() and not v.isfinite().all()]
        if broken:
            raise ValueError(f"{broken[0].partition('.')[2]} is not finite")
        tensors = {n: v.detach().cpu().contiguous().clone() for n, v in state.items()}
        replace_file(folder / STATE_FILE, save(tensors))

    def load(self, folder: Path) -> None:
        """Restore what `save` wrote.

        Raises:
            FileNotFoundError: If there is nothing.
            ValueError: If the state does not fit.
        """
        file = folder / STATE_FILE
        state = load_file(file)
        parameters = self._parameters()
        stored = {n: v for n, v in state.items() if n.startswith("parameter.")}
        if {n: p.shape for n, p in parameters.items()} != {n: v.shape for n, v in stored.items()}:
            raise ValueError(f"{file} does not fit this model; was it written by {self.name} with these settings?")
        if isinstance(self.model, StructLoraModel):
            self.model.load_training_state(folder)
        with torch.no_grad():
            for n, p in parameters.items():
                p.copy_(stored[n])
        self.load_extra_state({n.removeprefix("extra."): v for n, v in state.items() if n.startswith("extra.")})

    def _parameters(self) -> dict[str, Tensor]:
        """Return the trained parameters and frozen factors; a `StructLoraModel` keeps its own."""
        if isinstance(self.model, StructLoraModel):
            return {}
        named = self.model.named_parameters()
        return {f"parameter.{n}": p for n, p in named if p.requires_grad or ".lora_" in n}

    def extra_state(self) -> dict[str, Any]:
        """Return the method's own state besides parameters, as tensors or numbers."""
        return {}

    def load_extra_state(self, state: dict[str, Tensor]) -> None:
        """Restore `extra_state`."""


class FullFineTuning(Method):
    """All weights are trained."""

    name = "full"
    summary = "full fine-tuning: all weights; wants about a tenth of LoRA's learning rate"
    folder = "model"
    watchable = False

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
    watchable = False

    def problems(self) -> list[str]:
        """Return the settings that AdaLoRA's allocation of ranks contradicts, or that PEFT's AdaLoRA lacks."""
        found, adapter = super().problems(), self.adapter
        if adapter.rank_pattern or adapter.alpha_pattern:
            found.append("method.name=adalora allocates ranks itself; leave rank_pattern and alpha_pattern out")
        if adapter.use_rslora:
            found.append("method.name=adalora has no rank-stabilised scaling; leave adapter.use_rslora out")
        return found

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
            **_common(lora),
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
        given = self.adapter.rank_pattern or self.adapter.alpha_pattern
        text = "method.name=sensitivity_lora allocates ranks itself; leave rank_pattern and alpha_pattern out"
        return [*super().problems(), *([text] if given else [])]

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
        return _lora_fa_optimizer(self.model, self.adapter, lr, weight_decay)


class VeRA(Method):
    """One frozen random pair for all layers, and two trained vectors a layer."""

    name = "vera"
    summary = "shared frozen random factors, two trained vectors a layer (arXiv 2310.11454)"
    slices = False
    any_start = False
    watchable = False

    def problems(self) -> list[str]:
        """Return the settings of LoRA that VeRA has no counterpart for."""
        found, adapter = super().problems(), self.adapter
        if adapter.rank_pattern or adapter.alpha_pattern:
            found.append("method.name=vera has one rank for all layers; leave rank_pattern and alpha_pattern out")
        if adapter.use_rslora:
            found.append("method.name=vera has no scaling; leave adapter.use_rslora out")
        return found

    def _adapted(self, base: nn.Module, calibrate: Run, train_step: Run) -> nn.Module:
        lora = self._lora(base)
        config = VeraConfig(
            r=self.options.vera_r,
            vera_dropout=lora.lora_dropout,
            projection_prng_key=self.adapter.seed,
            **_common(lora),
        )
        return get_peft_model(base, config)


class LoraCosine(Method):
    """LoRA with a fixed penalty on the angle between neighbouring updates."""

    name = "lora_cos"
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


class StructLora(Method):
    """LoRA with filter and coordinator."""

    name = "structlora"
    summary = "information-bottleneck filter and graph coordinator in training, plain LoRA after it (arXiv 2603.14228)"
    coordinates = True

    def _adapted(self, base: nn.Module, calibrate: Run, train_step: Run) -> nn.Module:
        aligned = _follows_gradient(self.adapter)
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
        return _lora_fa_optimizer(self.model, self.adapter, lr, weight_decay)


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


def method_problems(adapter: StructLoraConfig, options: MethodConfig) -> list[str]:
    """Return what `make_method` would raise, empty if there is nothing."""
    try:
        make_method(adapter, options, total_steps=1)
    except ConfigError as error:
        return error.problems
    return []


def quantize_base(base: nn.Module, keep: Any = ()) -> nn.Module:
    """Quantise the linear layers of a base to 4 bit, in place, but for those inside of modules trained as a whole.

    Args:
        base: A model in floating point.
        keep: Names of modules, as in PEFT's ``modules_to_save``.

    Returns:
        The model.
    """
    kept = {name: m for name, m in base.named_modules() if any(f".{name}.".find(f".{k}.") >= 0 for k in keep)}
    linear = {name: m for name, m in kept.items() if isinstance(m, nn.Linear)}
    quantize_4bit(base)
    for name, module in linear.items():
        base.set_submodule(name, module)
    return base


def _without_coordination(adapter: StructLoraConfig) -> StructLoraConfig:
    """Return a copy that makes a `StructLoraModel` do what LoRA does."""
    plain = copy.copy(adapter)
    plain.graph, plain.encoding = GraphConfig(edges="none"), EncodingConfig()
    plain.filter, plain.coordinator = FilterConfig(kind="none", beta=0.0), CoordinatorConfig(conv="none")
    plain.schedule = ScheduleConfig(warmup_steps=0, ramp_steps=0)
    return plain


def _follows_gradient(adapter: StructLoraConfig) -> bool:
    return adapter.init_lora_weights == "gradient"


def _common(lora: LoraConfig) -> dict[str, Any]:
    """Return what other adapters of PEFT take from a LoRA configuration, besides rank and scaling."""
    names = ("target_modules", "modules_to_save", "task_type", "bias", "layers_to_transform", "layers_pattern")
    return {name: getattr(lora, name) for name in names}


def _lora_fa_optimizer(model: Any, adapter: StructLoraConfig, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """Return PEFT's LoRA-FA optimizer, with the decay that AdamW has in the other methods."""
    optimizer = create_lorafa_optimizer(model, adapter.r, adapter.lora_alpha, lr, weight_decay)
    (group,) = optimizer.param_groups
    groups = parameter_groups(model, lr, weight_decay)
    decayed = {id(p) for g in groups if g["weight_decay"] > 0 for p in g["params"]}
    columns = ("params", "names", "scaling_factors")
    rows = list(zip(*(group[c] for c in columns), strict=True))
    parts = (  # a lora_A, which is frozen, goes before its lora_B
        (weight_decay, [row for row in rows if ".lora_" in row[1] or id(row[0]) in decayed]),
        (0.0, [r for r in rows if r[0].requires_grad and ".lora_" not in r[1] and id(r[0]) not in decayed]),
    )
    optimizer.param_groups.clear()
    for decay, part in parts:
        if part:
            values = dict(zip(columns, map(list, zip(*part, strict=True)), strict=True))
            optimizer.add_param_group({**group, **values, "weight_decay": decay})

    def to_parameters(loaded: torch.optim.Optimizer) -> None:
        # This optimizer keeps its state by name, so that torch does not move it to the device of its parameters.
        device = next(model.parameters()).device
        for values in loaded.state.values():
            values.update({k: v.to(device) for k, v in values.items() if isinstance(v, Tensor)})

    optimizer.register_load_state_dict_post_hook(to_parameters)
    return optimizer
