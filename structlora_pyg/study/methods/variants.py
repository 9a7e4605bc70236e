"""LoRA whose forward differs from plain LoRA while it trains, through PEFT's own door for variants.

A variant replaces the forward of every LoRA layer of one adapter, for all of PEFT's layers (quantised ones too) and
for `FusedLinear`. Parameters and their names stay those of LoRA, so what PEFT saves is a plain LoRA folder.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel, PeftType
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor, nn

from structlora_pyg.data.adapters import AdapterSet


class TrainingVariant(LoraVariant):
    """Base of LoRA variants that draw something random, once a training forward of the whole model.

    Subclasses implement `draw` and `update`; `update_weight` as well if the merged update is not s B A.

    Args:
        model: A `peft.PeftModel` with LoRA adapters on linear layers. It is changed in place.
        adapter_name: Which adapter.
        seed: Seed of the draws, >= 0. They have a generator of their own, `generator`, whose state is what a
            checkpoint has to keep.

    Raises:
        ValueError: If the adapter is not plain LoRA on linear layers, or is merged.
    """

    def __init__(self, model: PeftModel, adapter_name: str = "default", seed: int = 0) -> None:
        self.adapter_name = adapter_name
        self.layers = lora_layers(model, adapter_name, type(self).__name__)
        self.generator = torch.Generator().manual_seed(seed)
        self.draws = 0  # training forwards seen
        self._in_forward = False
        self._waiting = 0  # training forwards whose backward has not begun
        self._watched = 0  # the training forward that last got a hook on its backward
        for layer in self.layers.values():
            layer.lora_variant[adapter_name] = self
        # On the innermost module: generate() and a missing task type bypass every level above it.
        base = model.get_base_model()
        self._handles = [
            base.register_forward_pre_hook(self._before_forward),
            base.register_forward_hook(self._after_forward, always_call=True),
        ]

    def draw(self) -> None:
        """Draw anew, from `generator`."""
        raise NotImplementedError

    def update(self, layer: Any, x: Tensor) -> Tensor:
        """Return what a layer adds to the base layer's output for `x` (..., d_in), after `lora_dropout`."""
        raise NotImplementedError

    def update_weight(self, layer: Any) -> Tensor:
        """Return the update that merging adds to a layer's weight, in the weight's layout."""
        return layer.get_delta_weight(self.adapter_name)

    def remove(self) -> None:
        """Turn the adapter into plain LoRA again; the factors stay as they are."""
        for layer in self.layers.values():
            layer.lora_variant.pop(self.adapter_name, None)
        for handle in self._handles:
            handle.remove()

    def _before_forward(self, module: nn.Module, args: tuple) -> None:
        self._in_forward = True
        if module.training:
            self.draw()
            self.draws += 1
            self._waiting += torch.is_grad_enabled()

    def _after_forward(self, module: nn.Module, args: tuple, output: Any) -> None:
        self._in_forward = False

    def _backward_begins(self, _: Tensor) -> None:
        self._waiting = 0

    def _check_draw(self) -> None:
        """Refuse a forward without a draw, and a recomputation of a forward that had another draw."""
        if self.draws == 0:
            raise RuntimeError("an adapted layer ran in training mode outside of the model's forward; call the model")
        if not self._in_forward and self._waiting > 1:
            raise RuntimeError(
                f"gradient checkpointing recomputes a layer after {self._waiting} training forwards, but only the "
                "draw of the last one is known. Call backward after every forward"
            )

    # -- what PEFT calls ------------------------------------------------------------------------------------------

    def forward(self, module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:  # type: ignore[override]
        """Return the base layer's `result` with the update added."""
        if module.training:
            self._check_draw()
        update = self.update(module, module.lora_dropout[active_adapter](x))
        if self._in_forward and self._watched != self.draws and update.requires_grad:
            self._watched = self.draws
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


def lora_layers(model: PeftModel, adapter_name: str, method: str) -> dict[str, Any]:
    """Return the layers of a plain LoRA adapter by path.

    Raises:
        ValueError: If there is none, one is not linear, has a variant (DoRA) or a trained bias, or is merged.
    """
    if not isinstance(model, PeftModel):
        raise ValueError(f"{method} needs a peft.PeftModel, got {type(model).__name__}; use peft.get_peft_model first")
    if adapter_name not in model.peft_config:
        raise ValueError(f"there is no adapter {adapter_name!r}; adapters: {', '.join(model.peft_config)}")
    kind: Any = model.peft_config[adapter_name].peft_type
    if kind is not PeftType.LORA:
        raise ValueError(f"{method} needs a LoRA adapter; {adapter_name!r} is {kind.value}")
    layers = AdapterSet(model.get_base_model(), adapter_name).layers
    for path, module in model.get_base_model().named_modules():
        if isinstance(module, LoraLayer) and adapter_name in module.r and path not in layers:
            raise ValueError(
                f"{method} works on linear layers; {path} is a {type(module.get_base_layer()).__name__}. Leave it out "
                "of target_modules"
            )
    for path, layer in layers.items():
        if adapter_name in layer.lora_variant:
            other = type(layer.lora_variant[adapter_name]).__name__
            raise ValueError(f"{method} works on plain LoRA; {path} has the variant {other} already")
        if layer.lora_bias[adapter_name]:
            raise ValueError(f"{method} is not defined for lora_bias=True, which {path} has; set lora_bias=False")
        if layer.merged:
            raise ValueError("the adapter is merged; call unmerge_adapter() first")
    return layers
