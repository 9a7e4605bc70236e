"""The ``nn.Linear`` inside PEFT's ``lora_A`` and ``lora_B``, running on the factor that the graph pass made from it.

Same parameter, same state-dict key. `coordinated` turns it about for code that reads parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FactorSource(Protocol):
    """Where a `Factor` has its coordinated factor from; `structlora_pyg.tuner.hooks.PassHooks` is one."""

    in_forward: bool

    @property
    def updates(self) -> int:
        """Number of updates of the parameters that their version counters may not show."""

    def run(self) -> None:
        """Call `Factor.set` of every factor."""

    def observe(self, factor: Factor, t: Tensor) -> None:
        """Look at what a ``lora_A`` returned, (..., r)."""

    def plain(self) -> Mapping[Factor, Tensor]:
        """Return what every factor is in the plain LoRA that computes the same in evaluation."""

    def loaded(self) -> None:
        """Note that the parameter of a factor has come from a state dict."""


class Factor(nn.Linear):
    """``lora_A`` (r, d_in) or ``lora_B`` (d_out, r) whose forward uses the coordinated factor.

    Args:
        linear: The layer made by PEFT; its parameters are taken over, not copied.
        source: What `current` asks for a fresh factor.
        position: Index of the layer, for a ``lora_A``, whose outputs the auxiliary loss may want.
    """

    def __init__(self, linear: nn.Linear, source: FactorSource, position: int | None = None) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight = linear.weight
        self.bias = linear.bias
        self.position = position
        self.effective = None
        self.source = source

    position: int | None
    effective: Tensor | None
    folded = False  # whether `coordinated` has made the coordinated factor its parameter

    def set(self, factor: Tensor | None) -> None:
        """Set the factor that forward passes use until `weight` changes; None makes the next one ask for it."""
        # Every adapter, every step: nn.Module's own way of setting an attribute takes longer than all the rest.
        self.__dict__.update(effective=factor, effective_version=self._stamp())

    def _stamp(self) -> tuple[int, int]:
        return self.weight._version, self.source.updates

    def current(self) -> Tensor:
        """Return the coordinated factor, made anew if the parameter has changed since.

        Raises:
            RuntimeError: Inside a part of a training forward that runs without gradients, as under reentrant
                gradient checkpointing or for a target without gradient: the factors belong to the graph outside of it.
        """
        lifted = self.effective
        if lifted is not None and torch.compiler.is_compiling():
            return lifted  # the hook on the base model, which is never compiled, has just made it
        stale = lifted is None or self.effective_version != self._stamp()
        if lifted is not None and not stale and lifted.requires_grad and not torch.is_grad_enabled():
            if self.source.in_forward and self.training:
                raise RuntimeError(
                    "an adapted layer ran without gradients inside a training forward. Under reentrant gradient "
                    "checkpointing, coordinated factors cannot be differentiated: use "
                    "gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False}). If the "
                    "model's forward uses torch.no_grad() itself, for a target without gradient, run that part with "
                    "gradients and detach() its result"
                )
            stale = True
        if stale:
            self.source.run()
        assert self.effective is not None
        return self.effective

    def forward(self, x: Tensor) -> Tensor:
        """Apply the factor to `x` of shape (..., in) and return (..., out)."""
        y = F.linear(x, self.current().to(x.dtype), self.bias)
        self.source.observe(self, y)
        return y

    def train(self, mode: bool = True) -> Factor:
        """Switch mode; factors of the other mode are dropped."""
        if mode != self.training:
            self.set(None)
        return super().train(mode)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if f"{prefix}weight" in state_dict:
            self.set(None)
            self.source.loaded()
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[misc]

    def _replicate_for_data_parallel(self) -> Any:
        """Refuse the copies of ``torch.nn.DataParallel``, which no graph pass would reach."""
        raise RuntimeError(
            "torch.nn.DataParallel copies layers, and the copies get no coordinated factors. Start one process per GPU "
            "instead, with accelerate launch or torchrun and DistributedDataParallel, or show this process one GPU "
            "(CUDA_VISIBLE_DEVICES=0)"
        )

    def _apply(self, fn: Any, recurse: bool = True) -> Factor:
        self.effective = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "effective": None}  # part of an autograd graph, which cannot be pickled


@contextmanager
def coordinated(module: nn.Module) -> Iterator[None]:
    """Make the coordinated factors inside a module its parameters for a while, for code that reads ``lora_A.weight``.

    What PEFT merges, combines and saves is therefore what the layers compute.

    Args:
        module: An adapted layer, or a model with adapted layers inside.
    """
    raw: dict[Factor, Any] = {m: m.weight for m in module.modules() if isinstance(m, Factor) and not m.folded}
    plain: dict[Factor, Tensor] = {}
    for source in dict.fromkeys(factor.source for factor in raw):
        plain |= source.plain()

    def become(factor: Factor, weight: nn.Parameter, folded: bool) -> None:
        factor.weight = weight
        factor.__dict__["folded"] = folded
        factor.set(weight if folded else None)

    try:
        for factor, weight in raw.items():
            become(factor, nn.Parameter(plain[factor].to(weight), requires_grad=False), True)
        yield
    finally:
        for factor, weight in raw.items():
            become(factor, weight, False)
