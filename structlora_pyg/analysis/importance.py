"""What each rank-one direction is worth, and whether the gates know: the test of a filter.

A filter whose gates do not follow what the loss loses when a direction is removed has not learned which directions
matter. Three quantities a direction are put beside that loss: its gate, its norm ``|b_j| |a_j|``, which needs no
filter, and the first-order estimate ``-m_j dL/dm_j``, which needs a single backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor

from structlora_pyg.nn.filter import IBFilter
from structlora_pyg.tuner.graph_pass import GraphPass, evaluating
from structlora_pyg.tuner.model import StructLoraModel


@dataclass(frozen=True, kw_only=True)
class Importance:
    """Directions of all updates, K of them, in the order of the graph's nodes.

    Attributes:
        removal: (K,) rise of the loss when the direction's gate is set to 0.
        first_order: (K,) estimate of it from one backward pass.
        gate: (K,) what the filter learned: the logit of the gate where it has one (the gates themselves are cut at 1,
            so that all the open ones are equal), else the gate.
        norm: (K,) norm of the direction without its gate.
    """

    removal: Tensor
    first_order: Tensor
    gate: Tensor
    norm: Tensor

    def correlations(self) -> dict[str, float | None]:
        """Return Spearman's rank correlations; None where one side is constant.

        ``removal_gate`` is the one that counts; ``removal_norm`` is what the size alone would have told;
        ``removal_first_order`` says how good the estimate is; ``gate_first_order`` pairs the gate with it.
        """
        pairs = {
            "removal_gate": (self.removal, self.gate),
            "removal_norm": (self.removal, self.norm),
            "removal_first_order": (self.removal, self.first_order),
            "gate_first_order": (self.gate, self.first_order),
        }
        return {name: _rank_correlation(*pair) for name, pair in pairs.items()}


def direction_importance(model: StructLoraModel, loss: Callable[[], Tensor]) -> Importance:
    """Measure every direction of a coordinated model in eval mode; it is left as it was.

    The cost is one forward pass a direction, and one backward pass.

    Args:
        model: The model; plain LoRA is one without filter, coordinator and edges.
        loss: Runs the model on examples that stay the same, and returns a scalar loss.
    """
    graph_pass = model.graph_pass
    gates = graph_pass.stages[0]
    with evaluating(model):
        factor = torch.ones_like(graph_pass.graph.scaling).requires_grad_()
        with _factor(gates, factor), torch.enable_grad():
            (gradient,) = torch.autograd.grad(loss(), factor)
        with torch.no_grad():
            graph = model.adapter_graph()
            exists = graph.scaling != 0
            with _factor(gates, torch.ones_like(factor)) as varied:
                model.hooks.run()
                start = float(loss())
                rise = torch.zeros_like(varied)
                for i, j in exists.nonzero().tolist():
                    varied[i, j] = 0.0
                    model.hooks.run()
                    rise[i, j] = float(loss()) - start
                    varied[i, j] = 1.0
        model.hooks.run()
    learned = gates.logits.detach() if isinstance(gates, IBFilter) else graph.gate
    chosen = (rise, -gradient, learned, _norms(graph_pass))
    removal, first_order, gate, norm = (values[exists].double().cpu() for values in chosen)
    return Importance(removal=removal, first_order=first_order, gate=gate, norm=norm)


@torch.no_grad()
def _norms(graph_pass: GraphPass) -> Tensor:
    """Return ``|b_j| |a_j|`` of every direction, (N, D) as the gates."""
    graph = graph_pass.graph
    table = torch.zeros(graph.scaling.numel(), device=graph.scaling.device)
    for start, adapter in zip(graph.first_row, graph_pass.adapters, strict=True):
        a, b = graph_pass.adapters.pair(adapter)
        table[start : start + adapter.r] = (a.norm(dim=1) * b.norm(dim=0)).to(table)
    return table.view_as(graph.scaling)


@contextmanager
def _factor(gates: Any, factor: Tensor) -> Iterator[Tensor]:
    gates.factor = factor
    try:
        yield factor
    finally:
        gates.factor = None


def _rank_correlation(x: Tensor, y: Tensor) -> float | None:
    if len(x.unique()) < 2 or len(y.unique()) < 2:
        return None
    rho = float(spearmanr(x.numpy(), y.numpy()).statistic)
    return rho if math.isfinite(rho) else None
