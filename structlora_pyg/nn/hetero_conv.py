"""Convolutions on the heterogeneous adapter graph: one per relation, seen from outside as one layer."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
import torch_geometric.nn as pyg_nn
from torch import Tensor, nn
from torch_geometric.data import Data, HeteroData
from torch_geometric.typing import EdgeType, Metadata

from structlora_pyg.checks import asks, first_line
from structlora_pyg.data.hetero import to_hetero_data
from structlora_pyg.nn.conv import (
    EDGE_INFORMATION,
    arguments_of,
    edge_information,
    forward_arguments,
    is_stack,
    make_conv,
    resolve_conv,
)

BIPARTITE = "GraphConv, SAGEConv, GATv2Conv, TransformerConv, GINEConv"  # what a refusal names as a way out
OF_THE_WHOLE = ("edge_index", "adj_t", "batch", "data", "node_type")  # what has no meaning for a single relation


class RelationalConv(nn.Module):
    """A layer with its own convolution for every edge type, on `to_hetero_data` of the graph it is given.

    Messages of several relations to a node are summed. There is a convolution for every type in `metadata` from the
    start, so the state does not change when edges do; a type without edges adds nothing (under ``to_hetero``, as PyG
    has it, the term of the node itself), and a node type that no edge reaches gets 0.

    Args:
        conv: Convolution, ready stack or module: name, dotted path, class or instance, see `make_conv`. `HGTConv`,
            `HANConv` and an instance of `HeteroConv` treat the types by themselves. A mapping of relations
            (``same_role``) or edge types to these gives each its own.
        channels: Width of the features.
        metadata: Node types and edge types that may occur, `GraphBuilder.metadata`.
        kind: ``hetero_conv``: `torch_geometric.nn.HeteroConv` of convolutions. ``to_hetero``: a ready stack or a
            module of one's own, turned by `torch_geometric.nn.to_hetero`.
        conv_kwargs: Keyword arguments of the convolution.
        example: A graph with the edge information that will be there.
        num_layers: Layers of a ready stack.
        act: Activation inside a ready stack.

    Attributes:
        edge_information: What the convolutions use of ``edge_weight``, ``edge_attr``.
        out_channels: Width of the output.
        stack: Whether it is a ready stack, with layers of its own.

    Raises:
        ValueError: A convolution that cannot pass messages between two node types; one `kind` cannot hold.
    """

    def __init__(
        self,
        conv: Any,
        channels: int,
        metadata: Metadata,
        kind: str,
        conv_kwargs: Mapping[str, Any],
        example: Data,
        num_layers: int = 1,
        act: str = "tanh",
    ) -> None:
        super().__init__()
        self.node_types, self.edge_types = metadata
        self.kind, self.channels = kind, channels
        if not self.edge_types:
            raise ValueError(f"hetero={kind} needs edges; choose others, or hetero=none")
        example = Data(**{k: v for k, v in example.to_dict().items() if k != "edge_type"})
        options = (channels, conv_kwargs, example, num_layers, act)
        several = isinstance(conv, Mapping)
        cls = resolve_conv(conv) if isinstance(conv, str) else type(conv) if isinstance(conv, nn.Module) else conv
        self.name, self.stack = "HeteroConv" if several else getattr(cls, "__name__", str(cls)), is_stack(cls)
        typed = isinstance(conv, pyg_nn.HeteroConv) or (not several and "metadata" in asks(cls))
        if not several:
            self._check_kind(cls)
        if several:
            made = [make_conv(_of_relation(conv, key), *options) for key in self.edge_types]
        elif kind == "to_hetero" or typed:
            made = [make_conv(conv, *options, metadata=metadata)]
        else:
            made = [make_conv(conv, *options) for _ in self.edge_types]
        inner: list[Any] = list(conv.convs.values()) if isinstance(conv, pyg_nn.HeteroConv) else made
        used = {name for part in inner for name in edge_information(part, example)}
        self.edge_information = tuple(name for name in EDGE_INFORMATION if name in used)
        self.names = list(dict.fromkeys(n for part in inner for n in forward_arguments(part, example)))
        self.names = [name for name in self.names if name not in OF_THE_WHOLE]
        if "add_self_loops" not in conv_kwargs:
            for i, module in enumerate(made):
                _drop_self_loops(module, self.edge_types if len(made) == 1 else [self.edge_types[i]])
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of node types that no edge reaches
                if typed:
                    self.net = made[0]
                elif kind == "to_hetero":
                    self.net = pyg_nn.to_hetero(made[0], metadata)
                else:
                    made = [_Takes(m, forward_arguments(m, example)) for m in made] if several else made
                    self.net = pyg_nn.HeteroConv(dict(zip(self.edge_types, made, strict=True)), aggr="sum")
                self.out_channels = self._try(example)
        except Exception as error:  # whatever a foreign layer raises becomes one clear message
            ways = f"Choose one that can ({BIPARTITE}; `structlora convs` lists them)" if kind == "hetero_conv" else (
                "Choose a stack that can (GraphSAGE, GIN, GAT, EdgeCNN)"
            )  # fmt: skip
            raise ValueError(
                f"{self.name} cannot run on (x_src, x_dst) of two node types, which hetero={kind} asks for "
                f"({first_line(error)}). {ways}, edges within one role (edges=depth_chain), or hetero=none"
            ) from error

    def _check_kind(self, cls: Any) -> None:
        if "edge_type" in asks(getattr(cls, "forward", cls)):
            raise ValueError(
                f"{self.name} tells relations apart by itself: use it with edge_types=true and hetero=none, or choose "
                f"{BIPARTITE} for hetero={self.kind}"
            )
        if self.kind == "hetero_conv" and self.stack:
            raise ValueError(f"{self.name} is a stack of layers; set hetero=to_hetero, or choose a convolution")
        single = isinstance(cls, type) and (
            issubclass(cls, pyg_nn.MessagePassing) or cls.__module__.startswith(pyg_nn.conv.__name__)
        )
        if self.kind == "to_hetero" and single:
            raise ValueError(
                f"hetero=to_hetero turns whole models (GraphSAGE, GIN, GAT, EdgeCNN, or a module of your own); "
                f"{self.name} is a single convolution: set hetero=hetero_conv"
            )

    def forward(self, x: Tensor, edge_index: Tensor, data: Data, x_0: Tensor | None = None) -> Tensor:
        """Return messages (N, out_channels) for features `x` (N, channels).

        Args:
            x: Input features.
            edge_index: (2, E) edges.
            data: The graph: ``role``, ``block``, and what the convolutions ask for by name.
            x_0: The features before the first layer, for convolutions that want them.

        Raises:
            ValueError: If the graph has an edge type that `metadata` did not name.
        """
        out = x.new_zeros(x.size(0), self.out_channels)
        graph = {**data.to_dict(), "x": x, "x_0": x_0}
        given = arguments_of(graph, self.names)
        present: set[Any] = set()
        if edge_index.size(1):
            plain = Data(x=x, edge_index=edge_index, **{"role": data.role, "block": data.block, **given})
            hetero = to_hetero_data(plain, self.node_types)
            present = set(hetero.edge_types)
            if unknown := present - set(self.edge_types):
                raise ValueError(f"no convolution for the edge type {min(unknown)}; pass GraphBuilder.metadata()")
            for key, message in self._run(hetero).items():
                if message is not None:
                    out = out.index_copy(0, hetero[key].n_id, message)
        if self.training and len(present) < len(self.edge_types):
            # Every parameter takes part in every step, also those of learned edge weights, or data-parallel training
            # would wait for its gradient.
            floats = [value for value in given.values() if value.is_floating_point()]
            idle = [nn.utils.parameters_to_vector(self.net.parameters()), *floats]
            out = out + 0.0 * sum(value.sum() for value in idle)
        return out

    def _run(self, hetero: HeteroData) -> dict[str, Tensor | None]:
        if self.kind == "to_hetero":  # its graph was traced with every type
            for key in self.edge_types:
                if key not in hetero.edge_types:
                    like = hetero[hetero.edge_types[0]]
                    for name in ("edge_index", *self.edge_information):
                        hetero[key][name] = like[name][:, :0] if name == "edge_index" else like[name][:0]
        suffix = "_dict" if isinstance(self.net, pyg_nn.HeteroConv) else ""
        there = [name for name in self.names if any(name in store for store in hetero.stores)]
        given = {f"{name}{suffix}": hetero.collect(name) for name in there}
        return self.net(hetero.x_dict, hetero.edge_index_dict, **given)

    @torch.no_grad()
    def _try(self, example: Data) -> int:
        """Run on a small graph with every type, its node types of different size, and return the output's width."""
        hetero = HeteroData()
        given = arguments_of({**example.to_dict(), "x_0": example.x.new_zeros(1, self.channels)}, self.names)
        for i, name in enumerate(self.node_types):
            hetero[name].x = torch.linspace(-1, 1, (i + 2) * self.channels).view(-1, self.channels)
        for key in self.edge_types:
            hetero[key].edge_index = torch.tensor([[0, 1], [1, 0]])
        for name, value in given.items():
            value = value.float() if value.is_floating_point() else value
            of_edges = name.startswith("edge")
            for store in hetero.edge_stores if of_edges else hetero.node_stores:
                store[name] = value.new_full((2 if of_edges else store.num_nodes, *value.shape[1:]), 0.5)
        self.net.eval()  # a trial leaves no trace in running statistics
        with torch.random.fork_rng(devices=[]):
            out = {key: value for key, value in self._run(hetero).items() if value is not None}
        self.net.train()
        for key, value in out.items():
            if not isinstance(value, Tensor) or value.dim() != 2 or value.size(0) != hetero[key].num_nodes:
                raise ValueError("it does not return one feature vector per node")
            if not torch.isfinite(value).all():
                raise ValueError("it does not return finite features")
        return next(iter(out.values())).size(1)

    def extra_repr(self) -> str:
        """Count the types."""
        return f"{self.name}, kind={self.kind}, node_types={len(self.node_types)}, edge_types={len(self.edge_types)}"


class _Takes(nn.Module):
    """A convolution among others of `HeteroConv`, which hands all of them all arguments."""

    def __init__(self, conv: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.conv, self.names = conv, names

    def forward(self, x: Any, edge_index: Tensor, **given: Any) -> Tensor:
        return self.conv(x, edge_index, **{name: value for name, value in given.items() if name in self.names})


def _of_relation(convs: Mapping[Any, Any], key: EdgeType) -> Any:
    """Return what a mapping has for an edge type, by the whole type or the relation in its middle."""
    for name in (key, "__".join(key), key[1]):
        if name in convs:
            return convs[name]
    raise ValueError(f"conv has nothing for the edge type {key}; name it, or its relation {key[1]!r}")


def _drop_self_loops(module: nn.Module, edge_types: Any) -> None:
    """Switch self-loops off where the two ends are of different types, between which there are none."""
    if any(source != target for source, _, target in edge_types):
        for part in module.modules():
            if vars(part).get("add_self_loops"):
                vars(part)["add_self_loops"] = False
