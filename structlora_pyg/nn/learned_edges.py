"""Edges whose weights are learned, as a stage between filter and coordinator."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn import functional as F
from torch_geometric.data import Data
from torch_geometric.nn.pool.select.topk import topk


class LearnedEdges(nn.Module):
    r"""Weighs the edges of a graph by a learned similarity of their ends and keeps the strongest, ``Data -> Data``.

    .. math::
        s_{ij} = \frac{1}{m} \sum_{p=1}^{m} \cos(w_p \odot x_i,\ w_p \odot x_j), \quad
        a_{ij} = \tfrac{1}{2} (1 + s_{ij})

    is the weighted cosine of IDGL (Chen et al. 2020, arXiv 2006.13009, equation 3) with m learned vectors, mapped into
    [0, 1]: IDGL cuts at a threshold, under which an edge would have no gradient to come back with. An edge stays if it
    is among the `top_k` of one of its ends. The weights are symmetric, do not depend on the order of the nodes, and
    pass gradients to the vectors and to the codes. A node whose code is 0 has no edge.

    Args:
        channels: Width F of the node codes.
        top_k: Edges kept per node, >= 1.
        heads: Number m of learned vectors, >= 1.
    """

    def __init__(self, channels: int, top_k: int = 3, heads: int = 4) -> None:
        super().__init__()
        self.top_k = top_k
        self.weight = nn.Parameter(torch.empty(heads, channels).uniform_(0.5, 1.5))  # unequal, or heads stay equal

    def forward(self, data: Data) -> Data:
        """Return a shallow copy of `data` with fewer edges and their ``edge_weight`` (E',) in [0, 1].

        Args:
            data: A graph with ``x`` (N, F) and symmetric candidate edges; ``edge_attr`` and ``edge_type`` follow.
        """
        source, target = data.edge_index
        x = data.x / data.x.square().mean().add(1e-30).sqrt()
        unit = F.normalize(self.weight.unsqueeze(1) * x, dim=-1, eps=1e-6)  # (m, N, F); a zero code stays zero
        similarity = (unit @ unit.mT).mean(0)
        weight = (0.5 + 0.25 * (similarity + similarity.T))[source, target].clamp(0.0, 1.0)  # symmetric to the last bit
        exists = (x != 0).any(-1)
        possible = (exists[source] & exists[target]).nonzero().flatten()
        chosen = possible[topk(weight.detach()[possible], self.top_k, source[possible])]
        keep = torch.zeros(data.num_nodes, data.num_nodes, dtype=torch.bool, device=x.device)
        keep[source[chosen], target[chosen]] = True
        kept = (keep | keep.T)[source, target].nonzero().flatten()
        out = copy.copy(data)
        out.edge_index, out.edge_weight = data.edge_index[:, kept], weight[kept]
        if "edge_attr" in data:
            out.edge_attr = torch.cat([weight[kept].unsqueeze(-1), data.edge_attr[kept, 1:]], dim=-1)
        if "edge_type" in data:
            out.edge_type = data.edge_type[kept]
        return out

    def extra_repr(self) -> str:
        """Name sizes."""
        return f"{self.weight.size(1)}, top_k={self.top_k}, heads={self.weight.size(0)}"
