"""Structure of a set of updates: how alike neighbouring layers are (StructLoRA, arXiv 2603.14228, section 5).

Everything follows from inner products of the updates, which need no dense matrix:
``<s_i B_i A_i, s_j B_j A_j> = s_i s_j sum((A_i A_j^T) * (B_i^T B_j))``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor

from structlora_pyg.data.adapters import AdapterSet
from structlora_pyg.tuner.export import plain_factors
from structlora_pyg.tuner.model import StructLoraModel


@dataclass(frozen=True, kw_only=True)
class Structure:
    """Structure of N updates.

    Attributes:
        names: Names of the adapters.
        gram: (N, N) inner products; 0 between updates of different shape.
        similarity: (N, N) cosines; 0 between updates of different shape and for updates that are 0.
        adjacent_cosine: Mean cosine of updates of one role at consecutive depths; NaN without such a pair.
        drift_energy: Sum over the same pairs of the squared distance of the updates.
        relative_drift: `drift_energy` divided by the mean squared norm of an update.
    """

    names: list[str]
    gram: Tensor
    similarity: Tensor
    adjacent_cosine: float
    drift_energy: float
    relative_drift: float


@torch.no_grad()
def adapter_structure(model: PeftModel, adapter_name: str = "default") -> Structure:
    """Return the structure of the updates of a LoRA model, coordinated or plain.

    Args:
        model: A `peft.PeftModel` with LoRA adapters, or a `StructLoraModel` (as it would be exported now).
        adapter_name: Which adapter.
    """
    if isinstance(model, StructLoraModel):
        adapters = model.graph_pass.adapters
        layer_factors, _ = plain_factors(model.graph_pass)
        pairs = [(layer_factors[a.layer][0][a.ranks], layer_factors[a.layer][1][a.rows, a.ranks]) for a in adapters]
    else:
        adapters = AdapterSet(model.get_base_model(), adapter_name)
        pairs = [adapters.pair(a) for a in adapters]
    return structure_of(adapters, pairs)


@torch.no_grad()
def structure_of(adapters: AdapterSet, pairs: Sequence[tuple[Tensor, Tensor]]) -> Structure:
    """Return the structure of updates given as factors (A (r, d_in), B (d_out, r)), in the order of `adapters`."""
    gram = gram_matrix([(a.cpu(), b.cpu() * x.scaling) for (a, b), x in zip(pairs, adapters, strict=True)])
    norm = gram.diagonal().clamp(min=0).sqrt()
    similarity = gram / (norm.unsqueeze(0) * norm.unsqueeze(1)).clamp(min=1e-30)
    neighbours = adjacent_pairs(adapters)
    drift = sum(float(gram[i, i] + gram[j, j] - 2 * gram[i, j]) for i, j in neighbours)
    cosines = [float(similarity[i, j]) for i, j in neighbours]
    mean_square = float(gram.diagonal().mean())
    return Structure(
        names=[a.name for a in adapters],
        gram=gram,
        similarity=similarity,
        adjacent_cosine=sum(cosines) / len(cosines) if cosines else float("nan"),
        drift_energy=drift,
        relative_drift=drift / mean_square if mean_square > 0 else float("nan"),
    )


def adjacent_pairs(adapters: AdapterSet) -> list[tuple[int, int]]:
    """Return the pairs (i, j) of adapters of one role and shape at consecutive depths."""
    return [
        (i, j)
        for i, a in enumerate(adapters)
        for j, b in enumerate(adapters)
        if a.role == b.role and b.depth == a.depth + 1 and _shape(a) == _shape(b)
    ]


def gram_matrix(updates: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the (N, N) inner products in float64 of updates B A, given as (A (r, d_in), B (d_out, r)).

    Updates of different shape have the inner product 0.
    """
    n, device = len(updates), updates[0][0].device
    gram = torch.zeros(n, n, dtype=torch.float64, device=device)
    shapes: dict[tuple[int, int], list[int]] = {}
    for i, (a, b) in enumerate(updates):
        shapes.setdefault((a.size(1), b.size(0)), []).append(i)
    for group in shapes.values():
        rank = max(updates[i][0].size(0) for i in group)
        A = torch.stack(
            [torch.nn.functional.pad(a, (0, 0, 0, rank - a.size(0))) for a, _ in (updates[i] for i in group)]
        )
        B = torch.stack([torch.nn.functional.pad(b, (0, rank - b.size(1))) for _, b in (updates[i] for i in group)])
        A, B = A.double(), B.double()
        inner = torch.einsum("ird,jsd->ijrs", A, A) * torch.einsum("idr,jds->ijrs", B, B)
        index = torch.tensor(group, device=device)
        gram[index.unsqueeze(1), index] = inner.sum((2, 3))
    return gram


def _shape(adapter) -> tuple[int, int]:  # type: ignore[no-untyped-def]
    return adapter.in_features, adapter.out_features
