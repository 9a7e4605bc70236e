r"""Lifts: from the coordinator's message in code space back to low-rank factors.

With A (n, r, d_in), B (n, d_out, r), gates m (n, r), codes a (n, r, p_in) and b (n, r, p_out) of the directions, the
message C (n, p_out, p_in) of each update (in the code space of B A, so already divided by the scaling) and the
orthonormal bases :math:`\hat P` (d_in, p_in) and :math:`\hat Q` (d_out, p_out), a lift returns (A', B'). Every lift is
the identity on the filtered update where C = 0. All but ``dense`` keep the rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from structlora_pyg.checks import make_part

EPS = 1e-8


class Lift(nn.Module):
    """Base class of lifts; `forward` gets the tensors named in the module docstring."""

    def forward(
        self, A: Tensor, B: Tensor, m: Tensor, a: Tensor, b: Tensor, C: Tensor, P: Tensor, Q: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return A' (n, r', d_in) and B' (n, d_out, r')."""
        raise NotImplementedError(f"{type(self).__name__} must define forward(A, B, m, a, b, C, P, Q) -> (A', B')")


class TangentLift(Lift):
    r"""One gradient step of :math:`\tfrac12\lVert BA - (\tilde B\tilde A + \hat Q C \hat P^\top)\rVert^2`.

    :math:`A' = A + \eta\,\tilde B^\top \hat Q C \hat P^\top`, :math:`B' = \tilde B + \eta\,\hat Q C \hat P^\top A^\top`
    with :math:`\tilde B = B\,\mathrm{diag}(m)` and the stable step
    :math:`\eta = 1 / (\lVert A \rVert^2 + \lVert \tilde B \rVert^2)`. No decoder parameters.
    """

    def forward(self, A, B, m, a, b, C, P, Q):  # type: ignore[no-untyped-def]
        """See `Lift`."""
        # From the norms of the directions, so that autograd need not keep the filtered factor.
        size = A.square().sum((1, 2)) + (m * m * B.square().sum(1)).sum(1) + EPS
        B = B * m.unsqueeze(1)
        C = C / size.view(-1, 1, 1)
        return _plus(A, B.mT @ Q @ C, P), _plus(B.mT, A @ P @ C.mT, Q).mT


class ProjectLift(Lift):
    r"""The part of the message that the layer's own input directions can express, exactly.

    :math:`B' = \tilde B + \hat Q C \hat P^\top A^+`, the least-squares solution with A kept, so that
    :math:`B'A = \tilde B A + \hat Q C \hat P^\top \Pi_A` with the projection on the row space of A. ``tangent`` takes
    one gradient step towards it, which hardly moves an update whose factors are small.
    """

    def forward(self, A, B, m, a, b, C, P, Q):  # type: ignore[no-untyped-def]
        """See `Lift`."""
        gram = A @ A.mT
        ridge = 1e-6 * gram.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] + EPS
        gram = gram + ridge * torch.eye(A.size(1), device=A.device, dtype=A.dtype)
        B = B * m.unsqueeze(1)
        return A, _plus(B.mT, torch.linalg.solve(gram, A @ P) @ C.mT, Q).mT


class DenseLift(Lift):
    r"""The message added to the update itself: :math:`\tilde B A + \hat Q C \hat P^\top`, as factors of rank r + p.

    With ``encoding.kind=exact`` this is the paper's literal addition in parameter space. It is the only lift whose
    result has a higher rank, which the exported adapter then has.
    """

    def forward(self, A, B, m, a, b, C, P, Q):  # type: ignore[no-untyped-def]
        """See `Lift`."""
        basis = P.T.expand(len(A), -1, -1)
        return torch.cat([A, basis], 1), torch.cat([B * m.unsqueeze(1), Q @ C], 2)


def _plus(X: Tensor, coefficients: Tensor, basis: Tensor) -> Tensor:
    """Return X (n, r, d) plus coefficients (n, r, p) on a basis (d, p), in one pass."""
    return torch.addmm(X.flatten(0, 1), coefficients.flatten(0, 1), basis.mT).view_as(X)


LIFTS: dict[str, type[Lift]] = {"tangent": TangentLift, "project": ProjectLift, "dense": DenseLift}


def make_lift(kind: Any, in_size: int, out_size: int, rank: int) -> Lift:
    """Return a lift by name, dotted path, class (called with what it asks for by name), or object, which is copied."""
    if kind == "none":
        return Lift()
    return make_part(kind, {"in_size": in_size, "out_size": out_size, "rank": rank}, LIFTS, "lift")
