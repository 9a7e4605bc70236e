"""Encoding: updates of every shape meet in one code space."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Encoding(nn.Module):
    r"""Bilinear code :math:`Q^\top \Delta W P` of low-rank updates, computed from the factors alone.

    Direction j of an update has the codes :math:`a_j = A_j P` and :math:`b_j = B_{:,j}^\top Q`; the code of the update
    is :math:`\sum_j b_j \otimes a_j`, whatever the order of the directions. Each width has a random subspace of its
    own: :math:`P = \sqrt{d/p}\,\hat P` with orthonormal columns, so that inner products of codes are those of the
    updates in expectation and :math:`\hat Q C \hat P^\top` carries a code back at its own norm.

    Args:
        in_widths: Input widths d_in that occur.
        out_widths: Output widths d_out that occur.
        kind: ``sketch``, or ``exact`` (P and Q the identity, padded to the largest width).
        size: Side p of the sketch. A layer no wider than p is encoded exactly.
        seed: Seed of the subspaces. They are regenerated from it, never saved.
    """

    def __init__(
        self, in_widths: Sequence[int], out_widths: Sequence[int], kind: str = "sketch", size: int = 16, seed: int = 0
    ) -> None:
        super().__init__()
        self.kind, self.size, self.seed = kind, size, seed
        self.in_size = max(in_widths) if kind == "exact" else size
        self.out_size = max(out_widths) if kind == "exact" else size
        for side, widths, p in (("in", in_widths, self.in_size), ("out", out_widths, self.out_size)):
            for d in sorted(set(widths)):
                basis = torch.eye(d, p) if kind == "exact" else _subspace(d, p, seed, side)
                self.register_buffer(f"{side}_{d}", basis, persistent=False)

    def basis(self, side: str, width: int) -> Tensor:
        """Return the orthonormal basis (width, p) of a side, ``in`` or ``out``."""
        return self.get_buffer(f"{side}_{width}")

    def directions(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """Return the codes a (n, r, p_in) and b (n, r, p_out) of n stacked updates A (n, r, d_in), B (n, d_out, r)."""
        d_in, d_out = A.size(-1), B.size(-2)
        a = A @ (self.basis("in", d_in) * max(1.0, d_in / self.in_size) ** 0.5)
        b = B.mT @ (self.basis("out", d_out) * max(1.0, d_out / self.out_size) ** 0.5)
        return a, b

    def extra_repr(self) -> str:
        """Name kind and size of the codes."""
        return f"kind={self.kind}, code=({self.out_size}, {self.in_size}), seed={self.seed}"


def update_code(code_A: Tensor, code_B: Tensor, weight: Tensor, slots: int = 1) -> Tensor:
    r"""Return :math:`\sum_j w_j\, b_j \otimes a_j` per node, flattened.

    Args:
        code_A: (N, D, p_in), with D directions a node.
        code_B: (N, D, p_out).
        weight: (N, D), gate times scaling of every direction.
        slots: Number of updates a node holds; its D directions are divided among them evenly.

    Returns:
        (N, slots * p_out * p_in).
    """
    n, d, p_in = code_A.shape
    shape = (n, slots, d // slots, -1)
    a = code_A.reshape(*shape[:3], p_in)
    b = (code_B * weight.unsqueeze(-1)).reshape(shape)
    return torch.einsum("nsro,nsri->nsoi", b, a).reshape(n, -1)


def _subspace(d: int, p: int, seed: int, side: str) -> Tensor:
    """Return (d, p) with orthonormal columns; with p > d an orthogonal (d, d) padded with zeros."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + d) * 2 + (side == "out"))
    q, _ = torch.linalg.qr(torch.randn(d, min(d, p), generator=generator, dtype=torch.float64))
    return torch.nn.functional.pad(q, (0, p - q.size(1))).float()
