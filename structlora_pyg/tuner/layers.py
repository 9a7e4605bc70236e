"""PEFT LoRA layers that run on coordinated factors.

Every PEFT layer (quantised, DoRA, mixed batches) runs on `structlora_pyg.tuner.factor.Factor`, and therefore
coordinated, without knowing it. `FusedLinear` is the fast layer for unquantised weights, `Attention` the
one for ``torch.nn.MultiheadAttention``; both are registered through PEFT's door for custom layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import torch_geometric.nn as pyg_nn
from peft import LoraConfig
from peft.tuners import lora
from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

from structlora_pyg.tuner.factor import Factor, FactorSource, LinearFactor, factors_in, merge_coordinated, transformed


class AdaptedLinear(torch.autograd.Function):
    """``y = x W^T + b + s (n * x A^T) B^T`` with frozen W and b, for x (T, d_in) of T tokens; all of one type.

    The noise n is that of the information bottleneck, see `structlora_pyg.nn.filter`; x is dropped out before A where a
    `mask` (T, d_in) says what is kept, of which one byte per element stays in memory. The same arithmetic as
    autograd's, in fewer passes over memory: the update is added into y, and its part of the gradient of x into the
    other part. With r of about 8 the products are as slow as their layout is bad, so that everything narrow lies in
    memory as (r, ...): the codes A x^T, the transpose of B, and their gradients.
    """

    @staticmethod
    def forward(
        x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, s: float, noise: Tensor | None = None,
        mask: Tensor | None = None, keep: float = 1.0,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Return y (T, d_out) and the rank codes A x^T (r, T) before the noise (r, T); `keep`: share that is kept."""
        codes = _codes(x, A, mask, keep)
        heard = codes if noise is None else codes * noise
        return F.linear(x, W, b).addmm_(heard.mT, B.mT.contiguous(), alpha=s), codes

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """Keep x, which the layer before it keeps anyway, the weights, and the codes or, if there is one, the noise."""
        x, W, _, A, B, ctx.s, noise, mask, ctx.keep = inputs
        ctx.save_for_backward(x, W, A, B, output[1] if noise is None else None, noise, mask)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, A, B and the noise."""
        x, W, A, B, codes, noise, mask = ctx.saved_tensors
        dy, d_codes = gradients
        if dy is None:  # only the codes were used
            dy = x.new_zeros(x.size(0), W.size(0))
        pulled = ctx.s * (B.mT.contiguous() @ dy.mT)
        codes = _codes(x, A, mask, ctx.keep) if codes is None else codes
        d_noise = pulled * codes if ctx.needs_input_grad[6] else None
        if noise is not None:
            pulled, codes = pulled * noise, codes * noise
        d_codes = pulled if d_codes is None else d_codes + pulled
        dx = None
        if ctx.needs_input_grad[0] and mask is None:
            dx = (dy @ W).addmm_(d_codes.mT, A)
        elif ctx.needs_input_grad[0]:
            dx = (dy @ W).add_((d_codes.mT @ (A / ctx.keep)).mul_(mask))
        dA = None
        if ctx.needs_input_grad[3]:
            dA = d_codes @ x if mask is None else (d_codes / ctx.keep) @ torch.where(mask, x, 0.0)
        dB = (ctx.s * (codes @ dy)).mT if ctx.needs_input_grad[4] else None
        return dx, None, None, dA, dB, None, d_noise, None, None


def _codes(x: Tensor, A: Tensor, mask: Tensor | None, keep: float) -> Tensor:
    return A @ x.mT if mask is None else (A / keep) @ torch.where(mask, x, 0.0).mT


class FusedLinear(lora.Linear):
    """PEFT's LoRA linear layer as one `AdaptedLinear`, on coordinated factors.

    Serves ``torch.nn.Linear``, GPT-2's ``Conv1D`` and ``torch_geometric.nn.Linear``. With dropout, several adapters at
    once, trained or hooked base weights, base and adapter are computed one after the other; cases that need more (DoRA,
    ``lora_bias``, merged weights, mixed batches) take PEFT's own forward, on the same factors.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> None:
        renamed = isinstance(base_layer, pyg_nn.Linear)
        if renamed:  # PEFT reads the names torch.nn.Linear uses
            base_layer.in_features, base_layer.out_features = base_layer.in_channels, base_layer.out_channels
        config.fan_in_fan_out = isinstance(base_layer, Conv1D)  # as PEFT does; DoRA's norms follow it
        super().__init__(base_layer, adapter_name, config=config, **kwargs)
        if renamed:
            del base_layer.in_features, base_layer.out_features

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Apply the layer to `x` of shape (..., d_in) and return (..., d_out) in the base layer's dtype."""
        names: list[str] = [name for name in self.active_adapters if name in self.lora_A]
        pairs: list[tuple[Any, Any]] = [(self.lora_A[name], self.lora_B[name]) for name in names]
        foreign = any(type(m) not in (LinearFactor, nn.Linear) for pair in pairs for m in pair)
        special = foreign or self.disable_adapters or self.merged or args or kwargs or not torch.is_floating_point(x)
        special = special or x.layout is not torch.strided  # sparse features, as of graphs, cannot be reshaped
        if special or any(name in self.lora_variant or self.lora_bias[name] for name in names):
            with reading(self):
                return super().forward(x, *args, **kwargs)
        # Two-dimensional on purpose: adding in place to a view would copy the whole gradient in the backward pass.
        x_flat = x.reshape(-1, x.shape[-1])
        y = None if len(names) != 1 else self._at_once(x_flat, x.shape, names[0])
        if y is None:
            # What hooks see has the caller's shape, and they may keep it; wrapped tensors know no in-place sums.
            watched = _watched(self.base_layer) or transformed()
            y = self.base_layer(x if watched else x_flat)
            y = y.reshape(-1, y.shape[-1])
            add = torch.Tensor.addmm if watched else torch.Tensor.addmm_
            for name, (down, up) in zip(names, pairs, strict=True):
                h = self.lora_dropout[name](x_flat)
                t = F.linear(h, _current(down).to(h.dtype))
                if isinstance(down, Factor):
                    down.source.observe(down, t.view(*x.shape[:-1], t.shape[-1]))
                    noise = down.noise(len(t))
                    t = t if noise is None else t * noise.mT.to(t.dtype)
                y = add(y, t.to(y.dtype), _current(up).t().to(y.dtype), alpha=self.scaling[name])
        return y.view(*x.shape[:-1], y.shape[-1])

    def _at_once(self, x: Tensor, shape: torch.Size, name: str) -> Tensor | None:
        """Return the layer's output for `x` (T, d_in), None where something has to happen between base and adapter."""
        base: Any = self.base_layer
        dropout: Any = self.lora_dropout[name]
        if type(base) not in OWN_LAYERS or base.weight.requires_grad or type(base.weight) is not nn.Parameter:
            return None  # trained, sharded or quantised weights
        if base.bias is not None and base.bias.requires_grad:
            return None
        if _watched(base) or transformed():
            return None  # weights that are offloaded or gathered by a hook, activations that somebody watches
        drops = dropout.training and not isinstance(dropout, nn.Identity)
        if drops and (type(dropout) is not nn.Dropout or _watched(dropout)):
            return None
        dtype, kind = base.weight.dtype, x.device.type
        if torch.is_autocast_enabled(kind) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(kind)
        elif x.dtype != dtype:
            return None
        down, up = self.lora_A[name], self.lora_B[name]
        W, A, B = base.weight.to(dtype), _current(down).to(dtype), _current(up).to(dtype)
        W = W.mT if self.fan_in_fan_out else W
        bias = None if base.bias is None else base.bias.to(dtype)
        noise = down.noise(len(x)) if isinstance(down, Factor) else None
        noise = None if noise is None else noise.to(dtype)
        keep = 1.0 - dropout.p if drops else 1.0
        mask = kept(x.shape, keep, x.device) if keep < 1.0 else None
        y, codes = AdaptedLinear.apply(x.to(dtype), W, bias, A, B, self.scaling[name], noise, mask, keep)
        if isinstance(down, Factor):
            down.source.observe(down, codes.mT.view(*shape[:-1], codes.shape[0]))
        return y


