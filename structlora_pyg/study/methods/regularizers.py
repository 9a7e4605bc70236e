"""LoRA + Cos and LoRA + Laplacian: fixed penalties that make neighbouring updates alike.

StructLoRA (arXiv 2603.14228, appendix) names both as comparisons without their formulas; these are our choice. With
u_i = vec(s_i B_i A_i) both follow from the Gram matrix of the updates, without any dense update.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch_geometric.utils import is_undirected

from structlora_pyg.analysis.structure import gram_matrix
from structlora_pyg.data.adapters import AdapterSet
from structlora_pyg.data.edges import build_edges
from structlora_pyg.tuner.layers import Factor
from structlora_pyg.tuner.model import StructLoraModel


class _Penalty:
    """The updates of a model, and their current Gram matrix."""

    def __init__(self, model: PeftModel, eps: float, adapter_name: str) -> None:
        if not eps > 0:
            raise ValueError(f"eps must be > 0, got {eps!r}; updates are 0 at the start")
        coordinated = isinstance(model, StructLoraModel)
        self.adapters = model.graph_pass.adapters if coordinated else AdapterSet(model.get_base_model(), adapter_name)
        self.eps = eps

    def gram(self) -> Tensor:
        """Return the (N, N) inner products of the updates in float64, differentiable."""
        name = self.adapters.adapter_name
        updates = []
        for a in self.adapters:
            layer = self.adapters.layers[a.layer]
            A, B = _current(layer.lora_A[name]), _current(layer.lora_B[name])
            updates.append((A[a.ranks], B[a.rows, a.ranks] * a.scaling))
        return gram_matrix(updates)

    def chain(self) -> Tensor:
        """Return the pairs (2, E) of adapters of one role at consecutive depths."""
        adapters = self.adapters
        depth = torch.tensor([a.depth for a in adapters])
        role = torch.tensor([adapters.roles.index(a.role) for a in adapters])
        edge_index, _ = build_edges("depth_chain", depth, role, torch.zeros_like(role))
        return edge_index

    def check(self, edge_index: Tensor) -> Tensor:
        """Return the edges, each pair once.

        Raises:
            ValueError: If there is none, or one joins updates of different shape, which cannot be compared.
        """
        pairs = edge_index[:, edge_index[0] < edge_index[1]]
        if pairs.size(1) == 0:
            raise ValueError(
                f"the penalty has nothing to compare: no two of the {len(self.adapters)} adapters are joined (one "
                f"role at consecutive depths, unless edges are given); roles: {', '.join(self.adapters.roles)}"
            )
        for i, j in pairs.T.tolist():
            a, b = self.adapters[i], self.adapters[j]
            if (a.in_features, a.out_features) != (b.in_features, b.out_features):
                raise ValueError(
                    f"{a.name} ({a.out_features} x {a.in_features}) and {b.name} ({b.out_features} x {b.in_features}) "
                    "differ in shape, so their updates have no distance; leave this edge out"
                )
        return pairs


class CosinePenalty(_Penalty):
    r"""Penalty on the angle between updates of one role at consecutive depths.

    .. math:: \sum_{roles} \frac{1}{N - 1} \sum_{l=1}^{N-1} \left(1 - \cos(u_l, u_{l+1})\right)

    with N adapters a role. Calling it returns the penalty, a float64 scalar in [0, 2 x number of roles]::

        penalty = CosinePenalty(model)
        loss = model(**batch).loss + 0.1 * penalty()

    Args:
        model: A `peft.PeftModel` with LoRA adapters on linear layers; of a `StructLoraModel`, the coordinated factors
            of the last forward are compared.
        eps: Added to the product of the norms, in units of a squared norm, > 0. Where updates are 0, as at the start,
            the penalty is 1 a pair and its gradient 0.
        adapter_name: Which adapter.

    Raises:
        ValueError: If no two updates can be compared.
    """

    def __init__(self, model: PeftModel, eps: float = 1e-12, adapter_name: str = "default") -> None:
        super().__init__(model, eps, adapter_name)
        self.pairs = self.check(self.chain())
        roles = [self.adapters[i].role for i in self.pairs[0].tolist()]
        self.weight = torch.tensor([1 / roles.count(role) for role in roles], dtype=torch.float64)

    def __call__(self) -> Tensor:
        """Return the penalty of the current factors."""
        gram = self.gram()
        i, j = self.pairs.to(gram.device)
        square = gram.diagonal().clamp(min=0)
        # The root is taken of a number > 0, so that its gradient stays finite where an update is 0.
        cosine = gram[i, j] / (square[i] * square[j] + self.eps**2).sqrt()
        return (self.weight.to(gram.device) * (1 - cosine)).sum()


class LaplacianPenalty(_Penalty):
    r"""Penalty on the distance between joined updates.

    .. math:: \frac{\sum_{i < j} w_{ij} \|u_i - u_j\|^2}{\frac1N \sum_i \|u_i\|^2} = \frac{tr(L G)}{tr(G) / N}

    with the Gram matrix G and the graph Laplacian L. Calling it returns the penalty, a float64 scalar >= 0.

    Args:
        model: A `peft.PeftModel` with LoRA adapters on linear layers; of a `StructLoraModel`, the coordinated factors
            of the last forward are compared.
        edge_index: (2, E) edges between adapters in their order, both directions; default: one role, consecutive depth.
        edge_weight: (E,) weights >= 0 of `edge_index`; default 1.
        normalize: Divide by the mean squared norm. The raw form (False) is smallest for updates that are 0, so it is
            weight decay as well.
        eps: Added to the mean squared norm, > 0.
        adapter_name: Which adapter.

    Raises:
        ValueError: If edges are directed, join updates of different shape, or there is none; weights that do not fit.
    """

    def __init__(
        self,
        model: PeftModel,
        edge_index: Tensor | None = None,
        edge_weight: Tensor | None = None,
        normalize: bool = True,
        eps: float = 1e-12,
        adapter_name: str = "default",
    ) -> None:
        super().__init__(model, eps, adapter_name)
        n = len(self.adapters)
        if edge_index is None and edge_weight is not None:
            raise ValueError("edge_weight has no effect without edge_index; give both")
        edges = self.chain() if edge_index is None else edge_index.cpu()
        weight = torch.ones(edges.size(1)) if edge_weight is None else edge_weight.cpu()
        if edges.numel() and not 0 <= int(edges.min()) <= int(edges.max()) < n:
            raise ValueError(f"edge_index must hold numbers of the {n} adapters, 0 to {n - 1}, got {edges.tolist()}")
        if weight.shape != edges.shape[1:] or bool((weight < 0).any()):
            raise ValueError(f"edge_weight must hold {edges.size(1)} weights >= 0, got {weight.tolist()}")
        if not is_undirected(edges, weight, num_nodes=n):
            raise ValueError(
                "edge_index must hold every edge in both directions with one weight; use "
                "torch_geometric.utils.to_undirected"
            )
        self.pairs = self.check(edges)
        self.weight = weight[edges[0] < edges[1]].double()
        self.normalize = normalize

    def __call__(self) -> Tensor:
        """Return the penalty of the current factors."""
        gram = self.gram()
        i, j = self.pairs.to(gram.device)
        square = gram.diagonal()
        energy = (self.weight.to(gram.device) * (square[i] + square[j] - 2 * gram[i, j])).sum()
        return energy / (square.mean() + self.eps) if self.normalize else energy


def _current(factor: Any) -> Tensor:
    return factor.current() if isinstance(factor, Factor) else factor.weight
