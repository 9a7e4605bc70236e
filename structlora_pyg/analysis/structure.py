"""Structure of a set of updates: how alike neighbouring layers are (StructLoRA, arXiv 2603.14228, section 5).

Everything follows from inner products of the updates, which need no dense matrix:
``<s_i B_i A_i, s_j B_j A_j> = s_i s_j sum((A_i A_j^T) * (B_i^T B_j))``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn import functional as F

from structlora_pyg.analysis.stages import coordinator_energies
from structlora_pyg.data.adapters import AdapterSet
from structlora_pyg.tuner.gradients import GradientSketch
from structlora_pyg.tuner.graph_pass import adapter_factors
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

    def numbers(self) -> dict[str, float | None]:
        """Return the last three by name, None in the place of NaN."""
        names = ("adjacent_cosine", "drift_energy", "relative_drift")
        return {name: value if (value := getattr(self, name)) == value else None for name in names}


@torch.no_grad()
def adapter_structure(model: PeftModel, adapter_name: str = "default") -> Structure:
    """Return the structure of the updates of a LoRA model, coordinated or plain.

    Args:
        model: A `peft.PeftModel` with LoRA adapters, or a `StructLoraModel` (as it would be exported now).
        adapter_name: Which adapter.
    """
    adapters, own = _adapters_of(model, adapter_name), isinstance(model, StructLoraModel)
    pairs = adapter_factors(model.graph_pass)[0] if own else [adapters.pair(a) for a in adapters]
    return structure_of(adapters, pairs)


def _adapters_of(model: PeftModel, adapter_name: str) -> AdapterSet:
    own = isinstance(model, StructLoraModel)
    return model.graph_pass.adapters if own else AdapterSet(model.get_base_model(), adapter_name)


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
        if (a.role, a.in_features, a.out_features) == (b.role, b.in_features, b.out_features) and b.depth == a.depth + 1
    ]


def gram_matrix(updates: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the (N, N) inner products in float64 of updates B A, given as (A (r, d_in), B (d_out, r)).

    Updates of different shape have the inner product 0.
    """
    n, device = len(updates), updates[0][0].device
    gram = torch.zeros(n, n, dtype=torch.float64, device=device)
    alike: dict[tuple[int, int], list[int]] = {}
    for i, (a, b) in enumerate(updates):
        alike.setdefault((a.size(1), b.size(0)), []).append(i)
    for group in alike.values():
        rank = max(updates[i][0].size(0) for i in group)
        A = torch.stack([F.pad(a, (0, 0, 0, rank - a.size(0))) for a, _ in (updates[i] for i in group)]).double()
        B = torch.stack([F.pad(b, (0, rank - b.size(1))) for _, b in (updates[i] for i in group)]).double()
        inner = torch.einsum("ird,jsd->ijrs", A, A) * torch.einsum("idr,jds->ijrs", B, B)
        index = torch.tensor(group, device=device)
        gram[index.unsqueeze(1), index] = inner.sum((2, 3))
    return gram


@torch.no_grad()
def stage_sizes(model: StructLoraModel) -> dict[str, list[float]]:
    """Return what filter and coordinator do to every adapter, in the order of the model's adapters.

    Returns:
        ``filter``: ‖ΔW̃ - ΔW‖ / ‖ΔW‖ with ΔW the update of the parameters and ΔW̃ the filtered one; ``coordinator``:
        ‖ΔW' - ΔW̃‖ / ‖ΔW̃‖ with ΔW' the one that is exported; ``level``: mean noise level in training. An update that
        is 0 has moved by 0.
    """
    graph_pass = model.graph_pass
    adapters, graph, data = graph_pass.adapters, graph_pass.graph, graph_pass.evaluated()[0]
    final, _ = adapter_factors(graph_pass)
    found: dict[str, list[float]] = {name: [0.0] * len(adapters) for name in ("filter", "coordinator", "level")}
    for k, group in enumerate(adapters.groups):
        gates = graph.of_group(k, data.gate)
        levels = graph.of_group(k, data.level) if "level" in data else torch.zeros_like(gates)
        for i, gate, level in zip(group, gates, levels, strict=True):
            A, B = (factor.to(gate).double() for factor in adapters.pair(adapters[i]))
            filtered, (a, b) = B * gate, final[i]
            found["filter"][i] = _moved((A, B), (A, filtered))
            found["coordinator"][i] = _moved((A, filtered), (a.double(), b.double()))
            found["level"][i] = float(level.mean())
    return found


