"""Convolutions of PyTorch Geometric as building blocks: found by name, built by signature, or refused with a reason.

Nothing here knows single classes beyond the few shapes that a signature cannot tell. A convolution is given what its
constructor and its forward ask for by name, and is run once on an example graph before it is accepted.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch_geometric.nn as pyg_nn
from torch import Tensor, nn
from torch_geometric.data import Data
from torch_geometric.nn.models.basic_gnn import BasicGNN
from torch_geometric.utils import degree

from structlora_pyg.checks import import_path, nearest

CONVOLUTIONS = tuple(name for name in pyg_nn.conv.__all__ if name.endswith("Conv"))
MODELS = ("GCN", "GraphSAGE", "GIN", "GAT", "PNA", "EdgeCNN")  # stacks that PyG keeps ready
EDGE_INFORMATION = ("edge_weight", "edge_attr", "edge_type")
SIGNATURE_ONLY = ("self", "args", "kwargs")


def example_graph(channels: int = 16, weighted: bool = True, relations: int = 0) -> Data:
    """Return a path of four nodes with the attributes a coordinator will see, to build and try convolutions on."""
    edge_index = torch.tensor([[0, 1, 1, 2, 2, 3], [1, 0, 2, 1, 3, 2]])
    data = Data(x=torch.linspace(-1, 1, 4 * channels).view(4, channels), edge_index=edge_index)
    if weighted:
        data.edge_weight = torch.linspace(0.4, 1.0, 6)
    if relations:
        data.edge_type = torch.arange(6) % relations
    return data


def make_conv(
    conv: str | type[nn.Module] | nn.Module,
    channels: int,
    kwargs: Mapping[str, Any],
    example: Data,
    num_layers: int = 1,
    act: str = "tanh",
) -> nn.Module:
    """Return a convolution (or one of PyG's ready stacks) that maps `channels` features to features.

    Args:
        conv: Class name in `torch_geometric.nn`, dotted path, class, or instance (which is copied).
        channels: Width of input, hidden and output features.
        kwargs: Keyword arguments that win over those derived from the signature.
        example: A graph with the edge information that will be there.
        num_layers: Layers of a ready stack; a convolution is one layer.
        act: Activation inside a ready stack.

    Raises:
        ValueError: Unknown name; arguments that cannot be derived; keyword arguments for an instance.
    """
    if isinstance(conv, nn.Module):
        if kwargs:
            raise ValueError("coordinator.conv_kwargs has no effect on an instance; build it with them instead")
        return copy.deepcopy(conv)
    cls: Any = resolve_conv(conv) if isinstance(conv, str) else conv
    stack = issubclass(cls, BasicGNN)
    known = _known_arguments(cls, channels, example)
    parameters = inspect.signature((BasicGNN if stack else cls).__init__).parameters
    accepted = set(parameters)
    if stack:  # what it hands on to its convolutions is not in its signature
        known |= {"in_channels": channels, "hidden_channels": channels, "num_layers": num_layers, "act": act}
        accepted |= {"edge_dim"} if cls.supports_edge_attr and edge_channels(example) else set()
        accepted |= {"aggregators", "scalers", "deg"} if cls is pyg_nn.PNA else set()
    asked = (p for p in parameters.values() if p.default is p.empty and p.kind is not p.VAR_POSITIONAL)
    required = [] if stack else [p.name for p in asked if p.name not in SIGNATURE_ONLY]
    if "nn" not in required:
        known.pop("nn")  # FiLMConv makes a fitting one by itself
    if "edge_dim" in accepted:
        known.pop("dim", None)  # elsewhere it is the name for the channels of edge_attr
    arguments = {n: v for n, v in known.items() if n in accepted} | dict(kwargs)
    arguments = {n: _resolve_argument(n, v, channels, example) for n, v in arguments.items()}
    missing = [n for n in required if n not in arguments]
    if "metadata" in missing:
        raise ValueError(f"{cls.__name__} runs on node types and edge types; set coordinator.hetero=hetero_conv")
    if missing:
        hint = "{" + ", ".join(f"{n!r}: ..." for n in missing) + "}"
        raise ValueError(f"{cls.__name__} needs {', '.join(missing)}; pass coordinator.conv_kwargs={hint}")
    try:
        return cls(**arguments)
    except Exception as error:  # whatever a foreign constructor raises becomes one clear message
        raise ValueError(f"{cls.__name__} cannot be built: {first_line(error)}") from error


def run_conv(conv: nn.Module, h: Tensor, h_0: Tensor, data: Data) -> Tensor:
    """Run a convolution on features `h` (N, channels), giving it what its forward asks for by name.

    Args:
        conv: The convolution.
        h: Its input.
        h_0: The features before the first convolution, for those that want them (``x_0``).
        data: The graph: ``edge_index``, and where present ``edge_weight``, ``edge_attr``, ``edge_type``, ``role``.
    """
    used = edge_information(conv, data)
    given = {"x_0": h_0, "edge_index": data.edge_index, "data": data, **edge_arguments(used, data, h.dtype)}
    if "node_type" in _forward(conv):
        given["node_type"] = data.role.clamp(min=0)
    names = [n for n in _forward(conv) if n in given]
    if isinstance(conv, pyg_nn.GPSConv):  # it hands keyword arguments on to the convolution inside
        names = ["edge_index", *used]
    return conv(h, **{n: given[n] for n in names})


def edge_arguments(used: Sequence[str], data: Data, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return what a convolution `used` of the edge information of `data`; a bare weight is an attribute too."""
    given = {n: data[n] for n in used if n in data}
    if "edge_attr" in used and "edge_attr" not in data:
        given["edge_attr"] = data.edge_weight.unsqueeze(-1)
    return {n: value.to(dtype) if value.is_floating_point() else value for n, value in given.items()}


def edge_information(conv: nn.Module, data: Data) -> tuple[str, ...]:
    """Return which of ``edge_weight``, ``edge_attr``, ``edge_type`` a convolution uses of what `data` carries.

    ``edge_attr`` is the edge weight, one channel, where the graph has no attributes of its own. A convolution built
    without ``edge_dim`` ignores ``edge_attr``, and does not count as using it.
    """
    if isinstance(conv, pyg_nn.GPSConv):
        return edge_information(conv.conv, data) if conv.conv is not None else ()
    carries = {n for n in EDGE_INFORMATION if n in data and data[n] is not None}
    if "edge_weight" in carries:
        carries.add("edge_attr")
    takes = set(_forward(conv))
    if isinstance(conv, BasicGNN):
        takes -= set() if conv.supports_edge_weight else {"edge_weight"}
        takes -= set() if conv.supports_edge_attr else {"edge_attr"}
        deaf = conv.supports_edge_attr and getattr(conv.convs[0], "edge_dim", 1) is None
    else:
        sizes = [getattr(conv, n) for n in ("edge_dim", "in_edge_channels") if n in vars(conv)]
        deaf = any(size in (None, 0) for size in sizes) or getattr(conv, "dim", 1) == 0
    if deaf:
        takes.discard("edge_attr")
    return tuple(n for n in EDGE_INFORMATION if n in takes & carries)


def edge_channels(data: Data) -> int:
    """Return the number of channels of the edge attributes of a graph; a bare weight is one, nothing is 0."""
    if "edge_attr" in data and data.edge_attr is not None:
        return data.edge_attr.size(1)
    return int("edge_weight" in data)


def try_conv(conv: nn.Module, channels: int, example: Data) -> int:
    """Run a copy of a convolution on an example graph and return the width of its output.

    Raises:
        ValueError: If it cannot run on ``(x, edge_index)``, with the reason.
    """
    name = type(conv).__name__
    if "edge_index" not in _forward(conv):
        asks = ", ".join(n for n in _forward(conv) if n not in ("x", *SIGNATURE_ONLY))
        raise ValueError(f"{name} does not run along edge_index (its forward takes {asks}); choose another convolution")
    h = torch.linspace(-1, 1, example.num_nodes * channels).view(-1, channels)
    with torch.random.fork_rng(devices=[]), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            result = run_conv(copy.deepcopy(conv), h, h, example)
        except Exception as error:  # whatever a foreign layer raises becomes one clear message
            raise ValueError(f"{name} cannot run on this graph: {first_line(error)}; choose another one") from error
    if not isinstance(result, Tensor) or result.dim() != 2 or result.size(0) != example.num_nodes:
        raise ValueError(f"{name} does not return one feature vector per node; choose another convolution")
    if not result.is_floating_point() or not torch.isfinite(result).all():
        raise ValueError(f"{name} does not return finite real features; choose another convolution")
    return result.size(1)


def resolve_conv(name: str) -> Any:
    """Return the class of a convolution or ready stack in `torch_geometric.nn`, or of a dotted path."""
    if "." in name:
        return import_path(name)
    if name in CONVOLUTIONS or name in MODELS:
        return getattr(pyg_nn, name)
    known = (*CONVOLUTIONS, *MODELS)
    raise ValueError(f"{name!r} is no convolution of torch_geometric.nn.{nearest(name, known)}")


def _known_arguments(cls: type, channels: int, example: Data) -> dict[str, Any]:
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
        "conv": "GraphConv",
        "nn": _perceptron(cls, channels, edge_dim),
    }
    if cls is pyg_nn.GPSConv:
        known["norm"] = None  # batch statistics over a handful of adapters would make evaluation another function
    if edge_dim:
        known |= {"edge_dim": edge_dim, "in_edge_channels": edge_dim, "dim": edge_dim, "edge_attr_emb_dim": channels}
    if "edge_type" in example:
        relations = example.get("num_relations") or int(example.edge_type.max()) + 1
        known |= {"num_relations": relations, "num_edge_types": relations, "edge_type_emb_dim": channels}
    if "role" in example:
        known["num_node_types"] = int(example.role.max()) + 1
    return known


def _perceptron(cls: type, channels: int, edge_dim: int) -> nn.Module:
    """Return the inner network of a convolution; these two shapes cannot be told from a signature."""
    width_in = {pyg_nn.EdgeConv: 2 * channels, pyg_nn.NNConv: max(edge_dim, 1)}.get(cls, channels)
    width_out = channels * channels if cls is pyg_nn.NNConv else channels
    return pyg_nn.MLP([width_in, channels, width_out], act="tanh", norm=None)


def _resolve_argument(name: str, value: Any, channels: int, example: Data) -> Any:
    """Let ``conv_kwargs={"conv": "GATConv"}`` name the convolution inside another one."""
    if name in ("conv", "convs") and isinstance(value, str):
        return make_conv(value, channels, {}, example)
    return value


def _degree_histogram(data: Data) -> Tensor:
    return torch.bincount(degree(data.edge_index[1], data.num_nodes, dtype=torch.long))


def _forward(conv: nn.Module) -> list[str]:
    return list(inspect.signature(conv.forward).parameters)


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, without its full stop."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
