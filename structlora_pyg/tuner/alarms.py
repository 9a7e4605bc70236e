"""Alarms: what goes wrong in training without an error, noticed while it can still be mended.

A layer that never sees a gradient, a filter that has closed every gate, a graph without the edges that were asked for:
training runs on, the loss may even fall, and what comes out is not what was meant.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from functools import partial
from typing import get_args

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from torch_geometric.data import Data

from structlora_pyg.data.graph_builder import GraphBuilder
from structlora_pyg.stage_config import Policy
from structlora_pyg.tuner.factor import transformed
from structlora_pyg.tuner.graph_pass import GraphPass

HALF = (torch.float16, torch.bfloat16)
PATIENCE = 5  # optimizer steps in which every part has to have had a gradient


class AlarmWarning(UserWarning):
    """Something that would silently spoil a run."""


class AlarmError(RuntimeError):
    """The same, with ``alarms="error"``."""


class Alarms:
    """Watches a graph pass while it trains. Every alarm is given once.

    Args:
        policy: ``warn`` gives an `AlarmWarning`, ``error`` raises an `AlarmError`, ``off`` does not look.

    Attributes:
        given: The texts of the alarms so far.
        auxiliary_taken: Whether the auxiliary loss has been asked for, since filter and coordinator began to act.

    Raises:
        ValueError: Unknown policy.
    """

    _silent: set[str]  # adapted layers that the loss has not been seen to depend on
    _leaves: _Silent  # those of them that run with their own parameters
    _parts: _Silent
    _began: int | None
    _stepped: set[int]  # ids of the parameters that optimizers hold

    def __init__(self, policy: Policy = "warn") -> None:
        if policy not in get_args(Policy):
            raise ValueError(f"alarms={policy!r} is unknown; one of {', '.join(get_args(Policy))}")
        self.policy = policy
        self.given: list[str] = []
        self.auxiliary_taken = False
        self.__dict__.update(_nothing_heard())

    def give(self, text: str, step: int | None = None) -> None:
        """Give an alarm, unless it was given before, at whatever step; `step` is named in front of it."""
        if self.policy == "off" or any(given.endswith(text) for given in self.given):
            return
        text = text if step is None else f"optimizer step {step}: {text}"
        self.given.append(text)
        if self.policy == "error":
            raise AlarmError(text)
        warnings.warn(text, AlarmWarning, stacklevel=3)

    def before_forward(self, graph_pass: GraphPass, has_auxiliary_loss: bool) -> None:
        """Look for parts without a gradient, and losses that nobody took, at the start of a training forward.

        Args:
            graph_pass: What is watched.
            has_auxiliary_loss: Whether the auxiliary loss of the last forward depended on anything that is trained.
        """
        if self.policy == "off":
            return
        step, layers = graph_pass.step, list(graph_pass.adapters.layers)
        if self._began is None:
            self._began, self._silent = step, set(layers)
            self._parts = _Silent({type(s).__name__: s.parameters() for s in graph_pass.stages})
        if (self._silent or self._leaves.parts) and step >= self._began + PATIENCE:
            unheard = self._silent.union(self._leaves.stop())
            self._silent = set()
            self.give(_no_gradient([path for path in layers if path in unheard], len(layers)))
        acted = step - max(self._began, graph_pass.warmup_steps)
        if acted < PATIENCE or acted % PATIENCE:
            return
        if not self.auxiliary_taken and has_auxiliary_loss:
            self.give(
                f"in {PATIENCE} optimizer steps the auxiliary loss has gone into no loss: the model's output carried "
                "no .loss, and auxiliary_loss() was not called. Add model.auxiliary_loss() to the loss; "
                "transformers.Trainer leaves it out with label_smoothing_factor, which has to be 0"
            )
        self.left_out(graph_pass)
        for name in self._parts.stop():
            self.give(
                f"{name} has had no gradient in {PATIENCE} optimizer steps: it is not learning. Does the loss that is "
                "backpropagated come from this model, in training mode, and without torch.no_grad?"
            )

    def saw(self, optimizer: torch.optim.Optimizer) -> None:
        """Note what an optimizer holds."""
        self._stepped.update(id(p) for group in optimizer.param_groups for p in group["params"])

    def left_out(self, graph_pass: GraphPass) -> None:
        """Look whether filter or coordinator were left out where the adapter was trained."""
        if not any(id(p) in self._stepped for p in graph_pass.adapters.parameters()):
            return  # untrained, or by an optimizer of copies
        for stage in graph_pass.stages:
            if stage is graph_pass.levels:
                continue  # taught by held-out loss, by no optimizer
            held = [id(p) in self._stepped and p.requires_grad for p in stage.parameters()]
            if held and not any(held):
                self.give(
                    f"the optimizer trains the adapter and not the {type(stage).__name__}, which stays as it was: "
                    "its parameters are frozen, or were not given to the optimizer. Give it [p for p in "
                    "model.parameters() if p.requires_grad]; names of theirs do not contain 'lora_'"
                )

    def listen(self, path: str, factor: Tensor) -> None:
        """Wait for a gradient of the factor B' that a layer runs with.

        lora_A and lora_B have one anyway, through the coordinator, whether or not their layer is used.
        """
        if transformed() or (torch.is_grad_enabled() and not factor.requires_grad):
            self._silent.discard(path)  # gradients come by other ways, or are not meant to, as with MiCA
        elif path in self._silent and factor.requires_grad:
            if factor.is_leaf:  # a hook on a parameter stays until it is removed
                self._silent.discard(path)
                self._leaves.add(path, [factor])  # type: ignore[list-item]
            else:
                factor.register_hook(partial(self._hear, path))

    def stop_listening(self) -> None:
        """Take it that every layer has its gradients."""
        self._silent = set()
        self._leaves.stop()

    def _hear(self, path: str, gradient: Tensor | None) -> None:
        if path in self._silent and gradient is not None and bool(gradient.any()):
            self._silent.discard(path)  # from now on the layer costs nothing

    def after_pass(self, graph_pass: GraphPass, data: Data) -> None:
        """Look at the graph that a training forward has just made."""
        if self.policy == "off" or not graph_pass.active:
            return
        step, gate = graph_pass.step, data.gate.detach()
        if not bool(torch.isfinite(gate).all() & torch.isfinite(data.x.detach()).all()):
            self.give(
                "codes or gates are not finite. Lower the learning rate, clip gradients, and go back to the last good "
                "checkpoint",
                step,
            )
        elif not bool(gate.any()):
            self.give(
                "the filter has closed all gates, so the adapter adds nothing. Lower filter.beta or the learning rate, "
                "or raise filter.prior",
                step,
            )
        self.edges(graph_pass.graph)
        for path in graph_pass.adapters.layers:
            for factor in (side.effective for side in graph_pass.adapters.sides(path)):
                if factor is not None and factor.dtype in HALF and not bool(torch.isfinite(factor).all()):
                    self.give(
                        f"the factors of {path} do not fit into {factor.dtype}, which the layer computes in. Use a "
                        "base in bfloat16 or float32, or lower the learning rate",
                        step,
                    )

    def after_step(self) -> None:
        """Do nothing: a graph pass counts optimizer steps by itself."""

    def edges(self, graph: GraphBuilder) -> None:
        """Look whether a graph that should have edges has some."""
        if graph.edges != "none" and graph.edge_index.size(1) == 0:
            self.give(
                f"graph.edges={graph.edges} gives no edge between {graph.num_nodes} nodes, so nothing is coordinated. "
                "Adapt more layers, lower graph.threshold, or say graph.edges=none if that is meant"
            )

    def __getstate__(self) -> dict:
        return {**self.__dict__, **_nothing_heard()}


class TrainingAlarms(Alarms):
    """Alarms of a training loop, for models without a graph pass: did every adapted layer learn?

    Args:
        model: The model that is trained.
        policy: As in `Alarms`.
    """

    def __init__(self, model: nn.Module, policy: Policy = "warn") -> None:
        super().__init__(policy)
        parts: dict[str, list[nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            layer, mark, _ = name.partition(".lora_" if ".lora_" in name else ".vera_lambda")
            if mark:
                parts.setdefault(layer, []).append(parameter)
        self._layers, self._steps = len(parts), 0
        self._parts = _Silent(parts if policy != "off" else {})

    def after_step(self) -> None:
        """Count an optimizer step."""
        self._steps += 1
        if self._steps == PATIENCE and (silent := self._parts.stop()):
            self.give(_no_gradient(silent, self._layers))


def first_not_finite(model: nn.Module) -> str:
    """Return the first parameter, or else gradient, of a model that is not finite, in words."""
    for what in ("weight", "gradient"):
        for name, parameter in model.named_parameters():
            value = parameter if what == "weight" else parameter.grad
            if value is not None and value.is_floating_point() and not torch.isfinite(value).all():
                return f"{what} of {name}"
    return "an activation; weights and gradients are finite"


class _Silent:
    """Parts whose parameters have had no gradient other than 0 yet."""

    def __init__(self, parts: Mapping[str, Iterable[nn.Parameter]]) -> None:
        self.parts: dict[str, list[RemovableHandle]] = {}
        for name, parameters in parts.items():
            self.add(name, parameters)

    def add(self, name: str, parameters: Iterable[nn.Parameter]) -> None:
        """Listen to one more part."""
        hear = partial(self._hear, name)
        if handles := [p.register_post_accumulate_grad_hook(hear) for p in parameters if p.requires_grad]:
            self.parts[name] = handles

    def _hear(self, name: str, parameter: Tensor) -> None:
        if name in self.parts and parameter.grad is not None and bool(parameter.grad.any()):
            for handle in self.parts.pop(name):  # from now on the part costs nothing
                handle.remove()

    def stop(self) -> list[str]:
        """Stop listening and return the parts that were never heard."""
        silent, self.parts = self.parts, {}
        for handle in (handle for handles in silent.values() for handle in handles):
            handle.remove()
        return list(silent)


def _nothing_heard() -> dict:
    return {"_silent": set(), "_leaves": _Silent({}), "_parts": _Silent({}), "_began": None, "_stepped": set()}


def _no_gradient(silent: list[str], total: int) -> str:
    who = "all" if len(silent) == total else f"{len(silent)} of"
    return (
        f"{who} {total} adapted layers have had no gradient in {PATIENCE} optimizer steps, first {silent[0]}: no "
        "learning there. Either the layer's own forward is not called (torch.nn.MultiheadAttention reads the weights "
        "of its out_proj), or it runs under torch.no_grad, or the loss does not depend on it. Take it out of "
        "target_modules if that is meant"
    )
