"""The systems of the paper's tables behind one small interface: ``method.name=<name>``.

A `Method` adapts a base model, says what a training step minimises and does, and exports. Everything else (data, loss
of the task, schedule, evaluation) is the training loop's and the same for all. A method is a class with
``@register("name")``; one in a file of this package is found without being named anywhere else.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import inspect
import pkgutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from peft import LoraConfig
from safetensors.torch import load_file, save
from torch import Tensor, nn

from structlora_pyg.analysis.structure import Structure, adapter_structure
from structlora_pyg.checks import ConfigError, not_one_of, replace_file
from structlora_pyg.config import StructLoraConfig
from structlora_pyg.stage_config import Policy
from structlora_pyg.study.config import MethodConfig
from structlora_pyg.tuner.alarms import Alarms, TrainingAlarms
from structlora_pyg.tuner.export import ADAPTER_FILE
from structlora_pyg.tuner.model import keep_statistics
from structlora_pyg.tuner.optim import lora_fa_optimizer, parameter_groups
from structlora_pyg.tuner.quantization import quantize_4bit

STATE_FILE = "method_state.safetensors"
ADAPTER = "default"  # PEFT's name of the adapter
METHODS: dict[str, type[Method]] = {}
Run = Callable[[], None]
Kind = TypeVar("Kind", bound="type[Method]")


def register(name: str) -> Callable[[Kind], Kind]:
    """Make a `Method` available as ``method.name=<name>``; the first line of its docstring is its summary.

    Args:
        name: Value of ``method.name``.

    Raises:
        ValueError: If another class has the name already.
    """

    def add(kind: Kind) -> Kind:
        if METHODS.setdefault(name, kind) is not kind:
            raise ValueError(f"{name!r} is {METHODS[name].__name__} already; choose another name for {kind.__name__}")
        kind.name, kind.summary = name, (inspect.getdoc(kind) or name).partition("\n")[0].rstrip(".")
        return kind

    return add


def write_tensors(file: Path, state: dict[str, Tensor]) -> None:
    """Write a safetensors file at once.

    Raises:
        ValueError: If a value is not finite.
    """
    for name, value in state.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise ValueError(f"{name} is not finite; go back to the last good checkpoint")
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}
    replace_file(file, save(tensors, metadata={"format": "pt"}))


def write_lora(folder: str | Path, config: LoraConfig, state: dict[str, Tensor], r: int, lora_alpha: float) -> None:
    """Write weights under PEFT's keys as a folder of plain LoRA of rank r and scaling lora_alpha / r.

    Raises:
        ValueError: If a weight is not finite.
    """
    written: Any = copy.copy(config)
    written.r, written.lora_alpha, written.rank_pattern, written.inference_mode = r, lora_alpha, {}, True
    write_tensors(Path(folder) / ADAPTER_FILE, state)
    written.save_pretrained(str(folder))


class Method:
    """Base class of all methods: implement `build`, and override what differs.

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
        is_structlora: Whether filter, graph and coordinator act.

    Raises:
        ConfigError: Settings of the adapter that the method cannot follow.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    folder: ClassVar[str] = "adapter"
    is_structlora: ClassVar[bool] = False
    slices: ClassVar[bool] = True  # can adapt slices of a fused projection
    any_start: ClassVar[bool] = True  # follows init_lora_weights
    ranked: ClassVar[bool] = True  # reads r and lora_alpha
    has_updates: ClassVar[bool] = True  # trains LoRA updates, whose structure can be measured at any step
    own_options: ClassVar[tuple[str, ...]] = ()  # fields of `MethodConfig` that it reads, besides the name
    dora: ClassVar[bool] = False
    bits4: ClassVar[bool] = False
    fa: ClassVar[bool] = False
    allocates: ClassVar[str] = ""  # why patterns of ranks contradict it
    unscaled: ClassVar[str] = ""  # why rank-stabilised scaling does
    coordinated: bool = False  # whether the model is a `StructLoraModel`
    model: Any = None

    def __init__(self, adapter: StructLoraConfig, options: MethodConfig, total_steps: int) -> None:
        self.adapter, self.options, self.total_steps = copy.copy(adapter), options, total_steps
        if found := self.problems():
            raise ConfigError(found)
        self.adapter.use_dora = self.dora or adapter.use_dora
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
        if self.allocates and (adapter.rank_pattern or adapter.alpha_pattern):
            found.append(f"{who} {self.allocates}; leave rank_pattern and alpha_pattern out")
        if self.unscaled and adapter.use_rslora:
            found.append(f"{who} {self.unscaled}; leave adapter.use_rslora out")
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
            quantize_4bit(base, keep=self.adapter.modules_to_save or ())
        self.model = self.build(base, calibrate, train_step)
        return self.model

    def build(self, base: nn.Module, calibrate: Run, train_step: Run) -> nn.Module:
        """Return the adapted base; see `adapt`."""
        raise NotImplementedError

    def optimizer(self, lr: float, weight_decay: float) -> torch.optim.Optimizer:
        """Return AdamW over everything trainable, without decay of vectors and gates; that of PEFT for LoRA-FA."""
        if self.fa:
            return lora_fa_optimizer(self.model, self.adapter.r, self.adapter.lora_alpha, lr, weight_decay)
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

    @classmethod
    def held_out(cls, adapter: StructLoraConfig, options: MethodConfig, examples: int) -> int:
        """Return how many of the training examples are kept out of training, for `teach`."""
        return 0

    def teach(self, step: int, train_loss: Callable[[], Tensor], held_out_loss: Callable[[], Tensor]) -> None:
        """Learn from the examples held out, after an optimizer step; called where there are some."""

    def losses(self) -> dict[str, float]:
        """Return the parts of the last training loss: ``auxiliary``, and ``task`` where it is not the rest."""
        known = self.model.losses() if self.coordinated else {}
        return {**known, "auxiliary": known.get("auxiliary", 0.0) + self._penalty}

    def keep_statistics(self) -> None:
        """Keep the running statistics of the frozen base, which no adapter carries; after every ``model.train()``."""
        keep_statistics(self.model)

    def parameter_counts(self) -> dict[str, int]:
        """Return trainable parameters: ``adapter`` (exported), ``heads`` (exported), ``training_only``."""
        if self.coordinated:
            return self.model.parameter_counts()
        counts = {"adapter": 0, "heads": 0, "training_only": 0}
        for name, p in self.model.named_parameters():
            if p.requires_grad:
                counts["adapter" if ".lora_" in name or ".vera_" in name else "heads"] += p.numel()
        return counts

    def alarms(self, policy: Policy) -> Alarms:
        """Return the alarms of the training; `policy` is that of the configuration."""
        return self.model.hooks.alarms if self.coordinated else TrainingAlarms(self.model, policy)

    def structure(self) -> Structure | None:
        """Return the structure of the updates as they would be exported; None where there are none."""
        return adapter_structure(self.model) if self.has_updates else None

    def gates(self) -> dict[str, Any] | None:
        """Return ``open``, ``mean`` and ``values`` of the gates, a row for each adapter; None without a filter."""
        return None

    def importance(self, loss: Callable[[], Tensor]) -> dict[str, float | None] | None:
        """Return how estimates rank directions against what their removal does to `loss`; None without gates."""
        return None

    def export(self, folder: Path) -> dict[str, float]:
        """Write what is left after training; return facts about it."""
        if self.coordinated:
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
                f"--merge has no use with method.name={self.name}: 4-bit weights would round the update away. "
                "Export the adapter, and load it on the dequantised base (structlora_pyg.tuner.quantization)"
            )
        return self.model.merge_and_unload()

    def state(self) -> dict[str, Tensor]:
        """Return the tensors of a checkpoint: trained ones, frozen factors; a `StructLoraModel` keeps its own."""
        named = self.model.named_parameters()
        return {} if self.coordinated else {n: p for n, p in named if p.requires_grad or ".lora_" in n}

    def save(self, folder: Path) -> None:
        """Write everything that training changes.

        Raises:
            ValueError: If a parameter is not finite.
        """
        if self.coordinated:
            self.model.save_pretrained(str(folder))
        state = {f"parameter.{n}": v for n, v in self.state().items()}
        state |= {f"extra.{n}": torch.as_tensor(v) for n, v in self.extra_state().items()}
        write_tensors(folder / STATE_FILE, state)

    def load(self, folder: Path) -> None:
        """Restore what `save` wrote.

        Raises:
            FileNotFoundError: If there is nothing.
            ValueError: If the state does not fit.
        """
        file, state = folder / STATE_FILE, self.state()
        stored = load_file(file)
        kept = {n.removeprefix("parameter."): v for n, v in stored.items() if n.startswith("parameter.")}
        if {n: p.shape for n, p in state.items()} != {n: v.shape for n, v in kept.items()}:
            raise ValueError(f"{file} does not fit this model; was it written by {self.name} with these settings?")
        if self.coordinated:
            self.model.load_training_state(folder)
        with torch.no_grad():
            for n, p in state.items():
                p.copy_(kept[n])
        self.load_extra_state({n.removeprefix("extra."): v for n, v in stored.items() if n.startswith("extra.")})

    def extra_state(self) -> dict[str, Any]:
        """Return the method's own state besides parameters, as tensors or numbers."""
        return {}

    def load_extra_state(self, state: dict[str, Tensor]) -> None:
        """Restore `extra_state`."""


