"""Encoding: updates of every shape meet in one code space."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from structlora_pyg.checks import make_part

KINDS = ("sketch", "exact")


class Encoding(nn.Module):
    r"""Bilinear code :math:`Q^\top \Delta W P` of low-rank updates, computed from the factors alone.

    Direction j of an update has the codes :math:`a_j = A_j P` and :math:`b_j = B_{:,j}^\top Q`; the code of the update
    is :math:`\sum_j b_j \otimes a_j`, whatever the order of the directions. Every width has its own P and Q; with their
    orthonormal bases :math:`\hat P, \hat Q`, :math:`\hat Q C \hat P^\top` carries a code back to a layer.

    - ``sketch``: random subspaces, :math:`P = \sqrt{d/p}\,\hat P`, so that inner products of codes are those of the
      updates in expectation. Little of what is carried back meets the directions that a wide layer uses.
    - ``exact``: P and Q the identity, padded to the largest width.

    Args:
        in_widths: Input widths d_in that occur.
        out_widths: Output widths d_out that occur.
        kind: ``sketch`` or ``exact``.
        size: Side p of the code. A layer no wider than p is encoded exactly.
        seed: Seed of the random subspaces, which are regenerated from it.
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
        # A random subspace sees the same share of every update; what it misses is made up for.
        a = A @ (self.basis("in", d_in) * self._scale(d_in, self.in_size))
        b = B.mT @ (self.basis("out", d_out) * self._scale(d_out, self.out_size))
        return a, b

    def _scale(self, width: int, size: int) -> float:
        return max(1.0, width / size) ** 0.5 if self.kind == "sketch" else 1.0

    def extra_repr(self) -> str:
        """Name kind and size of the codes."""
        return f"kind={self.kind}, code=({self.out_size}, {self.in_size}), seed={self.seed}"


def make_encoding(kind: Any, in_widths: Sequence[int], out_widths: Sequence[int], size: int, seed: int) -> Encoding:
    """Return the encoding of a kind; or one of your own (class, dotted path, object) with the methods of `Encoding`."""
    known: dict[str, Any] = {"in_widths": in_widths, "out_widths": out_widths, "size": size, "seed": seed}
    return Encoding(**known, kind=kind) if kind in KINDS else make_part(kind, known)


def update_code(code_A: Tensor, code_B: Tensor, weight: Tensor, slots: int = 1) -> Tensor:
    r"""Return :math:`\sum_j w_j\, b_j \otimes a_j` per node, flattened.

    Args:
        code_A: (N, D, p_in), with D directions per node.
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
