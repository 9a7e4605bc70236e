"""The adapter graph: which adapters are nodes, which nodes are joined, as a `torch_geometric.data.Data`.

Attributes of the graph, with N nodes, D directions per node (rank, times adapters per node), E directed edges:

==============  =================  ====================================================================
x               (N, F)             code of the update; after the filter: of the filtered update
code_A, code_B  (N, D, p)          codes of the directions, see `structlora_pyg.data.encoding`
scaling         (N, D)             lora_alpha / r of a direction; 0 where a node has fewer than D
edge_index      (2, E)             messages go from row 0 to row 1; symmetric, sorted by destination
edge_weight     (E,)               in [0, 1] (transforms may exceed it); only where some edge is not 1
edge_attr       (E, 4)             with ``edge_features``: weight, distance in depth in [0, 1], same role, same block
edge_type       (E,)               with ``edge_types``: 0 same role, 1 same block, 2 other, 3 to or from a virtual node
pe              (N, k)             features that transforms append to x, if any; others keep the transform's name for
                                   them (``random_walk_pe``, ``laplacian_eigenvector_pe``)
depth           (N,)               position among the nodes of the same role
role            (N,)               index into `GraphBuilder.role_names`; -1: a virtual node
node_type       (N,)               index into `GraphBuilder.node_types`: the role; virtual nodes have the last type
block           (N,)               index of the block (transformer layer); -1: a virtual node
gate            (N, D)             set by the filter, in [0, 1]
kl              (1,)               set by the filter: mean divergence of the gates from their prior
message         (N, F)             set by the coordinator: what it added to x
==============  =================  ====================================================================
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch_geometric.data import Data
from torch_geometric.typing import EdgeType
from torch_geometric.utils import sort_edge_index

from structlora_pyg.checks import import_path
from structlora_pyg.data.adapters import AdapterSet
from structlora_pyg.data.edges import GRADIENT_EDGES, build_edges, shuffled
from structlora_pyg.data.encoding import Encoding, update_code
from structlora_pyg.data.hetero import EDGE_TYPES, VIRTUAL, edge_relation, node_type_names, type_edges
from structlora_pyg.data.stored import StoredAdapters
from structlora_pyg.data.transforms import StructureTransforms


class GraphBuilder(nn.Module):
    """Turns the current factors of an `AdapterSet` into a `Data`.

    Args:
        adapters: The adapters.
        encoding: Code space of the node features.
        edges: An edge set of `build_edges`, or a function of your own, itself or by dotted path. It gets a `Data` with
            ``num_nodes``, ``depth``, ``role``, ``node_type``, ``block`` and ``name``, and returns ``edge_index`` (2, E)
            or that and ``edge_weight`` (E,).
        seed: Seed of ``random`` edges and of transforms.
        transforms: Transforms of the structure.

    The other arguments are those of `structlora_pyg.data.GraphConfig`.
    """

    scaling: Tensor
    depth: Tensor
    role: Tensor
    block: Tensor
    node_type: Tensor
    edge_index: Tensor
    edge_weight: Tensor
    edge_attr: Tensor
    edge_type: Tensor

    def __init__(
        self,
        adapters: AdapterSet,
        encoding: Encoding,
        node: str = "adapter",
        edges: str | Callable = "hybrid",
        top_k: int = 3,
        threshold: float = 0.05,
        seed: int = 0,
        edge_features: bool = False,
        edge_types: bool = False,
        transforms: StructureTransforms | None = None,
        shuffle_nodes: bool = False,
    ) -> None:
        super().__init__()
        self.shuffle_nodes = shuffle_nodes
        self.edge_features, self.edge_types, self.transforms = edge_features, edge_types, transforms
        self.adapters, self.encoding = adapters, encoding
        self.node, self.top_k, self.threshold, self.seed = node, top_k, threshold, seed
        own = import_path(edges) if isinstance(edges, str) and "." in edges else edges
        self.edges = own if isinstance(own, str) else getattr(own, "__name__", repr(own))
        self._own_edges: Any = None if isinstance(own, str) else own
        if node == "adapter":
            names = [a.name for a in adapters]
            places = [(i, 0) for i in range(len(adapters))]
            self.role_names, roles = adapters.roles, [adapters.roles.index(a.role) for a in adapters]
            depths = [a.depth for a in adapters]
            blocks = [adapters.blocks.index(a.block) for a in adapters]
        else:
            slot_names = list(dict.fromkeys(a.name.removeprefix(a.block) for a in adapters))
            names = adapters.blocks
            places = [(names.index(a.block), slot_names.index(a.name.removeprefix(a.block))) for a in adapters]
            stacks = ["".join("*" if c.isdigit() else c for c in name) for name in names]
            self.role_names = list(dict.fromkeys(stacks))
            roles = [self.role_names.index(s) for s in stacks]
            depths = [stacks[:i].count(s) for i, s in enumerate(stacks)]
            blocks = list(range(len(names)))
        self.num_adapter_nodes = len(names)
        virtual = 0 if transforms is None else transforms.virtual_nodes
        names = [*names, *(f"virtual {i}" for i in range(virtual))]
        roles, depths, blocks = roles + [-1] * virtual, depths + [0] * virtual, blocks + [-1] * virtual
        self.node_names = names
        self.slots = 1 + max(slot for _, slot in places)
        self.rank = max(a.r for a in adapters)
        self.num_nodes = len(names)
        self.num_features = self.slots * encoding.in_size * encoding.out_size
        # Direction k of adapter i sits at row `first_row[i] + k` of the (N * D)-row tables of all directions.
        self.first_row = [(n * self.slots + s) * self.rank for n, s in places]
        self.places = places
        scaling = torch.zeros(self.num_nodes * self.slots * self.rank)
        for start, a in zip(self.first_row, adapters, strict=True):
            scaling[start : start + a.r] = a.scaling
        self._constant("scaling", scaling.view(self.num_nodes, -1))
        self._constant("depth", torch.tensor(depths))
        self._constant("role", torch.tensor(roles))
        self._constant("block", torch.tensor(blocks))
        self.node_types = node_type_names(self.role_names) + [VIRTUAL] * (virtual > 0)
        self._constant("node_type", self.role.remainder(len(self.role_names) + 1))
        for k, group in enumerate(adapters.groups):
            r = adapters[group[0]].r
            rows = torch.tensor([[self.first_row[i] + j for j in range(r)] for i in group])
            self._constant(f"rows_{k}", rows)
            self._constant(f"slots_{k}", torch.tensor([places[i][0] * self.slots + places[i][1] for i in group]))
        self.set_edges(None)

    @classmethod
    def from_model(
        cls,
        model: nn.Module | str | Path,
        adapter_name: str | None = None,
        encoding: Encoding | None = None,
        **options: Any,
    ) -> GraphBuilder:
        """Return the builder of the adapter graph of any PEFT LoRA; calling it gives the graph as the factors are now.

        The graph is differentiable in the factors; under `torch.no_grad` it is data alone, as explainers need it.

        >>> graph = GraphBuilder.from_model("runs/x/adapter")()  # doctest: +SKIP

        Args:
            model: A `peft.PeftModel`, a module that PEFT has put adapters into, or a folder that PEFT wrote.
            adapter_name: Which of the model's adapters; default: the active one.
            encoding: Code space; default: a sketch of 16 x 16.
            **options: Other arguments of the class; ``edges`` is ``depth_chain`` unless given.

        Raises:
            FileNotFoundError: If the folder lacks a file.
            ValueError: If there is no adapter, or one that is not a LoRA of linear layers.
        """
        adapters: AdapterSet
        if isinstance(model, nn.Module):
            base = model.get_base_model() if isinstance(model, PeftModel) else model
            layers = (m for m in base.modules() if isinstance(m, LoraLayer))
            name = adapter_name or next((m.active_adapters[0] for m in layers), "default")
            adapters = AdapterSet(base, name)
        else:
            adapters = StoredAdapters(model)
        encoding = encoding or Encoding([a.in_features for a in adapters], [a.out_features for a in adapters])
        made = cls(adapters, encoding, **{"edges": "depth_chain", **options})
        return made.to(adapters.pair(adapters[0])[0].device)

    def metadata(self) -> tuple[list[str], list[EdgeType]]:
        """Return node types and edge types, as `HeteroData.metadata` does: all that may occur while edges change."""
        edge_index = self.edge_index
        if self.edges in GRADIENT_EDGES:
            edge_index = torch.cartesian_prod(*2 * [torch.arange(self.num_nodes, device=self.role.device)]).T
        return self.node_types, type_edges(edge_index, self.role, self.block, self.node_types)[1]

    def _constant(self, name: str, value: Tensor) -> None:
        self.register_buffer(name, value, persistent=False)

    def set_edges(self, gradient_cosine: Tensor | None) -> None:
        """Rebuild the edges, with gradient edges where the cosines (N, N) of the nodes' gradients are known."""
        n = self.num_adapter_nodes
        cosine = None if gradient_cosine is None else gradient_cosine[:n, :n]
        nodes = self.depth[:n], self.role[:n], self.block[:n]
        if self._own_edges is None:
            edge_index, edge_weight = build_edges(self.edges, *nodes, cosine, self.top_k, self.threshold, self.seed)
            self.weighted = self.edges in (*GRADIENT_EDGES, "learned")
        else:
            edge_index, edge_weight = self._ask_for_edges(*nodes)
        if self.shuffle_nodes:
            edge_index, edge_weight = shuffled(edge_index, edge_weight, n, self.seed)
        self.features: list[str] = []
        if self.transforms is not None:
            self.weighted = True
            edge_index, edge_weight, found = self.transforms(edge_index, edge_weight, n)
            self.features = list(found)
            for name, value in found.items():
                self._constant(f"feature_{name}", value)
        edge_index, edge_weight = sort_edge_index(edge_index, edge_weight, self.num_nodes, sort_by_row=False)
        i, j = edge_index
        same_role, same_block = self.role[i] == self.role[j], self.block[i] == self.block[j]
        distance = (self.depth[i] - self.depth[j]).abs() / max(int(self.depth.max()), 1)
        self._constant("edge_index", edge_index)
        self._constant("edge_weight", edge_weight)
        self._constant("edge_attr", torch.stack([edge_weight, distance, same_role.float(), same_block.float()], dim=1))
        self._constant("edge_type", edge_relation(edge_index, self.role, self.block))

    def _ask_for_edges(self, depth: Tensor, role: Tensor, block: Tensor) -> tuple[Tensor, Tensor]:
        """Return the edges and weights of a function of the user's."""
        n = self.num_adapter_nodes
        nodes = Data(num_nodes=n, depth=depth, role=role, node_type=role, block=block, name=self.node_names[:n])
        found = self._own_edges(nodes)
        self.weighted = isinstance(found, tuple)
        edge_index, edge_weight = found if self.weighted else (found, None)
        good = isinstance(edge_index, Tensor) and edge_index.dim() == 2 and len(edge_index) == 2
        if not good or (edge_index.numel() and not 0 <= int(edge_index.min()) <= int(edge_index.max()) < n):
            raise ValueError(
                f"edges={self.edges} must return edge_index (2, E) with nodes 0 to {n - 1}, or a pair of it and "
                f"edge_weight (E,); got {found!r}"
            )
        edge_index = edge_index.to(depth.device, torch.long)
        ones = torch.ones(edge_index.size(1), device=depth.device)
        return edge_index, ones if edge_weight is None else edge_weight.to(ones)

    def forward(self, factors: list[tuple[list[int], Tensor, Tensor]] | None = None) -> Data:
        """Return the graph of stacked factors, see `AdapterSet.factors`; default: those of the adapters."""
        factors = list(self.adapters.factors(self.scaling.device)) if factors is None else factors
        codes = [self.encoding.directions(A, B) for _, A, B in factors]
        rows = torch.cat([self.get_buffer(f"rows_{k}").flatten() for k in range(len(codes))])
        code_A, code_B = (torch.cat([c[side].flatten(0, 1) for c in codes]) for side in (0, 1))
        return self.data(self._place(code_A, rows), self._place(code_B, rows))

    def data(self, code_A: Tensor, code_B: Tensor) -> Data:
        """Return the graph with the given direction codes (N, D, p_in) and (N, D, p_out)."""
        graph = Data(
            x=update_code(code_A, code_B, self.scaling, self.slots),
            edge_index=self.edge_index,
            code_A=code_A,
            code_B=code_B,
            scaling=self.scaling,
            depth=self.depth,
            role=self.role,
            node_type=self.node_type,
            block=self.block,
        )
        if self.weighted:
            graph.edge_weight = self.edge_weight
        if self.edge_features:
            graph.edge_attr = self.edge_attr
        if self.edge_types:
            graph.edge_type = self.edge_type
        for name in self.features:
            graph[name] = self.get_buffer(f"feature_{name}")
        return graph

    def example(self) -> Data:
        """Return the graph with all codes 0: what a coordinator has to expect, before anything was trained."""
        code_A, code_B = (
            self.scaling.new_zeros(*self.scaling.shape, size)
            for size in (self.encoding.in_size, self.encoding.out_size)
        )
        graph = self.data(code_A, code_B)
        if self.edge_types:  # refreshed edges may be of types that the first ones are not
            graph.num_relations = len(EDGE_TYPES) if self.num_nodes > self.num_adapter_nodes else len(EDGE_TYPES) - 1
        return graph

    def _place(self, code: Tensor, rows: Tensor) -> Tensor:
        table = code.new_zeros(self.scaling.numel(), code.size(-1))
        return table.index_copy(0, rows, code).view(self.num_nodes, -1, code.size(-1))

    def of_group(self, k: int, per_direction: Tensor) -> Tensor:
        """Return what group `k` of adapters owns of a per-direction table (N, D, ...): (n, r, ...)."""
        return per_direction.reshape(-1, *per_direction.shape[2:])[self.get_buffer(f"rows_{k}")]

    def code_of_group(self, k: int, per_node: Tensor) -> Tensor:
        """Return what group `k` owns of a table of node codes (N, F): (n, p_out, p_in)."""
        table = per_node.view(-1, self.encoding.out_size, self.encoding.in_size)
        return table[self.get_buffer(f"slots_{k}")]

    def node_gradients(self, sketches: Tensor) -> Tensor:
        """Put gradient sketches of the adapters (n, S) side by side per node: (N, slots * S)."""
        table = sketches.new_zeros(self.num_nodes * self.slots, sketches.size(1))
        rows = torch.tensor([n * self.slots + s for n, s in self.places], device=sketches.device)
        return table.index_copy(0, rows, sketches).view(self.num_nodes, -1)
