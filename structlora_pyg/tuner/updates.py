"""Whether an optimizer has moved the adapters, in any training loop."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from structlora_pyg.tuner.factor import Factor, transformed
from structlora_pyg.tuner.graph_pass import GraphPass, plain_factors

logger = logging.getLogger(__name__)


class Updates:
    """Notices when an optimizer has moved an adapter: by version counters, and by what optimizers hold.

    Fused optimizers do not raise version counters; DeepSpeed's optimizer holds copies of the parameters.

    Args:
        factors: What holds the adapters' parameters.
        module: The graph pass.

    Attributes:
        count: Updates that raised no version counter, or may have raised none.
    """

    def __init__(self, factors: Sequence[Factor], module: nn.Module) -> None:
        self.count = 0
        self._factors, self._module = factors, module
        self._optimizer: Any = None  # weak reference to the last one that held our parameters
        self._last: int | None = None
        self._versions = 0
        self._elsewhere = False  # an optimizer without our parameters has stepped; it may hold copies of them
        self._seen: Tensor | None = None  # a factor as it was when that was last looked into

    def since_last_asked(self) -> bool:
        """Tell whether a parameter has changed since this was last asked; False the first time."""
        if self._seen is None:
            self._look()
        last, self._last = self._last, self.stamp()
        return last is not None and last != self._last

    def stamp(self) -> int:
        """Return a number that grows with every change of a parameter."""
        if not transformed():  # else others stand in their place
            if self._elsewhere:
                self._look()
            self._versions = sum(p._version for p in (*self._module.parameters(), *self._held()))
        return self.count + self._versions

    def _held(self) -> list[Any]:
        """Return the parameters of the factors; those of a deleted adapter are gone."""
        return [f.raw for f in self._factors if f.key in f._parameters or f.key in vars(f)]

    def after_step(self, optimizer: torch.optim.Optimizer) -> bool:
        """Note a step of an optimizer, and tell whether it holds the adapters' parameters."""
        held = self._optimizer is not None and self._optimizer() is optimizer  # as it did at its last step
        if not held:
            ours = {id(p) for p in self._held()}
            held = any(id(p) in ours for group in optimizer.param_groups for p in group["params"])
        if held:
            self.count += 1
            self._seen, self._optimizer = None, weakref.ref(optimizer)
        else:
            self._elsewhere = True
        return held

    def preconditioner(self, parameters: Sequence[nn.Parameter]) -> list[Tensor | float] | None:
        """Return what the optimizer multiplies gradients by, up to its rate: 1 but for the kinds of Adam.

        None before the first step of an optimizer that holds the adapters.
        """
        optimizer = None if self._optimizer is None else self._optimizer()
        if optimizer is None:
            return None
        decay = {id(p): g["betas"][1] for g in optimizer.param_groups if "betas" in g for p in g["params"]}
        found: list[Tensor | float] = [1.0] * len(parameters)
        for k, p in enumerate(parameters):
            state = optimizer.state.get(p, {})
            if "exp_avg_sq" in state:
                unbiased = state["exp_avg_sq"] / (1 - decay[id(p)] ** float(state["step"]))
                found[k] = 1 / (unbiased.sqrt() + 1e-8)
        return found

    def forget(self) -> None:
        """Note that the parameters were loaded: no optimizer has changed them."""
        self._last = self._seen = None

    def _look(self) -> None:
        """Tell by the values of a factor whether an optimizer elsewhere has moved it."""
        value = self._factors[-1].raw.detach().clone()
        if not value.numel():
            return  # cut by DeepSpeed: the next forward can tell
        seen = self._seen  # of another device or type: the model was moved, which is no step
        if seen is not None and (seen.device, seen.dtype) == (value.device, value.dtype):
            self.count += not torch.equal(value, seen)
        self._elsewhere, self._seen = False, value

    def __getstate__(self) -> dict[str, Any]:
        # Copies begin with other version counters, and a weak reference cannot be pickled.
        return {**self.__dict__, "_last": None, "_optimizer": None}


class Listener(Protocol):
    """Who wants to know of optimizer steps."""

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Note a step of any optimizer."""


_LISTENERS: weakref.WeakSet[Listener] = weakref.WeakSet()
_GLOBAL_HOOK: list[RemovableHandle] = []  # empty until there are the first listeners


def tell_of_steps(listener: Listener) -> None:
    """Tell a listener of every optimizer step from now on, as long as it lives."""
    if not _GLOBAL_HOOK:
        _GLOBAL_HOOK.append(register_optimizer_step_post_hook(_tell))
    _LISTENERS.add(listener)


def _tell(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict[str, Any]) -> None:
    for listener in _LISTENERS:
        listener.after_step(optimizer)


def share_of_step(kwargs: dict[str, Any]) -> float | Tensor:
    """Return this forward's share of an optimizer step.

    `transformers.Trainer` gives ``num_items_in_batch``, the number of labels in all micro-batches, and then sums
    losses. The shares of the micro-batches add up to 1, so the auxiliary loss keeps its weight.
    """
    total, labels = kwargs.get("num_items_in_batch"), kwargs.get("labels")
    if total is None or not isinstance(labels, Tensor):
        return 1.0
    return (labels != -100).sum() / total


@torch.no_grad()
def begin_anew(graph_pass: GraphPass) -> None:
    """Make a graph pass what it was before training, so that the plain LoRA that was loaded acts as it is.

    Raises:
        ValueError: If filter or coordinator change it all the same.
    """
    graph_pass.step = 0
    if graph_pass.config is not None:
        graph_pass.load_state_dict(GraphPass.from_config(graph_pass.adapters, graph_pass.config).state_dict())
    factors, name = plain_factors(graph_pass)[0], graph_pass.adapters.adapter_name
    for adapter in graph_pass.adapters:
        a, b = graph_pass.adapters.part(adapter, *factors[adapter.layer])
        A, B = graph_pass.adapters.pair(adapter)
        want = B.to(b) @ A.to(a)
        if (b @ a - want).norm() > 1e-4 * want.norm():
            raise ValueError(
                f"the weights of a plain LoRA were loaded into {name!r}, but its filter and coordinator act from "
                "the first step on and would change them. Set schedule.warmup_steps > 0, or load them under "
                "another adapter name; to restore a StructLoRA adapter, call load_training_state(folder)"
            )
    logger.warning("plain LoRA weights were loaded into %r: its graph pass begins anew", name)
