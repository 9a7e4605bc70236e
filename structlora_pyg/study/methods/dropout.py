"""LoRA-Dropout (arXiv 2404.09610), and the part it shares with DyLoRA: a forward that draws while training.

PEFT's own door for variants replaces the forward of every LoRA layer of one adapter, for all of PEFT's layers
(quantised ones too) and for `FusedLinear`. Parameters and their names stay those of LoRA, so what PEFT saves is a
plain LoRA folder. Both variants work on any `peft.PeftModel`, in any training loop.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel, PeftType
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor, nn
from transformers.utils import ModelOutput

from structlora_pyg.data.adapters import AdapterSet
from structlora_pyg.study.methods.base import Adapted, Run, register
from structlora_pyg.study.methods.lora import PlainLora


class TrainingVariant(LoraVariant):
    """Base of LoRA variants that draw something random, once per training forward of the whole model.

    Subclasses implement `draw` and `update`; `update_weight` as well if the merged update is not s B A.

    Args:
        model: A `peft.PeftModel` with LoRA adapters on linear layers. It is changed in place.
        seed: Seed of the draws, >= 0. They have a generator of their own, `generator`, whose state is what a
            checkpoint has to keep.
        adapter_name: Which adapter.

    Raises:
        ValueError: If the adapter is not plain LoRA on linear layers, or is merged.
    """

    def __init__(self, model: PeftModel, seed: int = 0, adapter_name: str = "default") -> None:
        self.model, self.adapter_name = model, adapter_name
        self.layers = plain_lora_layers(model, adapter_name, type(self).__name__)
        self.generator = torch.Generator().manual_seed(seed)
        self.draws = 0  # training forwards seen
        self._in_forward = False
        self._pending = 0  # training forwards whose backward has not begun
        self._hooked = 0  # the training forward that last got a hook on its backward
        for layer in self.layers.values():
            layer.lora_variant[adapter_name] = self
        # On the innermost module: generate() and a missing task type bypass every level above it.
        base = model.get_base_model()
        base.register_forward_pre_hook(self._before_forward)
        base.register_forward_hook(self._after_forward, always_call=True)

    def draw(self) -> None:
        """Draw anew, from `generator`."""
        raise NotImplementedError

    def update(self, layer: Any, x: Tensor) -> Tensor:
        """Return what a layer adds to the base layer's output for `x` (..., d_in), after `lora_dropout`."""
        raise NotImplementedError

    def update_weight(self, layer: Any) -> Tensor:
        """Return the update that merging adds to a layer's weight, in the weight's layout."""
        return layer.get_delta_weight(self.adapter_name)

    def _before_forward(self, module: nn.Module, args: tuple) -> None:
        self._in_forward = True
        if module.training:
            self.draw()
            self.draws += 1
            self._pending += torch.is_grad_enabled()

    def _after_forward(self, module: nn.Module, args: tuple, output: Any) -> None:
        self._in_forward = False

    def _backward_begins(self, _: Tensor) -> None:
        self._pending = 0

    def forward(self, module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:  # type: ignore[override]
        """Return the base layer's `result` with the update added; PEFT calls this."""
        if module.training and self.draws == 0:
            raise RuntimeError("an adapted layer ran in training mode outside of the model's forward; call the model")
        if module.training and not self._in_forward and self._pending > 1:
            raise RuntimeError(
                f"gradient checkpointing recomputes a layer after {self._pending} training forwards, but only the "
                "draw of the last one is known. Call backward after every forward"
            )
        update = self.update(module, module.lora_dropout[active_adapter](x))
        if self._in_forward and self._hooked != self.draws and update.requires_grad:
            self._hooked = self.draws
            update.register_hook(self._backward_begins)
        return result + update

    def merge_safe(self, module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:  # type: ignore[override]
        """Return the weight with the update added."""
        return orig_weight + self.update_weight(module).to(orig_weight.dtype)

    def merge_unsafe(self, module: Any, active_adapter: str, orig_weight: Tensor) -> None:  # type: ignore[override]
        """Add the update to the weight in place."""
        orig_weight.data += self.update_weight(module).to(orig_weight.dtype)

    def unmerge(self, module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:  # type: ignore[override]
        """Return the weight with the update taken off."""
        return orig_weight - self.update_weight(module).to(orig_weight.dtype)


class LoraDropout(TrainingVariant):
    r"""Sparse updates :math:`\hat B \hat A` with :math:`\hat A = A\,diag(m_A)` and :math:`\hat B = diag(m_B)\,B`.

    In training, every forward of the model draws one mask :math:`m_A` (d_in,) and one :math:`m_B` (d_out,) per layer,
    0 with probability p and else 1 / (1 - p), shared by all tokens. The rank is never masked. (The paper does not
    rescale; its form is this one with ``lora_alpha`` multiplied by (1 - p)^2.) An ordinary loop works as it is, with
    one mask set per step; the paper's loss is a mean over several, at as many times the cost::

        dropout = LoraDropout(model, p=0.2, samples=4)
        loss = dropout.backward(lambda: model(**batch).loss)
        ...
        model.eval()
        logits = dropout.ensemble(lambda: model(**batch).logits)

    Out of training and of `ensemble` there are no masks: the forward, the merged weights and the saved folder are the
    expectation of the masked update.

    Args:
        model: A `peft.PeftModel` with plain LoRA adapters, or a `StructLoraModel`. It is changed in place.
        p: Probability that an input or output feature drops out, in (0, 1). The paper gives no value.
        samples: Mask sets N that `backward` and `ensemble` average over, >= 1. The paper gives no value.
        seed: Seed of the masks, >= 0.
        adapter_name: Which adapter.

    Raises:
        ValueError: Values out of range, or an adapter that is not plain LoRA.
    """

    def __init__(
        self, model: PeftModel, p: float = 0.2, samples: int = 4, seed: int = 0, adapter_name: str = "default"
    ) -> None:
        if not 0 < p < 1:
            raise ValueError(f"p must be in (0, 1), got {p!r}; without dropout use plain LoRA")
        if samples < 1:
            raise ValueError(f"samples must be >= 1, got {samples!r}; 4 is the default")
        super().__init__(model, seed, adapter_name)
        self.p, self.samples, self.seed = p, samples, seed
        self._ensembling = False
        self._masks: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def backward(self, closure: Callable[[], Tensor], backward: Callable[[Tensor], Any] = Tensor.backward) -> Tensor:
        """Run the mean of `closure` over the mask sets, and its backward pass, one at a time; return the mean.

        Args:
            closure: Runs the model in training mode and returns a scalar loss.
            backward: What runs the backward pass, for instance ``accelerator.backward``.

        Raises:
            RuntimeError: If the closure ran no training forward, so that nothing was masked.
        """
        total, before = [], self.draws
        for done in range(1, self.samples + 1):
            part = closure() / self.samples
            if self.draws < before + done:
                raise RuntimeError(
                    "the closure drew no masks: it has to run the model in training mode; call model.train(), and "
                    "compute the loss inside of the closure"
                )
            backward(part)
            total.append(part.detach())
        return torch.stack(total).sum()

    @torch.no_grad()
    def ensemble(self, closure: Callable[[], Tensor]) -> Tensor:
        """Return the mean of `closure` over the mask sets, in eval mode with masks on.

        Every call uses the same `samples` mask sets, which follow from the seed alone.

        Args:
            closure: Runs the model and returns a tensor to average, usually logits.

        Raises:
            RuntimeError: If the model is in training mode.
        """
        if self.model.get_base_model().training:
            raise RuntimeError("the ensemble is for evaluation; call model.eval() first")
        training_masks, generator = self._masks, torch.Generator().manual_seed(self.seed + 1)
        outputs = []
        self._ensembling = True
        try:
            for _ in range(self.samples):
                self._masks = self._draw_masks(generator)
                outputs.append(closure())
        finally:
            self._ensembling, self._masks = False, training_masks
        return torch.stack(outputs).mean(0)

    def draw(self) -> None:
        """Draw one mask set."""
        self._masks = self._draw_masks(self.generator)

    def update(self, layer: Any, x: Tensor) -> Tensor:
        """Return the (masked) update of a layer for `x` (..., d_in)."""
        down, up = layer.lora_A[self.adapter_name], layer.lora_B[self.adapter_name]
        scaling = layer.scaling[self.adapter_name]
        if not (layer.training or self._ensembling):
            return up(down(x)) * scaling
        keep_in, keep_out = self._masks[layer]
        y = up(down(x * keep_in.to(x)))
        return y * (scaling * keep_out).to(y)

    def _draw_masks(self, generator: torch.Generator) -> dict[nn.Module, tuple[Tensor, Tensor]]:
        """Return the masks (d_in,), (d_out,) of every layer: 0, or 1 / (1 - p)."""
        sizes = [size for layer in self.layers.values() for size in (layer.in_features, layer.out_features)]
        keep = torch.rand(sum(sizes), generator=generator) >= self.p
        first = next(iter(self.layers.values()))
        masks = (keep.float() / (1 - self.p)).to(first.lora_A[self.adapter_name].weight.device)  # one transfer
        pieces = iter(masks.split(sizes))
        return {layer: (next(pieces), next(pieces)) for layer in self.layers.values()}


def plain_lora_layers(model: PeftModel, adapter_name: str, method: str) -> dict[str, Any]:
    """Return the layers of a plain LoRA adapter by path.

    Raises:
        ValueError: If there is none, one is not linear, has a variant (DoRA) or a trained bias, or is merged.
    """
    config = model.peft_config.get(adapter_name)
    if config is None or config.peft_type is not PeftType.LORA:
        known = {name: c.peft_type.value for name, c in model.peft_config.items()}  # type: ignore[union-attr]
        raise ValueError(f"{method} needs a LoRA adapter {adapter_name!r}; adapters: {known}")
    layers = AdapterSet(model.get_base_model(), adapter_name).layers
    for path, layer in layers.items():
        if adapter_name in layer.lora_variant:
            other = type(layer.lora_variant[adapter_name]).__name__
            raise ValueError(f"{method} works on plain LoRA; {path} has the variant {other} already")
        if layer.lora_bias[adapter_name]:
            raise ValueError(f"{method} is not defined for lora_bias=True, which {path} has; set lora_bias=False")
        if layer.merged:
            raise ValueError("the adapter is merged; call unmerge_adapter() first")
    return layers


class RandomLora(PlainLora):
    """LoRA with a `TrainingVariant`, the state of whose generator belongs into a checkpoint."""

    variant: TrainingVariant

    def extra_state(self) -> dict[str, Any]:
        """Return the state of the generator."""
        return {"generator": self.variant.generator.get_state(), "draws": self.variant.draws}

    def load_extra_state(self, state: dict[str, Tensor]) -> None:
        """Restore the generator."""
        self.variant.generator.set_state(state["generator"])
        self.variant.draws = int(state["draws"])


@register("lora_dropout")
class LoraDropoutMethod(RandomLora):
    """Masks on columns of A and rows of B, averaged over several per step (arXiv 2404.09610)."""

    own_options = ("dropout", "samples", "ensemble")
    variant: LoraDropout

    def build(self, base: nn.Module, calibrate: Run, train_step: Run) -> Adapted:
        """Return the base with LoRA adapters under masks."""
        adapted = super().build(base, calibrate, train_step)
        self.variant = LoraDropout(adapted.model, self.options.dropout, self.options.samples, self.adapter.seed)
        return adapted

    def backward(self, closure: Callable[[], Tensor], backward: Callable[[Tensor], Any]) -> Tensor:
        """Run one forward and backward per mask set, on the mean loss."""
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
