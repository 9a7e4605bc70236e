"""Convolutions on the heterogeneous adapter graph: one per relation, seen from outside as one layer."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import Any

import torch
import torch_geometric.nn as pyg_nn
from torch import Tensor, nn
from torch_geometric.data import Data, HeteroData
from torch_geometric.nn.models.basic_gnn import BasicGNN
from torch_geometric.typing import Metadata

from structlora_pyg.data.hetero import to_hetero_data
from structlora_pyg.nn.conv import edge_arguments, edge_information, first_line, make_conv, resolve_conv

BIPARTITE = "GraphConv, SAGEConv, GATv2Conv, TransformerConv, GINEConv"  # what a refusal names as a way out


class RelationalConv(nn.Module):
    """A layer with its own convolution for every edge type, on `to_hetero_data` of the graph it is given.

    Messages of several relations to a node are summed. There is a convolution for every type in `metadata` from the
    start, so the state does not change when edges do; a type without edges adds nothing (under ``to_hetero``, as PyG
    has it, the term of the node itself), and a node type that no edge reaches gets 0.

    Args:
        conv: Convolution, ready stack or module: class name in `torch_geometric.nn`, dotted path, class or instance.
            `HGTConv` and `HANConv` treat the types by themselves.
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
        conv: str | type[nn.Module] | nn.Module,
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
            raise ValueError(
                f"coordinator.hetero={kind} needs edges; choose other graph.edges, or coordinator.hetero=none"
            )
        example = Data(**{k: v for k, v in example.to_dict().items() if k not in ("edge_type", "role")})
        cls: Any = resolve_conv(conv) if isinstance(conv, str) else conv if isinstance(conv, type) else type(conv)
        self.name, self.stack = cls.__name__, issubclass(cls, BasicGNN)
        self._check_kind(cls)
        native = "metadata" in inspect.signature(cls.__init__).parameters
        copies = self.edge_types if kind == "hetero_conv" and not native else [None]
        arguments = {**conv_kwargs, "metadata": metadata} if native and not isinstance(conv, nn.Module) else conv_kwargs
        made = [make_conv(conv, channels, arguments, example, num_layers, act) for _ in copies]
        self.edge_information = edge_information(made[0], example)
        self.takes_x_0 = "x_0" in inspect.signature(made[0].forward).parameters
        if "add_self_loops" not in conv_kwargs:
            for key, module in zip(copies, made, strict=True):
                _drop_self_loops(module, [key] if key else self.edge_types)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of node types that no edge reaches
                if native:
                    self.net = made[0]
                elif kind == "to_hetero":
                    self.net = pyg_nn.to_hetero(made[0], metadata)
                else:
                    self.net = pyg_nn.HeteroConv(dict(zip(self.edge_types, made, strict=True)), aggr="sum")
                self.out_channels = self._try(example)
        except Exception as error:  # whatever a foreign layer raises becomes one clear message
            ways = f"Choose one that can ({BIPARTITE}; `structlora convs` lists them)" if kind == "hetero_conv" else (
                "Choose a stack that can (GraphSAGE, GIN, GAT, EdgeCNN)"
            )  # fmt: skip
            raise ValueError(
                f"{self.name} cannot run on (x_src, x_dst) of two node types, which coordinator.hetero={kind} asks for "
                f"({first_line(error)}). {ways}, edges within one role (graph.edges=depth_chain), or "
                "coordinator.hetero=none"
            ) from error

    def _check_kind(self, cls: Any) -> None:
        if "edge_type" in inspect.signature(cls.forward).parameters:
            raise ValueError(
                f"{self.name} tells relations apart by itself: use it with graph.edge_types=true and "
                f"coordinator.hetero=none, or choose {BIPARTITE} for coordinator.hetero={self.kind}"
            )
        if self.kind == "hetero_conv" and self.stack:
            raise ValueError(
                f"{self.name} is a stack of layers; set coordinator.hetero=to_hetero, or choose a convolution"
            )
        single = issubclass(cls, pyg_nn.MessagePassing) or cls.__module__.startswith(pyg_nn.conv.__name__)
        if self.kind == "to_hetero" and single:
            raise ValueError(
                f"coordinator.hetero=to_hetero turns whole models (GraphSAGE, GIN, GAT, EdgeCNN, or a module of your "
                f"own); {self.name} is a single convolution: set coordinator.hetero=hetero_conv"
            )

    def forward(self, x: Tensor, x_0: Tensor, data: Data) -> Tensor:
        """Return messages (N, out_channels) for features `x` (N, channels).

        Args:
            x: Input features.
            x_0: The features before the first layer, for convolutions that want them (``x_0``).
            data: The graph: ``edge_index``, ``role``, ``block``, and the edge information.

        Raises:
            ValueError: If the graph has an edge type that `metadata` did not name.
        """
        out = x.new_zeros(x.size(0), self.out_channels)
        given = edge_arguments(self.edge_information, data, x.dtype)
        present: set[Any] = set()
        if data.edge_index.size(1):
            graph = Data(x=x, edge_index=data.edge_index, role=data.role, block=data.block)
            for key, value in given.items():
                graph[key] = value
            if self.takes_x_0:
                graph.x_0 = x_0
            hetero = to_hetero_data(graph, self.node_types)
            present = set(hetero.edge_types)
            if unknown := present - set(self.edge_types):
                raise ValueError(f"no convolution for the edge type {min(unknown)}; pass GraphBuilder.metadata()")
            for key, message in self._run(hetero).items():
                if message is not None:
                    out = out.index_copy(0, hetero[key].n_id, message)
        if self.training and len(present) < len(self.edge_types):
            # Every parameter takes part in every step, also those of learned edge weights, or data-parallel training
            # would wait for its gradient.
            idle = [nn.utils.parameters_to_vector(self.net.parameters()), *given.values()]
            out = out + 0.0 * sum(value.sum() for value in idle)
        return out

    def _run(self, hetero: HeteroData) -> dict[str, Tensor | None]:
        if self.kind == "to_hetero":  # its graph was traced with every type
            for key in self.edge_types:
                if key not in hetero.edge_types:
                    like = hetero[hetero.edge_types[0]]
                    for name in ("edge_index", *self.edge_information):
                        hetero[key][name] = like[name][:, :0] if name == "edge_index" else like[name][:0]
        names = (*self.edge_information, "x_0") if self.takes_x_0 else self.edge_information
        suffix = "_dict" if isinstance(self.net, pyg_nn.HeteroConv) else ""
        return self.net(
            hetero.x_dict, hetero.edge_index_dict, **{f"{name}{suffix}": hetero.collect(name) for name in names}
        )

    @torch.no_grad()
    def _try(self, example: Data) -> int:
        """Run on a small graph with every type, its node types of different size, and return the output's width."""
        hetero, width = HeteroData(), max(self.channels, 1)
        for i, name in enumerate(self.node_types):
            hetero[name].x = torch.linspace(-1, 1, (i + 2) * width).view(-1, width)
            if self.takes_x_0:
                hetero[name].x_0 = hetero[name].x
        for key in self.edge_types:
            hetero[key].edge_index = torch.tensor([[0, 1], [1, 0]])
            for name, value in edge_arguments(self.edge_information, example, torch.float32).items():
                hetero[key][name] = value.new_full((2, *value.shape[1:]), 0.5)
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


def _drop_self_loops(module: nn.Module, edge_types: Any) -> None:
    """Switch self-loops off where the two ends are of different types, between which there are none."""
    if any(source != target for source, _, target in edge_types):
        for part in module.modules():
            if vars(part).get("add_self_loops"):
                vars(part)["add_self_loops"] = False
