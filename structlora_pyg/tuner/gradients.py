"""Semantic edges: how alike the loss gradients of the adapted weights are.

The gradient of a weight is a sum over tokens of an outer product, so its code needs no dense matrix:
``Q^T G P = sum_tokens (Q^T delta) (P^T x)^T``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from structlora_pyg.data.adapters import AdapterSet
from structlora_pyg.data.encoding import Encoding
from structlora_pyg.tuner.layers import Attention


class GradientSketch(nn.Module):
    """Collects sketched weight gradients in the forwards between `open` and `close`, and averages them over time.

    Args:
        adapters: The n adapters.
        encoding: Gives the projections, so that gradients live in the code space of the updates.
        ema: Decay of the moving average over refreshes.

    Attributes:
        opened_at: Optimizer step at which it was opened; -1 when `finish` has taken in what was seen since.
    """

    pending: Tensor
    average: Tensor
    refreshes: Tensor

    def __init__(self, adapters: AdapterSet, encoding: Encoding, ema: float = 0.9) -> None:
        super().__init__()
        self.adapters, self.encoding, self.ema = adapters, encoding, ema
        size = encoding.out_size * encoding.in_size
        self.register_buffer("pending", torch.zeros(len(adapters), size))
        self.register_buffer("average", torch.zeros(len(adapters), size))
        self.register_buffer("refreshes", torch.zeros((), dtype=torch.long))
        self.opened_at = -1
        self._handles: list[RemovableHandle] = []
        self._eager: Any = None
        self._apart = False  # whether `pending` holds what this process alone has seen

    def open(self, step: int) -> None:
        """Watch every adapted layer during the coming forward, and the backward pass that belongs to it.

        Args:
            step: Optimizer steps done.
        """
        self.close()
        self.opened_at = step
        self._eager = torch.compiler.set_stance("force_eager")  # a compiled layer would be compiled again for the hooks
        self._apart = True
        places: dict[str, list[int]] = {}
        for i, adapter in enumerate(self.adapters):
            places.setdefault(adapter.layer, []).append(i)
        for path, indices in places.items():
            layer = self.adapters.layers[path]
            if not self._multiplies(path):
                continue  # see `listen`
            if isinstance(layer, Attention) or path.endswith(".base_layer.out_proj"):
                # Its update (d_in, d_out) is what lora_B returns, as if lora_B were a layer with the unit inputs.
                factor = layer.lora_B[self.adapters.adapter_name]
                self._handles.append(factor.register_forward_hook(_Watch(self, indices, torch.eye(layer.in_features))))
            else:
                self._handles.append(layer.register_forward_hook(_Watch(self, indices)))

    def listen(self, i: int, a: Tensor, b: Tensor) -> None:
        """Take what a step on B' would do to the update, where the gradient of the update itself is not at hand.

        Args:
            i: The adapter.
            a: A' (r, d_in) that its layer runs with.
            b: B' (d_out, r).
        """
        if self._eager is None or not b.requires_grad or self._multiplies(self.adapters[i].layer):
            return
        a_p = a.detach().float() @ self.encoding.basis("in", a.size(-1)).to(a.device).float()

        def collect(gradient: Tensor) -> None:
            d_q = gradient.detach().float().mT @ self.encoding.basis("out", b.size(0)).to(b.device).float()
            self.pending[i] += (d_q.mT @ a_p).flatten().to(self.pending.device)

        b.register_hook(collect)

    def _multiplies(self, path: str) -> bool:
        """Tell whether a layer multiplies its input by its weight, so that both ends of the gradient can be seen."""
        return isinstance(self.adapters.sides(path)[0], nn.Linear) and not hasattr(
            self.adapters.layers[path], "parameter_name"
        )

    def close(self) -> None:
        """Stop watching forwards; backward passes of the forwards seen still count."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._eager is not None:
            self._eager.__exit__(None, None, None)
            self._eager = None

    def gather(self) -> None:
        """Average what the processes have collected, once; all have to call it.

        It has to happen before the next forward: data parallelism then overwrites buffers by those of one process.
        """
        if self._apart and torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(self.pending)
            self.pending /= torch.distributed.get_world_size()
        self._apart = False

    def finish(self) -> bool:
        """Move what all processes have collected into the average; tell whether there was anything.

        A gradient that overflowed (mixed precision skips such steps too) is left out. All processes have to call it.
        """
        self.gather()
        self.opened_at = -1
        sketch = self.pending.clone()
        self.pending.zero_()
        if not torch.isfinite(sketch).all() or not sketch.any():
            return False
        sketch = torch.nn.functional.normalize(sketch, dim=1)  # a cosine does not see the loss falling
        first = self.refreshes == 0
        self.average.copy_(sketch if first else self.ema * self.average + (1 - self.ema) * sketch)
        self.refreshes += 1
        return True

    def get_extra_state(self) -> Tensor:
        """Return the step it was opened at, for ``state_dict``."""
        return torch.tensor([self.opened_at])

    def set_extra_state(self, state: Tensor) -> None:
        """Restore the step it was opened at."""
        self.opened_at = int(state)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_handles": [], "_eager": None}


class _Watch:
    """A forward hook: project the input now, and the gradient of the output when it comes."""

    def __init__(self, sketch: GradientSketch, indices: list[int], x: Tensor | None = None) -> None:
        self.sketch, self.indices, self.x = sketch, indices, x

    def __call__(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        if not output.requires_grad:
            return
        adapters, encoding = self.sketch.adapters, self.sketch.encoding
        with torch.no_grad():
            x = args[0].detach().flatten(0, -2) if self.x is None else self.x.to(args[0])
            x_p = (x @ encoding.basis("in", x.size(-1)).to(x)).float()

        def collect(gradient: Tensor) -> None:
            delta = gradient.detach().flatten(0, -2)
            for i in self.indices:
                part = delta[:, adapters[i].rows]
                d_q = (part @ encoding.basis("out", part.size(-1)).to(part)).float()
                self.sketch.pending[i] += (d_q.T @ x_p).flatten().to(self.sketch.pending.device)

        output.register_hook(collect)