def make_method(adapter: StructLoraConfig, options: MethodConfig, total_steps: int) -> Method:
    """Return the method that `options.name` names.

    Args:
        adapter: Rank, scaling, targets; for StructLoRA graph, filter and coordinator too.
        options: The name, and what single methods need besides.
        total_steps: Optimizer steps of the run.

    Raises:
        ConfigError: An unknown name; settings of the adapter that the method cannot follow.
    """
    if options.name not in METHODS:
        raise ConfigError(not_one_of("method.name", options.name, METHODS))
    return METHODS[options.name](adapter, options, total_steps)


def method_problems(adapter: StructLoraConfig, options: MethodConfig) -> list[str]:
    """Return an unknown name, options of other methods, and what `make_method` would raise; empty if all is well."""
    found = []
    for field in dataclasses.fields(MethodConfig):
        users = [name for name, method in METHODS.items() if field.name in method.own_options]
        changed = field.name != "name" and getattr(options, field.name) != field.default
        if changed and options.name in METHODS and options.name not in users:
            belongs = f"it belongs to {', '.join(users)}"
            found.append(f"method.{field.name} has no effect with method.name={options.name}; {belongs}")
    try:
        make_method(adapter, options, total_steps=1)
    except ConfigError as error:
        found += error.problems
    return found


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
