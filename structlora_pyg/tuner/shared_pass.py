"""One graph pass for all forwards of an optimizer step: under gradient accumulation their factors are the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Lifted = list[tuple[list[int], Tensor, Tensor]]  # of a shape: its adapters, their A' (n, r, d_in) and B' (n, d_out, r)


class SharedPass:
    """The graph pass of the first micro-batch, for the others too.

    The gradients of its factors are added up, and go back through it once, with those of the last micro-batch.

    Attributes:
        share: What the loss of this micro-batch is multiplied by.
        last: Whether the optimizer steps next.
        open: Whether a micro-batch runs.
    """

    def __init__(self) -> None:
        self.share, self.last, self.open = 1.0, False, False
        self._lifted: Lifted = []
        self._leaves: list[tuple[Tensor, Tensor]] = []

    def factors(self, graph_pass: Callable[[], Lifted]) -> Lifted:
        """Return the factors for this micro-batch, from `graph_pass` if it is the first."""
        if not self._lifted:
            self._lifted = graph_pass()
            self._leaves = [(A.detach().requires_grad_(), B.detach().requires_grad_()) for _, A, B in self._lifted]
        pairs = self._leaves
        if self.last:
            known = [leaf.grad for pair in self._leaves for leaf in pair]
            flat = _AddGradients.apply(known, *(t for _, *pair in self._lifted for t in pair))
            pairs = list(zip(flat[::2], flat[1::2], strict=True))
        return [(group, A, B) for (group, _, _), (A, B) in zip(self._lifted, pairs, strict=True)]

    def once(self, loss: Tensor) -> Tensor:
        """Return a loss of the graph pass at its value; only that of the last micro-batch, for all, has a gradient."""
        value = loss.detach()
        return value + (loss - value) / self.share if self.last else value


class _AddGradients(torch.autograd.Function):
    """The identity on some tensors; gradients known before are added to theirs, also where theirs never come."""

    @staticmethod
    def forward(ctx: Any, known: list[Tensor | None], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.known = known
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        pairs = zip(ctx.known, gradients, strict=True)
        return None, *(new if known is None else known + new for known, new in pairs)
