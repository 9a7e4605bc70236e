"""Convolutions of PyTorch Geometric as building blocks: found by name, built and run with what they ask for by name.

Nothing here knows single classes beyond the few shapes that a signature cannot tell. A convolution is given what its
constructor and its forward ask for by name, and is run once on an example graph before it is accepted.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch_geometric.nn as pyg_nn
from torch import Tensor, nn
from torch_geometric.data import Data
from torch_geometric.nn.models.basic_gnn import BasicGNN
from torch_geometric.resolver import normalize_string
from torch_geometric.utils import degree, to_torch_csr_tensor

from structlora_pyg.checks import asks, construct, first_line, import_path, nearest

CONVOLUTIONS = tuple(name for name in pyg_nn.conv.__all__ if name.endswith("Conv"))
MODELS = ("GCN", "GraphSAGE", "GIN", "GAT", "PNA", "EdgeCNN")  # stacks that PyG keeps ready
EDGE_INFORMATION = ("edge_weight", "edge_attr", "edge_type")
BATCH_NORMS = (nn.modules.batchnorm._BatchNorm, pyg_nn.BatchNorm)


def example_graph(channels: int = 16, weighted: bool = False, relations: int = 0, edge_dim: int = 0) -> Data:
    """Return a path of four nodes with the attributes a coordinator will see, to build and try convolutions on."""
    edge_index = torch.tensor([[1, 0, 2, 1, 3, 2], [0, 1, 1, 2, 2, 3]])  # sorted by destination, as adapter graphs are
    data = Data(x=torch.linspace(-1, 1, 4 * channels).view(4, channels), edge_index=edge_index)
    if weighted:
        data.edge_weight = torch.linspace(0.4, 1.0, 6)
    if relations:
        data.edge_type = torch.arange(6) % relations
        data.num_relations = relations
    if edge_dim:
        data.edge_attr = torch.linspace(0.4, 1.0, 6).view(6, 1).repeat(1, edge_dim)
    return data


def make_conv(
    conv: Any,
    channels: int,
    kwargs: Mapping[str, Any],
    example: Data,
    num_layers: int = 1,
    act: str = "tanh",
    **known: Any,
) -> nn.Module:
    """Return a convolution (or one of PyG's ready stacks) that maps `channels` features to features.

    Args:
        conv: Class name in `torch_geometric.nn` or in GraphGym's registry of layers, dotted path, class or other
            callable that returns a module, or instance (which is copied).
        channels: Width of input, hidden and output features.
        kwargs: Keyword arguments that win over those derived from the signature. ``nn`` and ``conv`` may be written:
            widths of hidden layers (``nn=[64, 64]``), name of the convolution inside.
        example: A graph with the edge information that will be there.
        num_layers: Layers of a ready stack; a convolution is one layer.
        act: Activation inside a ready stack.
        **known: More values of constructor arguments by name.

    Raises:
        ValueError: Unknown name; arguments that cannot be derived; keyword arguments for an instance.
    """
    if isinstance(conv, nn.Module):
        if kwargs:
            raise ValueError("conv_kwargs has no effect on an instance; build it with them instead")
        if any(isinstance(part, BATCH_NORMS) for part in conv.modules()):
            warnings.warn(
                f"{type(conv).__name__} normalises by batch statistics: over a handful of nodes these are another "
                "function in evaluation than in training; LayerNorm or no norm is not",
                stacklevel=2,
            )
        return _along_edges(copy.deepcopy(conv))
    cls: Any = resolve_conv(conv) if isinstance(conv, str) else conv
    asked, edge_dim = asks(cls), edge_channels(example)
    if is_stack(cls):  # what it hands on to its convolutions is not in its signature
        known |= {"hidden_channels": channels, "num_layers": num_layers, "act": act}
        asked |= {"edge_dim": False} if cls.supports_edge_attr and edge_dim else {}
        asked |= dict.fromkeys(("aggregators", "scalers", "deg"), False) if cls is pyg_nn.PNA else {}
    known = _known_arguments(cls, asked, channels, example) | known
    given = {name: _written(cls, name, value, channels, example) for name, value in kwargs.items()}
    if asked.get("metadata") and "metadata" not in known:
        raise ValueError(f"{cls.__name__} runs on node types and edge types; set hetero=hetero_conv")
    return _along_edges(construct(cls, known, given, asked, "conv_kwargs"))


def is_stack(cls: Any) -> bool:
    """Tell whether a class is one of PyG's stacks of convolutions."""
    return isinstance(cls, type) and issubclass(cls, BasicGNN)


class DataConv(nn.Module):
    """A module ``Data -> Data`` (or ``Data -> Tensor``), such as GraphGym's layers, as a convolution.

    Args:
        module: It gets the graph with the current features as ``x``.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor, edge_index: Tensor, data: Data) -> Tensor:
        """Return what the module makes of features `x` (N, channels)."""
        graph = copy.copy(data)
        graph.x, graph.edge_index = x, edge_index
        out = self.module(graph)
        return out.x if isinstance(out, Data) else out


def _along_edges(conv: nn.Module) -> nn.Module:
    """Wrap a module whose forward takes a graph."""
    asked = list(asks(conv.forward))
    takes_graph = asked[:1] in (["data"], ["batch"], ["graph"]) and "edge_index" not in asked
    return DataConv(conv) if takes_graph else conv


def forward_arguments(conv: nn.Module, example: Data) -> tuple[str, ...]:
    """Return the keyword arguments that the forward of a convolution is given on graphs like `example`.

    Whatever the graph carries can be asked for by name: ``edge_index`` or ``adj_t``, ``edge_weight``, ``edge_attr``,
    ``batch``, ``depth``, ``role``, ``node_type``, ``block``, ``gate``, ``pe``; ``x_0`` are the features before the
    first convolution, ``data`` is the graph itself.
    """
    used = _takes(conv)
    if isinstance(conv, pyg_nn.GPSConv):  # it hands keyword arguments on to the convolution inside
        return ("edge_index", "batch", *used)
    there = {"edge_index", "adj_t", "batch", "x_0", "data", *example.keys()} - {"x", *EDGE_INFORMATION}
    return tuple(name for name in asks(conv.forward) if name in there or name in used)


def arguments_of(graph: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Return what a graph, as a mapping, has of `forward_arguments`; a bare weight is an attribute of the edges too."""
    found = {name: graph[name] for name in names if graph.get(name) is not None}
    weight, edge_index = graph.get("edge_weight"), graph.get("edge_index", graph.get("adj_t"))
    if "edge_attr" in names and "edge_attr" not in found and weight is not None:
        found["edge_attr"] = weight.unsqueeze(-1)
    if "edge_index" in names:
        found["edge_index"] = edge_index
    if "adj_t" in names and "adj_t" not in found and edge_index is not None:
        size = graph["x"].size(0)
        found["adj_t"] = to_torch_csr_tensor(edge_index.flip(0), weight, size=(size, size))
    return found | ({"batch": graph.get("batch")} if "batch" in names else {})  # None is one graph


def edge_information(conv: nn.Module, data: Data) -> tuple[str, ...]:
    """Return which of ``edge_weight``, ``edge_attr``, ``edge_type`` a convolution uses of what `data` carries.

    ``edge_attr`` is the edge weight, one channel, where the graph has no attributes of its own. A convolution built
    without ``edge_dim`` ignores ``edge_attr``, and does not count as using it.
    """
    carries = {n for n in EDGE_INFORMATION if n in data and data[n] is not None}
    carries |= {"edge_attr"} if "edge_weight" in carries else set()
    reads = {*_takes(conv), *(("edge_weight",) if "adj_t" in asks(conv.forward) else ())}
    return tuple(n for n in EDGE_INFORMATION if n in reads & carries)


def _takes(conv: nn.Module) -> set[str]:
    """Return which edge information the forward of a convolution makes something of."""
    if isinstance(conv, pyg_nn.GPSConv):
        return set() if conv.conv is None else _takes(conv.conv)
    takes = set(asks(conv.forward)) & set(EDGE_INFORMATION)
    if isinstance(conv, BasicGNN):
        takes -= set() if conv.supports_edge_weight else {"edge_weight"}
        takes -= set() if conv.supports_edge_attr else {"edge_attr"}
        deaf = conv.supports_edge_attr and getattr(conv.convs[0], "edge_dim", 1) is None
    else:
        sizes = [getattr(conv, n) for n in ("edge_dim", "in_edge_channels") if n in vars(conv)]
        deaf = any(size in (None, 0) for size in sizes) or getattr(conv, "dim", 1) == 0
    return takes - {"edge_attr"} if deaf else takes


def edge_channels(data: Data) -> int:
    """Return the number of channels of the edge attributes of a graph; a bare weight is one, nothing is 0."""
    if "edge_attr" in data and data.edge_attr is not None:
        return data.edge_attr.size(1)
    return int("edge_weight" in data)


@torch.no_grad()
def try_conv(conv: nn.Module, channels: int, example: Data) -> int:
    """Run a copy of a convolution on an example graph and return the width of its output.

    Raises:
        ValueError: If it cannot run on ``(x, edge_index)``, with the reason.
    """
    name, asked = type(conv).__name__, asks(conv.forward)
    if not {"edge_index", "adj_t"} & set(asked):
        others = ", ".join(n for n in asked if n != "x")
        raise ValueError(
            f"{name} does not run along edge_index (its forward takes {others}); choose another convolution"
        )
    h = torch.linspace(-1, 1, example.num_nodes * channels).view(-1, channels)
    graph = {**example.to_dict(), "x": h, "x_0": h, "data": example}
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            result = copy.deepcopy(conv)(h, **arguments_of(graph, forward_arguments(conv, example)))
        except Exception as error:  # whatever a foreign layer raises becomes one clear message
            lacking = _takes(conv) - {"edge_weight", *edge_information(conv, example)}
            adds = {"edge_attr": "edge_features=True", "edge_type": "edge_types=True"}
            ways = [f"give it a graph with {n}, as {adds[n]} makes one" for n in sorted(lacking)]
            raise ValueError(
                f"{name} cannot run on {channels} features along the edges of this graph ({first_line(error)}); "
                f"{', '.join(ways) or 'choose another one'}"
            ) from error
    if not isinstance(result, Tensor) or result.dim() != 2 or result.size(0) != example.num_nodes:
        raise ValueError(f"{name} does not return one feature vector per node; choose another convolution")
    if not result.is_floating_point() or not torch.isfinite(result).all():
        raise ValueError(f"{name} does not return finite real features; choose another convolution")
    return result.size(1)


def resolve_conv(name: str) -> Any:
    """Return the class of a convolution or ready stack in `torch_geometric.nn`, or of a dotted path.

    As PyG's resolvers and GraphGym write names, ``gcnconv`` and ``gcn_conv`` are `GCNConv`; what users have registered
    with GraphGym (``register_layer``) is found under its name.
    """
    if "." in name:
        return import_path(name)
    known = {normalize_string(cls): getattr(pyg_nn, cls) for cls in (*CONVOLUTIONS, *MODELS)}
    registry = sys.modules.get("torch_geometric.graphgym.register")  # empty before it is imported
    known = (registry.layer_dict if registry else {}) | known
    if (found := known.get(name, known.get(normalize_string(name)))) is None:
        raise ValueError(f"{name!r} is no convolution of torch_geometric.nn.{nearest(name, (*CONVOLUTIONS, *MODELS))}")
    return found


def _known_arguments(cls: Any, asked: Mapping[str, bool], channels: int, example: Data) -> dict[str, Any]:
    """Return values for constructor arguments that PyG names alike everywhere."""
    edge_dim = edge_channels(example)
    known: dict[str, Any] = {
        **dict.fromkeys(("in_channels", "out_channels", "channels", "hidden_channels"), channels),
        "num_layers": 1,
        "K": 2,
        "alpha": 0.1,
        "kernel_size": 3,
        "aggregators": ["mean", "max", "std"],
        "scalers": ["identity", "amplification"],
        "deg": _degree_histogram(example),
    }
    if cls is pyg_nn.GPSConv:
        known["norm"] = None  # batch statistics over a handful of adapters would make evaluation another function
    if edge_dim:
        known |= {"edge_dim": edge_dim, "in_edge_channels": edge_dim, "edge_attr_emb_dim": channels}
        known |= {} if "edge_dim" in asked else {"dim": edge_dim}  # the name for the channels of edge_attr elsewhere
    if "edge_type" in example:
        relations = example.get("num_relations") or int(example.edge_type.max()) + 1
        known |= {"num_relations": relations, "num_edge_types": relations, "edge_type_emb_dim": channels}
    if "node_type" in example:
        known["num_node_types"] = int(example.node_type.max()) + 1
    if asked.get("nn"):  # where it is not needed (FiLMConv), the layer makes a fitting one by itself
        known["nn"] = _written(cls, "nn", [channels], channels, example)
    if "conv" in asked:
        known["conv"] = _written(cls, "conv", "GraphConv", channels, example)
    if "layer_config" in asked:
        from torch_geometric.graphgym.models.layer import LayerConfig

        known["layer_config"] = LayerConfig(dim_in=channels, dim_out=channels, edge_dim=edge_dim)
    return known


def _written(cls: Any, name: str, value: Any, channels: int, example: Data) -> Any:
    """Return the module that is meant by the name of a convolution, or by the widths of hidden layers."""
    if name in ("conv", "convs") and isinstance(value, str):
        return make_conv(value, channels, {}, example)
    if name == "nn" and isinstance(value, Sequence):  # these two shapes cannot be told from a signature
        first = {pyg_nn.EdgeConv: 2 * channels, pyg_nn.NNConv: max(edge_channels(example), 1)}.get(cls, channels)
        last = channels * channels if cls is pyg_nn.NNConv else channels
        return pyg_nn.MLP([first, *value, last], act="tanh", norm=None)
    return value


def _degree_histogram(data: Data) -> Tensor:
    return torch.bincount(degree(data.edge_index[1], data.num_nodes, dtype=torch.long))