def mean_sizes(sizes: dict[str, list[float]]) -> dict[str, float]:
    """Return ``filter_moves``, ``coordinator_moves`` and ``noise_level``, the means of `stage_sizes` over adapters."""
    names = {"filter": "filter_moves", "coordinator": "coordinator_moves", "level": "noise_level"}
    return {name: sum(sizes[key]) / len(sizes[key]) for key, name in names.items()}


def _moved(before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor]) -> float:
    """Return the distance of two updates, given as (A, B), over the norm of the first; 0 where that is 0."""
    change = torch.cat([before[0], after[0]]), torch.cat([before[1], -after[1]], dim=1)
    size, moved = (float(gram_matrix([pair])[0, 0].clamp(min=0).sqrt()) for pair in (before, change))
    return moved / size if size > 0 else 0.0


class StructureRecorder:
    """Measures updates and gradients of a LoRA model, coordinated or plain, around chosen training steps.

    Call `open` before the forward passes of a step and `read` after its optimizer step. Gradients are those of the
    adapted weights, sketched by the same random projections for every method, so that their cosines can be compared.

    Args:
        model: A `peft.PeftModel` with LoRA adapters, or a `StructLoraModel`.

    Raises:
        ValueError: If the model has no LoRA on linear layers.
    """

    def __init__(self, model: PeftModel) -> None:
        self.model, self.adapters = model, _adapters_of(model, "default")
        self._gradients = GradientSketch(self.adapters, ema=0.0).to(next(model.parameters()).device)

    def open(self) -> None:
        """Collect the gradients of the forward and backward passes that follow."""
        self._gradients.open(step=0)  # which step it is matters to edges alone

    def read(self) -> dict[str, Any]:
        """Return what the step showed.

        Returns:
            ``adjacent_cosine``, ``drift_energy``, ``relative_drift`` of the updates (see `Structure`);
            ``gradient_cosine``, the mean cosine of the gradients over the same pairs; ``open_gates``, the share of
            gates that are not 0, and ``mean_gate``, both None without filter. None too for what is not defined: the
            cosine of updates that are still 0, or of a single layer. ``dirichlet``: the relative Dirichlet energy of
            the coordinator's features, one number per layer from its input on, see
            `structlora_pyg.analysis.stages`; None without a coordinator. Of a `StructLoraModel` also
            `mean_sizes`.
        """
        self._gradients.close()
        values: dict[str, Any] = adapter_structure(self.model).numbers()
        values |= {"gradient_cosine": self._gradient_cosine(), "dirichlet": None, "open_gates": None, "mean_gate": None}
        if isinstance(self.model, StructLoraModel):
            values |= {"dirichlet": coordinator_energies(self.model), **mean_sizes(stage_sizes(self.model))}
            values |= gate_summary(self.model)
        return values

    def _gradient_cosine(self) -> float | None:
        pairs = adjacent_pairs(self.adapters)
        if not self._gradients.finish() or not pairs:
            return None
        unit = F.normalize(self._gradients.average, dim=1)
        return sum(float(unit[i] @ unit[j]) for i, j in pairs) / len(pairs)


@torch.no_grad()
def gate_summary(model: StructLoraModel) -> dict[str, float]:
    """Return ``open_gates``, the share that is not 0, and ``mean_gate`` over the real directions, in [0, 1]."""
    graph = model.adapter_graph()
    gate = graph.gate[graph.scaling != 0]
    return {"open_gates": float((gate != 0).float().mean()), "mean_gate": float(gate.mean())}
