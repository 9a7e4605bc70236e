"""LoRA-Dropout (arXiv 2404.09610): whole input columns of A and output rows of B drop out of the update."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from structlora_pyg.study.methods.variants import TrainingVariant
from structlora_pyg.tuner.model import StructLoraModel


class LoraDropout(TrainingVariant):
    r"""Sparse updates :math:`\hat B \hat A` with :math:`\hat A = A\,diag(m_A)` and :math:`\hat B = diag(m_B)\,B`.

    In training, every forward of the model draws one mask :math:`m_A` (d_in,) and one :math:`m_B` (d_out,) a layer,
    entries 0 with probability p, shared by all tokens. The rank is never masked. An ordinary loop works as it is, with
    one mask set a step; the paper's loss is a mean over several, at as many times the cost::

        dropout = LoraDropout(model, p=0.2, samples=4)
        loss = dropout.loss(lambda: model(**batch).loss)  # or dropout.backward(...), which needs less memory
        ...
        model.eval()
        logits = dropout.ensemble(lambda: model(**batch).logits)

    Out of training and of `ensemble` there are no masks: the forward, the merged weights and the saved folder are the
    expectation of the masked update.

    Args:
        model: A `peft.PeftModel` with plain LoRA adapters, or a `StructLoraModel`. It is changed in place.
        p: Probability that an input or output feature drops out, in (0, 1). The paper gives no value.
        samples: Mask sets N that `loss` and `ensemble` average over, >= 1. The paper gives no value.
        inverted: Divide what is kept by 1 - p, so that the masked update has the expectation s B A. False is the
            paper's form, whose expectation is (1 - p)^2 s B A; it is the same as the inverted form with `lora_alpha`
            multiplied by (1 - p)^2, and that is how it is done and saved.
        seed: Seed of the masks, >= 0.
        adapter_name: Which adapter.

    Raises:
        ValueError: Values out of range, an adapter that is not plain LoRA, or ``inverted=False`` on a
            `StructLoraModel`.
    """

    def __init__(
        self,
        model: PeftModel,
        p: float = 0.2,
        samples: int = 4,
        inverted: bool = True,
        seed: int = 0,
        adapter_name: str = "default",
    ) -> None:
        if not 0 < p < 1:
            raise ValueError(f"p must be in (0, 1), got {p!r}; without dropout use plain LoRA")
        if samples < 1:
            raise ValueError(f"samples must be >= 1, got {samples!r}; 4 is the default")
        if not inverted and isinstance(model, StructLoraModel):
            raise ValueError("inverted=False changes lora_alpha, which a StructLoraModel has fixed; use inverted=True")
        super().__init__(model, adapter_name, seed)
        self.p, self.samples, self.inverted, self.seed = p, samples, inverted, seed
        self._base = model.get_base_model()
        self._ensembling = False
        self._masks: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        if not inverted:
            _rescale(model, adapter_name, self.layers, (1 - p) ** 2)

    def loss(self, closure: Callable[[], Tensor]) -> Tensor:
        """Return the mean of `closure` over the mask sets, with the graphs of all of them.

        Args:
            closure: Runs the model in training mode and returns a scalar loss.

        Raises:
            RuntimeError: If the closure ran no training forward, so that nothing was masked.
        """
        return torch.stack([self._sample(closure) for _ in range(self.samples)]).mean()

    def backward(self, closure: Callable[[], Tensor], backward: Callable[[Tensor], Any] = Tensor.backward) -> Tensor:
        """Run `loss` and its backward pass one mask set at a time; return the detached loss.

        It takes the memory of one mask set, and is the form that works with gradient checkpointing.

        Args:
            closure: Runs the model in training mode and returns a scalar loss.
            backward: What runs the backward pass, for instance ``accelerator.backward``.

        Raises:
            RuntimeError: If the closure ran no training forward, so that nothing was masked.
        """
        total = []
        for _ in range(self.samples):
            part = self._sample(closure) / self.samples
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
            TypeError: If the closure does not return a tensor.
        """
        if self._base.training:
            raise RuntimeError("the ensemble is for evaluation; call model.eval() first")
        training_masks, generator = self._masks, torch.Generator().manual_seed(self.seed + 1)
        outputs = []
        self._ensembling = True
        try:
            for _ in range(self.samples):
                self._masks = self._draw_masks(generator)
                output = closure()
                if not isinstance(output, Tensor):
                    raise TypeError(f"closure has to return a tensor such as model(**batch).logits, got {type(output)}")
                outputs.append(output)
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

    def _sample(self, closure: Callable[[], Tensor]) -> Tensor:
        before = self.draws
        value = closure()
        if self.draws == before:
            raise RuntimeError(
                "the closure drew no masks: it has to run the model in training mode; call model.train(), and compute "
                "the loss inside of the closure"
            )
        return value

    def _draw_masks(self, generator: torch.Generator) -> dict[nn.Module, tuple[Tensor, Tensor]]:
        """Return the masks (d_in,), (d_out,) of every layer: 0, or 1 / (1 - p)."""
        sizes = [size for layer in self.layers.values() for size in (layer.in_features, layer.out_features)]
        keep = torch.rand(sum(sizes), generator=generator) >= self.p
        first = next(iter(self.layers.values()))
        masks = (keep.float() / (1 - self.p)).to(first.lora_A[self.adapter_name].weight.device)  # one transfer
        pieces = iter(masks.split(sizes))
        return {layer: (next(pieces), next(pieces)) for layer in self.layers.values()}


def _rescale(model: PeftModel, adapter_name: str, layers: dict[str, Any], factor: float) -> None:
    """Multiply lora_alpha by a factor, in the layers and in the configuration that is saved."""
    for layer in layers.values():
        layer.scaling[adapter_name] *= factor
        layer.lora_alpha[adapter_name] *= factor
    config: Any = model.peft_config[adapter_name]
    config.lora_alpha *= factor
    config.alpha_pattern = {key: alpha * factor for key, alpha in (config.alpha_pattern or {}).items()}
