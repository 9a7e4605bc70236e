"""What a method is: how a base model is adapted, what a training step does, and what is left at the end."""

from __future__ import annotations

import copy
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save
from torch import Tensor, nn

from structlora_pyg.checks import ConfigError
from structlora_pyg.config import StructLoraConfig
from structlora_pyg.files import replace_file
from structlora_pyg.stage_config import CoordinatorConfig, EncodingConfig, FilterConfig, GraphConfig, ScheduleConfig
from structlora_pyg.study.methods.quantization import quantize_4bit
from structlora_pyg.study.run_config import MethodConfig
from structlora_pyg.tuner.model import StructLoraModel, get_structlora_model, keep_statistics
from structlora_pyg.tuner.optim import parameter_groups
from structlora_pyg.tuner.targets import plain_lora

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
    is_structlora = False
    slices = True  # can adapt slices of a fused projection
    any_start = True  # follows init_lora_weights
    ranked = True  # reads r and lora_alpha
    has_updates = True  # trains LoRA updates, whose structure can be measured at any step
    own_options: ClassVar[tuple[str, ...]] = ()  # fields of `MethodConfig` that it reads, besides the name
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
        if adapter.use_dora and not (self.dora or self.is_structlora):
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
        return get_structlora_model(base, plain, train_step=train_step if follows_gradient(plain) else None)

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

    def keep_statistics(self) -> None:
        """Keep the running statistics of the frozen base, which no adapter carries; after every ``model.train()``."""
        keep_statistics(self.model)

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
                    f"--merge has no use with method.name={self.name}: 4-bit weights would round the update away. "
                    "Export the adapter, and load it on the dequantised base "
                    "(structlora_pyg.study.methods.quantization)"
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


def quantize_base(base: nn.Module, keep: Any = ()) -> nn.Module:
    """Quantise the linear layers of a base to 4 bit, in place, but for those inside of modules trained as a whole.

    Args:
        base: A model in floating point.
        keep: Names of modules, as in PEFT's ``modules_to_save``.

    Returns:
        The model.
    """
    kept = {name: m for name, m in base.named_modules() if any(f".{k}." in f".{name}." for k in keep)}
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


def follows_gradient(adapter: StructLoraConfig) -> bool:
    """Tell whether the start of lora_A needs gradients of the loss."""
    return adapter.init_lora_weights == "gradient"
