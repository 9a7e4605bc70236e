"""The adapter graph as a heterogeneous one: node types are roles, edge types say what joins two roles."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor
from torch_geometric.data import Data, HeteroData
from torch_geometric.typing import EdgeType

EDGE_TYPES = ("same_role", "same_block", "other", "virtual")
VIRTUAL = "virtual"  # the node type of virtual nodes


def to_hetero_data(graph: Data, node_types: Sequence[str]) -> HeteroData:
    """Return an adapter graph as `torch_geometric.data.HeteroData`.

    A node type for every role, an edge type ``(role, relation, role)`` for every kind of edge that is there, with the
    relations ``same_role``, ``same_block``, ``other`` and ``virtual`` (to or from a virtual node). Every attribute of
    a node or an edge goes with it. ``n_id`` and ``e_id`` hold the positions in `graph`.

    Args:
        graph: A graph of `GraphBuilder` or `StructLoraModel.adapter_graph`, with ``role`` (N,) and ``block`` (N,).
        node_types: Names of the roles, ``GraphBuilder.node_types``.

    Raises:
        ValueError: If a role has no name.
    """
    names = _with_virtual(node_types)
    if graph.num_nodes and int(graph.role.max()) >= len(names) - 1:
        raise ValueError(
            f"the graph has {int(graph.role.max()) + 1} roles, but {len(names) - 1} node types were named; pass "
            "model.graph_pass.graph.node_types"
        )
    edge_type, edge_types = type_edges(graph.edge_index, graph.role, graph.block, names)
    present = names if bool((graph.role < 0).any()) else names[:-1]
    plain = Data(**{k: v for k, v in graph.to_dict().items() if k not in ("name", "edge_type")})
    # Without any edge, one empty type carries the attributes that edges would have.
    hetero = plain.to_heterogeneous(
        graph.role.remainder(len(names)), edge_type, present, edge_types or [(names[0], EDGE_TYPES[0], names[0])]
    )
    for i, name in enumerate(present):
        hetero[name].n_id = (graph.role.remainder(len(names)) == i).nonzero().flatten()
        if "name" in graph:
            hetero[name].name = [graph.name[k] for k in hetero[name].n_id.tolist()]
        if "node_type" in graph:
            hetero[name].node_type = graph.node_type[hetero[name].n_id]
    for i, key in enumerate(hetero.edge_types):
        hetero[key].e_id = (edge_type == i).nonzero().flatten()
        if "edge_type" in graph:
            hetero[key].edge_type = graph.edge_type[hetero[key].e_id]
    return hetero


def edge_relation(edge_index: Tensor, role: Tensor, block: Tensor) -> Tensor:
    """Return what joins the ends of every edge, (E,): an index into ``EDGE_TYPES``."""
    i, j = edge_index
    kind = torch.where(role[i] == role[j], 0, torch.where(block[i] == block[j], 1, 2))
    return torch.where((role[i] < 0) | (role[j] < 0), 3, kind)


def type_edges(
    edge_index: Tensor, role: Tensor, block: Tensor, node_types: Sequence[str]
) -> tuple[Tensor, list[EdgeType]]:
    """Return per edge the index of its type, and the types that occur, in the order of roles and relations.

    Args:
        edge_index: (2, E).
        role: (N,) role index; -1: a virtual node.
        block: (N,) block index.
        node_types: Names of the roles.
    """
    names = _with_virtual(node_types)
    source, target = role.remainder(len(names))[edge_index]
    code = (source * len(EDGE_TYPES) + edge_relation(edge_index, role, block)) * len(names) + target
    codes, edge_type = code.unique(return_inverse=True)
    found = []
    for c in codes.tolist():
        rest, target_type = divmod(c, len(names))
        source_type, relation = divmod(rest, len(EDGE_TYPES))
        found.append((names[source_type], EDGE_TYPES[relation], names[target_type]))
    return edge_type, found


def _with_virtual(node_types: Sequence[str]) -> list[str]:
    """Return the node types with that of virtual nodes at the end, where the role -1 finds it."""
    return [*(name for name in node_types if name != VIRTUAL), VIRTUAL]


def node_type_names(roles: Sequence[str]) -> list[str]:
    """Return a short identifier per role: as many of the last parts of its name as tell the roles apart.

    PyG builds the names of parameters from types, so they consist of letters, digits and single underscores.

    >>> node_type_names(["model.layers.*.self_attn.q_proj", "model.layers.*.mlp.up_proj"])
    ['q_proj', 'up_proj']
    """
    parts = [[p.strip("_") for p in re.split(r"\W+", role) if p.strip("_")] or ["layer"] for role in roles]
    for count in range(1, max(map(len, parts)) + 1):
        names = [re.sub("_+", "_", "_".join(p[-count:])) for p in parts]
        if len({*names, VIRTUAL}) > len(roles) and all(name.isidentifier() for name in names):
            return names
    return [f"{name if name.isidentifier() else 'layer'}_{i}" for i, name in enumerate(names)]
