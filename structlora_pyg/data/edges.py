"""Which nodes of the adapter graph are joined; and the controls that message passing has to be compared with.

==================================  ======================================================================
``adapter.graph.edges: none``       no neighbours; parts of a convolution then have nothing to work on
``adapter.graph.edges: random``     as many edges as the chain, anywhere
``adapter.graph.shuffle_nodes``     the same graph, its nodes exchanged: structure without meaning
``adapter.coordinator.frozen``      messages through a random network: structure without learned weights
``adapter.coordinator.messages``    false: learned weights, as many, without structure
``adapter.coordinator.conv: none``  no coordinator
``adapter.filter.kind: none``       no filter
``method.name: lora``               neither
==================================  ======================================================================

`structlora ablate --controls` runs all of these controls beside a configuration.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch_geometric.utils import coalesce, to_undirected

GRADIENT_EDGES = ("gradient", "hybrid")


def build_edges(
    kind: str,
    depth: Tensor,
    role: Tensor,
    block: Tensor,
    gradient_cosine: Tensor | None = None,
    top_k: int = 3,
    threshold: float = 0.05,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Return the symmetric edges (2, E) of an edge set and their weights (E,) in [0, 1], sorted by destination.

    Args:
        kind: ``structure`` (chain and block), ``depth_chain``, ``same_block``, ``gradient``, ``hybrid``, ``full``,
            ``random``, ``learned`` (all pairs, for a later stage to choose from) or ``none``.
            ``gradient`` and ``hybrid`` are the chain until gradients are known.
        depth: (N,) position within the role.
        role: (N,) role index.
        block: (N,) block index.
        gradient_cosine: (N, N) cosines, or None while there are none.
        top_k: Gradient edges kept per node.
        threshold: Least cosine of a gradient edge. Negative cosines never make an edge: one negative weight turns
            the symmetric normalisation of `GCNConv` into NaN.
        seed: Seed of ``random``, which has as many edges as the chain.
    """
    n, device = depth.numel(), depth.device
    rows, cols = torch.triu_indices(n, n, offset=1, device=device)
    chain = (role[rows] == role[cols]) & ((depth[rows] - depth[cols]).abs() == 1)
    if kind in ("full", "learned"):  # all are candidates
        pick = torch.ones_like(chain)
    elif kind == "none":
        pick = torch.zeros_like(chain)
    elif kind == "structure":
        pick = chain | (block[rows] == block[cols])
    elif kind == "same_block":
        pick = block[rows] == block[cols]
    elif kind == "random":
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(chain.numel(), generator=generator)[: int(chain.sum())].to(device)
        pick = torch.zeros_like(chain).index_fill(0, chosen, True)
    else:
        pick = chain if kind in ("depth_chain", "hybrid") or gradient_cosine is None else torch.zeros_like(chain)
    edges = [torch.stack([rows[pick], cols[pick]])]
    weights = [torch.ones(edges[0].size(1), device=device)]
    if kind in GRADIENT_EDGES and gradient_cosine is not None:
        cosine = gradient_cosine.to(device).clone().fill_diagonal_(-1.0).nan_to_num(-1.0)
        value, neighbour = cosine.topk(min(top_k, n), dim=1)
        source = torch.arange(n, device=device).unsqueeze(1).expand_as(neighbour)
        keep = value > max(threshold, 0.0)
        edges.append(torch.stack([source[keep], neighbour[keep]]))
        weights.append(value[keep].clamp(max=1.0))
    edge_index, edge_weight = to_undirected(torch.cat(edges, 1), torch.cat(weights), num_nodes=n, reduce="max")
    return coalesce(edge_index, edge_weight, num_nodes=n, reduce="max", sort_by_row=False)


def shuffled(edge_index: Tensor, edge_weight: Tensor, num_nodes: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return the edges of the same graph with its nodes exchanged by a random permutation.

    The graph stays isomorphic to what it was, degrees and weights included, but every node has the neighbours of
    another one.

    Args:
        edge_index: (2, E) edges.
        edge_weight: (E,) their weights, which travel with them.
        num_nodes: Number of nodes N.
        seed: Seed of the permutation; one seed gives one permutation, whatever the edges.
    """
    order = torch.randperm(num_nodes, generator=torch.Generator().manual_seed(seed)).to(edge_index.device)
    return coalesce(order[edge_index], edge_weight, num_nodes=num_nodes)
