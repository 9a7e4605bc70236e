r"""Semantic edges: how alike the loss gradients of the adapted weights are.

The gradient :math:`G = \sum_{tokens} \delta x^\top` of a frozen weight is formed on the steps that ask for it, one more
matrix product per layer, and thrown into `SIZE` buckets with random signs (count sketch, Charikar et al. 2002; of a
matrix: tensor sketch, Pham and Pagh 2013). The cosine of two sketches estimates that of the gradients with a standard
error of at most sqrt(3 / `SIZE`), whatever their rank; a projection of both sides on few directions does not, since
gradients are nearly of rank one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from structlora_pyg.data.adapters import AdapterSet
from structlora_pyg.tuner.layers import Attention

SIZE = 8192  # numbers that stand for a gradient, a power of two: cosines to within 0.019
FEW = 64  # tokens, or directions, up to which Fourier transforms are cheaper than the product


class GradientSketch(nn.Module):
    """Collects sketched weight gradients in the forwards between `open` and `close`, and averages them over time.

    Args:
        adapters: The n adapters.
        ema: Decay of the moving average over refreshes.
        seed: Seed of buckets and signs, which are drawn from it again wherever they are needed.

    Attributes:
        error: Largest standard error of a cosine; 0 where the widest gradient fits into `SIZE` numbers as it is.
        opened_at: Optimizer step at which it was opened; -1 when `finish` has taken in what was seen since.
    """

    pending: Tensor
    average: Tensor
    refreshes: Tensor

    def __init__(self, adapters: AdapterSet, ema: float = 0.9, seed: int = 0) -> None:
        super().__init__()
        self.adapters, self.ema, self.seed = adapters, ema, seed
        self._width = max(a.in_features for a in adapters)
        exact = self._width * max(a.out_features for a in adapters) <= SIZE
        self.error = 0.0 if exact else (3 / SIZE) ** 0.5
        self.register_buffer("pending", torch.zeros(len(adapters), SIZE))
        self.register_buffer("average", torch.zeros(len(adapters), SIZE))
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

        def collect(gradient: Tensor) -> None:
            self.add(i, gradient.detach().mT, a.detach())

        b.register_hook(collect)

    def add(self, i: int, left: Tensor, right: Tensor) -> None:
        """Add the gradient ``left.T @ right`` of an adapter's update, or of a part of a batch, to its sketch.

        Args:
            i: The adapter.
            left: (T, d_out), of every token the gradient of the output.
            right: (T, d_in), of every token the input.
        """
        left, right = left.float(), right.float()
        sides = [self._buckets(side, x.size(1), x.device) for side, x in enumerate((left, right))]
        if self.error and len(left) <= FEW:  # the same by convolution, without the matrix, which may be of a vocabulary
            parts = zip((left, right), sides, strict=True)
            counts = (x.new_zeros(len(x), SIZE).index_add_(1, bucket, x * sign) for x, (bucket, sign) in parts)
            p, q = (torch.fft.rfft(count) for count in counts)
            sketch = torch.fft.irfft((p * q).sum(0), n=SIZE)
        else:
            (rows, row_signs), (columns, column_signs) = sides
            bucket = (rows.unsqueeze(1) + columns).bitwise_and_(SIZE - 1).flatten()  # remainders take ten times as long
            signed = (left * row_signs).T @ (right * column_signs)
            sketch = left.new_zeros(SIZE).index_add_(0, bucket, signed.flatten())
        self.pending[i] += sketch.to(self.pending.device)

    def _buckets(self, side: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return bucket and sign of every row (side 0) or column (side 1); their sum places an entry."""
        if self.error == 0:
            step = 1 if side else self._width
            return torch.arange(width, dtype=torch.int32, device=device) * step, torch.ones(width, device=device)
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + width) * 2 + side)
        buckets = torch.randint(SIZE, (width,), dtype=torch.int32, generator=generator)
        signs = torch.randint(2, (width,), generator=generator) * 2.0 - 1.0
        return buckets.to(device), signs.to(device)

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
    """A forward hook: keep the input, and form the weight gradient when that of the output comes."""

    def __init__(self, sketch: GradientSketch, indices: list[int], x: Tensor | None = None) -> None:
        self.sketch, self.indices, self.x = sketch, indices, x

    def __call__(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        if not output.requires_grad:
            return
        x = args[0].detach().flatten(0, -2) if self.x is None else self.x.to(args[0])

        def collect(gradient: Tensor) -> None:
            delta = gradient.detach().flatten(0, -2)
            for i in self.indices:
                self.sketch.add(i, delta[:, self.sketch.adapters[i].rows], x)

        output.register_hook(collect)