@contextmanager
def reading(module: nn.Module) -> Iterator[None]:
    """Let PEFT's own code in a layer read coordinated factors for a while, with their gradients."""
    sources = {factor.source for _, factor in factors_in(module)}
    for source in sources:
        source.reading += 1
    try:
        yield
    finally:
        for source in sources:
            source.reading -= 1


def serve(layer: nn.Module, source: FactorSource) -> list[RemovableHandle]:
    """Let one of PEFT's own layers read coordinated factors in its forwards, and in ``get_delta_weight``."""
    merge_coordinated(type(layer))
    begin, end = (partial(_count, source, by) for by in (1, -1))  # which are copied with the model, as closures are not
    return [layer.register_forward_pre_hook(begin), layer.register_forward_hook(end, always_call=True)]


def _count(source: FactorSource, by: int, *_: Any) -> None:
    source.reading += by


def kept(shape: torch.Size, share: float, device: torch.device) -> Tensor:
    """Return a random mask that is True for `share` of its elements, to 2^-16; one random number draws four of them.

    Drawing is what dropout costs on a processor: about as much as the layer itself, by one number per element.
    """
    numbers = torch.empty((shape.numel() + 3) // 4, dtype=torch.long, device=device).random_(-(2**63), None)
    return (numbers.view(torch.int16)[: shape.numel()] < round(share * 2**16) - 2**15).view(shape)


def _watched(layer: nn.Module) -> bool:
    """Return whether a layer has hooks."""
    hooks = (layer._forward_pre_hooks, layer._forward_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return any(hooks)


def _current(factor: Any) -> Tensor:
    """Return what a layer runs with: the coordinated factor, or the weight of a loaded adapter."""
    return factor.current() if isinstance(factor, Factor) else factor.weight


class _BareAttention(nn.MultiheadAttention):
    """What ``isinstance(layer, nn.MultiheadAttention)`` finds, without weights of its own."""

    def __init__(self) -> None:
        nn.Module.__init__(self)


class Attention(MultiheadAttention, _BareAttention):  # type: ignore[misc, override]  # PEFT gives properties
    """PEFT's LoRA on ``torch.nn.MultiheadAttention``: an adapter on the joint q, k and v, one on the output projection.

    Attention reads its weights without calling a layer. PEFT adds the factors to them before every forward and takes
    them away after it, which leaves rounding errors in the base; here the forward runs on W + s B A beside the base.
    Two differences to PEFT's layer are meant: the update of the output projection counts once (PEFT 0.21 merges it
    twice, https://github.com/huggingface/peft/pull/3774), and this is a ``torch.nn.MultiheadAttention``, which
    `torch_geometric.nn.GPSConv` asks for: given PEFT's, it skips its attention without a word.
    """

    def forward(self, query: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:  # type: ignore[override]
        """Apply the attention; arguments and results are those of ``torch.nn.MultiheadAttention``."""
        if self.disable_adapters or self.merged or "adapter_names" in kwargs:
            return super().forward(query, *args, **kwargs)  # type: ignore[return-value]
        base: Any = self.get_base_layer()
        weights = {
            "in_proj_weight": self._updated(self, base.in_proj_weight),
            "out_proj.base_layer.weight": self._updated(base.out_proj, base.out_proj.weight),
        }
        return functional_call(base, weights, (query, *args), kwargs)

    def _updated(self, layer: Any, weight: Tensor) -> Tensor:
        for name in (n for n in self.active_adapters if n in layer.lora_A):
            down, up = layer.lora_A[name], layer.lora_B[name]
            a = _current(down)
            # The factor is called, so that a hook on it can see the gradient of the whole update.
            weight = weight + layer.scaling[name] * up(a.mT).mT.to(weight.dtype)
        return weight

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the updates to the weights in place, each once; PEFT 0.21 adds that of the output projection twice."""
        base: Any = self.get_base_layer()
        names = [n for n in check_adapters_to_merge(self, adapter_names) or [] if n in self.lora_A]
        for name in names:
            weight = base.in_proj_weight.data + self.get_delta_weight(name).to(base.in_proj_weight.dtype)
            if safe_merge and not torch.isfinite(weight).all():
                raise ValueError(f"merging {name!r} would write non-finite weights; the base or the adapter is damaged")
            base.in_proj_weight.data = weight
            self.merged_adapters.append(name)
        if names:
            base.out_proj.merge(safe_merge, names)

    def unmerge(self) -> None:
        """Take the updates out of the weights again."""
        base: Any = self.get_base_layer()
        while self.merged_adapters:
            base.in_proj_weight.data -= self.get_delta_weight(self.merged_adapters.pop()).to(base.in_proj_weight.dtype)
        base.out_proj.unmerge()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.MultiheadAttention:
        """Return the attention as it was built; see PEFT."""
        if merge:
            self.merge(safe_merge, adapter_names)
        base: Any = self.get_base_layer()
        base.out_proj = base.out_proj.get_base_layer()
        return base

    def _restore_weights(self) -> None:
        """Do nothing: PEFT puts parameters back here that its merging takes away; ours stay parameters."""


def compute_dtype(layer: Any, own: torch.dtype) -> torch.dtype:
    """Return the type of the base weight for our fused layer, of the adapter's `own` weights for PEFT's layers."""
    base = getattr(layer.get_base_layer(), "weight", None)
    fused = type(layer) is FusedLinear and not layer.lora_variant and isinstance(base, Tensor)
    fused = fused and base.is_floating_point()  # type: ignore[union-attr]
    return base.dtype if fused else own  # type: ignore[union-attr]


def draws_once(layer: Any, adapter: str) -> bool:
    """Whether a layer reads a lora_A more than once a forward, or not token by token: its noise is one draw for all."""
    return adapter in layer.lora_variant or isinstance(layer, (Attention, lora.Embedding, ParamWrapper))


def base_weight(layer: Any) -> Tensor:
    """Return the weight of a layer, adapted or not: the joint q, k and v projection (3 d, d) of an attention."""
    if isinstance(layer, lora.ParamWrapper):
        return layer.get_param()
    base: Any = layer.get_base_layer() if isinstance(layer, lora.LoraLayer) else layer
    return base.in_proj_weight if isinstance(base, nn.MultiheadAttention) else base.weight


OWN_LAYERS: dict[type[nn.Module], Any] = {
    nn.Linear: FusedLinear,
    Conv1D: FusedLinear,
    pyg_nn.Linear: FusedLinear,
    nn.MultiheadAttention: Attention,
}


def own_layer(target: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> nn.Module | None:
    """Return our adapted layer for a module, None for those that stay PEFT's: quantised linears, parameters, others."""
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    kinds = (kind for kind in OWN_LAYERS if type(base) is kind or (kind is not nn.Linear and isinstance(base, kind)))
    own = OWN_LAYERS.get(next(kinds, type(base)))
    if own is None or kwargs.get("parameter_name") is not None:
        return None
    return own(target, adapter_name, config=config, **kwargs)


for kind in (lora.Linear, MultiheadAttention):
    merge_coordinated(kind)

CUSTOM_LAYERS: Any = {nn.Module: own_layer}  # for PEFT's door for custom layers
