"""What holds ``lora_A`` and ``lora_B`` in PEFT's layers, running on the factor that the graph pass made from it.

Same parameter, same state-dict key: any PEFT layer (quantised, DoRA, mixed batches, convolutions, embeddings, experts)
runs coordinated without knowing it. `coordinated` turns it about for code that reads parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import wraps
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from peft.tuners.lora.variants import BlockDiagonalLinear
from torch import Tensor, nn
from torch.autograd import forward_ad


class FactorSource(Protocol):
    """Where a `Factor` has its coordinated factor from; `structlora_pyg.tuner.hooks.PassHooks` is one.

    Attributes:
        in_forward: Whether the base model is in its forward.
        reading: Above 0 while PEFT's own code runs an adapted layer.
    """

    in_forward: bool
    reading: int

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


def transformed() -> bool:
    """Tell whether tensors are wrapped right now: by `torch.func`, forward-mode differentiation, or tracing."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0 or torch.jit.is_tracing()


class Factor(nn.Module):
    """What holds a ``lora_A`` or ``lora_B``, made by PEFT, once `coordinate` lets it run with the coordinated factor.

    To PEFT's own code, while it runs a layer, the coordinated factor is what it reads (`FactorSource.reading`), as in
    ``torch.nn.utils.parametrize``; to everybody else it is the parameter.
    """

    source: FactorSource
    key: str  # of the parameter
    position: int | None
    effective: Tensor | None  # a matrix
    level: Tensor | None = None  # (r, 1) of a lora_A in training: standard deviation of the noise on its outputs
    own = False  # whether the layer runs with the parameter itself
    folded = False  # whether `coordinated` has made the coordinated factor its parameter

    @property
    def raw(self) -> Any:
        """The parameter, or the view of it that FSDP 1 has put in its place."""
        found = vars(self).get(self.key, self._parameters.get(self.key))
        if found is None:
            raise AttributeError(self.key)
        return found

    @property
    def weight(self) -> Any:
        """The parameter, or the coordinated factor in its shape while PEFT's code runs."""
        return self.current().view_as(self.raw) if self.source.reading else self.raw

    @weight.setter
    def weight(self, value: Tensor) -> None:
        vars(self)[self.key] = value

    @weight.deleter
    def weight(self) -> None:
        del vars(self)[self.key]

    def set(self, factor: Tensor, level: Tensor | None = None) -> None:
        """Set the factor that forward passes use until `weight` changes."""
        # Every adapter, every step: nn.Module's own way of setting an attribute takes longer than all the rest.
        self.__dict__.update(effective=factor, level=level, own=False, effective_version=self._stamp())

    def rest(self, level: Tensor | None = None) -> None:
        """Let forward passes use the parameter itself, until another factor is set."""
        self.__dict__.update(effective=None, level=level, own=True)

    def drop(self) -> None:
        """Make the next forward pass ask for the factor, unless it uses the parameter itself."""
        self.__dict__["effective"] = None

    def noise(self, count: int) -> Tensor | None:
        """Return multiplicative noise (r, count) of mean 1 for the rank codes of `count` tokens; None for none."""
        level = self.level
        if level is None or not self.training:
            return None
        return torch.addcmul(level.new_ones(()), level, torch.randn(len(level), count, device=level.device).to(level))

    def heard(self, y: Tensor) -> Tensor:
        """Return outputs (..., r) with their noise; they are observed without it."""
        self.source.observe(self, y)
        noise = self.noise(y.numel() // y.size(-1))
        return y if noise is None else y * noise.mT.reshape(y.shape).to(y.dtype)

    def _stamp(self) -> tuple[int, int]:
        return self.raw._version, self.source.updates

    def current(self) -> Tensor:
        """Return the coordinated factor, made anew if the parameter has changed since.

        Raises:
            RuntimeError: Inside a part of a training forward that runs without gradients, as under reentrant
                gradient checkpointing or for a target without gradient: the factors belong to the graph outside of it.
        """
        if self.own:
            return self.raw.flatten(1)
        lifted = self.effective
        if lifted is not None and torch.compiler.is_compiling():
            return lifted  # the hook on the base model, which is never compiled, has just made it
        stale = lifted is None or self.effective_version != self._stamp()
        if lifted is not None and not stale and not lifted.is_leaf and not torch.is_grad_enabled():
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

    def train(self, mode: bool = True) -> Any:
        """Switch mode; factors of the other mode are dropped."""
        if mode != self.training:
            self.drop()
        return super().train(mode)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self._note_loading(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[misc]

    def _note_loading(self, state_dict: Mapping[str, Any], prefix: str) -> None:
        if f"{prefix}{self.key}" in state_dict:
            self.drop()
            self.source.loaded()

    def _replicate_for_data_parallel(self) -> Any:
        """Refuse the copies of ``torch.nn.DataParallel``, which no graph pass would reach."""
        raise RuntimeError(
            "torch.nn.DataParallel copies layers, and the copies get no coordinated factors. Start one process per GPU "
            "instead, with accelerate launch or torchrun and DistributedDataParallel, or show this process one GPU "
            "(CUDA_VISIBLE_DEVICES=0)"
        )

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.drop()
        super()._apply(fn, recurse)
        self.level = None if self.level is None else self.level.to(self.raw.device)
        return self

    def __getstate__(self) -> dict[str, Any]:
        # Parts of an autograd graph, which cannot be pickled.
        return {**self.__dict__, "effective": None, "level": None, "own": False}


class LinearFactor(Factor, nn.Linear):  # type: ignore[misc, override]  # weight is a property
    """``lora_A`` (r, d_in) or ``lora_B`` (d_out, r) of a linear layer."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply the factor to `x` of shape (..., in) and return (..., out)."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return self.heard(F.linear(x, self.current().to(x.dtype), bias))


class ConvFactor(Factor):
    """``lora_A`` (r, d_in, ...) or ``lora_B`` (d_out, r, 1, ...) of a convolution."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply the factor to `x` of shape (batch, in, ...) and return (batch, out, ...)."""
        conv: Any = self
        bias = None if conv.bias is None else conv.bias.to(x.dtype)
        y = conv._conv_forward(x, self.current().to(x.dtype).view_as(self.raw), bias)
        return self.heard(y.movedim(1, -1)).movedim(-1, 1)


class Conv1dFactor(ConvFactor, nn.Conv1d):  # type: ignore[misc, override]
    """See `ConvFactor`."""


class Conv2dFactor(ConvFactor, nn.Conv2d):  # type: ignore[misc, override]
    """See `ConvFactor`."""


class Conv3dFactor(ConvFactor, nn.Conv3d):  # type: ignore[misc, override]
    """See `ConvFactor`."""


class BlockDiagonalFactor(Factor, BlockDiagonalLinear):
    """``lora_A`` (r, d_in / blocks) or ``lora_B`` (d_out, r / blocks) of BD-LoRA, as PEFT's forward reads them."""


class EmbeddingFactor(Factor):
    """``lora_embedding_A`` (r, rows) or ``lora_embedding_B`` (d_out, r) of one adapter of an embedding."""

    def __init__(self, container: nn.ParameterDict) -> None:
        super().__init__()
        self.__dict__.update(_parameters=container._parameters, training=container.training)


class EmbeddingFactors(nn.ParameterDict):
    """What holds ``lora_embedding_A`` or ``lora_embedding_B`` of all adapters of an embedding, by their names."""

    factors: dict[str, EmbeddingFactor]  # those that are coordinated

    def __getitem__(self, key: str) -> Any:
        """Return an adapter's parameter, or its coordinated factor while PEFT's code runs."""
        return self.factors[key].weight if key in self.factors else super().__getitem__(key)

    def __delitem__(self, key: str) -> None:
        """Delete an adapter's parameter."""
        self.factors.pop(key, None)
        super().__delitem__(key)

    def train(self, mode: bool = True) -> EmbeddingFactors:
        """Switch mode; factors of the other mode are dropped."""
        for factor in self.factors.values():
            factor.train(mode)
        return super().train(mode)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for factor in self.factors.values():
            factor._note_loading(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn: Any, recurse: bool = True) -> EmbeddingFactors:
        for factor in self.factors.values():
            factor.drop()
        return super()._apply(fn, recurse)

    _replicate_for_data_parallel = Factor._replicate_for_data_parallel


FACTORS: dict[type[nn.Module], type[Factor]] = {
    nn.Linear: LinearFactor,
    nn.Conv1d: Conv1dFactor,
    nn.Conv2d: Conv2dFactor,
    nn.Conv3d: Conv3dFactor,
    BlockDiagonalLinear: BlockDiagonalFactor,
}


def coordinate(side: Any, source: FactorSource, adapter: str, position: int | None = None) -> None:
    """Make what holds a ``lora_A`` or ``lora_B`` a `Factor`, in place.

    Args:
        side: A module or a ``ParameterDict`` made by PEFT.
        source: What is asked for a fresh factor.
        adapter: PEFT's name of the adapter.
        position: Index of the layer, for a ``lora_A``, whose outputs the auxiliary loss may want.
    """
    factor, key = side, "weight"
    if type(side) is nn.ParameterDict:
        side.__class__, vars(side)["factors"] = EmbeddingFactors, {}
    if isinstance(side, EmbeddingFactors):
        factor, key = EmbeddingFactor(side), adapter
        side.factors[adapter] = factor
    else:
        side.__class__ = FACTORS.get(type(side), type(side))
    factor.__dict__.update(source=source, position=position, key=key, effective=None)


def factors_in(module: nn.Module) -> Iterator[tuple[str, Factor]]:
    """Yield the factors inside a module, by the names of their parameters."""
    for name, inner in module.named_modules():
        found = inner.factors.values() if isinstance(inner, EmbeddingFactors) else [inner]
        yield from ((f"{name}.{f.key}", f) for f in found if isinstance(f, Factor))


def merge_coordinated(layer: type[nn.Module]) -> None:
    """Let a kind of layer merge coordinated updates; with other adapters it does what it always did."""
    for kind in layer.__mro__:
        for name in {"get_delta_weight", "merge", "unmerge"} & vars(kind).keys():
            if not hasattr(stock := vars(kind)[name], "__wrapped__"):
                setattr(kind, name, _with_coordinated(stock))


def _with_coordinated(stock: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(stock)
    def with_coordinated(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        read = any(factor.source.reading for _, factor in factors_in(layer))
        with nullcontext() if read else coordinated(layer):  # a forward reads them already, with gradients
            return stock(layer, *args, **kwargs)

    return with_coordinated


@contextmanager
def coordinated(module: nn.Module) -> Iterator[None]:
    """Make the coordinated factors inside a module its parameters for a while, for code that reads ``lora_A.weight``.

    What PEFT merges, combines and saves is therefore what the layers compute.

    Args:
        module: An adapted layer, or a model with adapted layers inside.
    """
    raw: dict[Factor, Any] = {factor: factor.raw for _, factor in factors_in(module) if not factor.folded}
    plain: dict[Factor, Tensor] = {}
    for source in dict.fromkeys(factor.source for factor in raw):
        plain |= source.plain()

    def become(factor: Factor, weight: nn.Parameter, folded: bool) -> None:
        factor._parameters[factor.key] = weight
        factor.__dict__["folded"] = folded
        factor.drop() if factor.own or not folded else factor.set(weight)

    try:
        for factor, weight in raw.items():
            become(factor, nn.Parameter(plain[factor].to(weight), requires_grad=False), True)
        yield
    finally:
        for factor, weight in raw.items():
            become(factor, weight, False)
