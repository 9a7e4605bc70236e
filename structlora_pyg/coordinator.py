"""The coordinator: message passing between adapters with any convolution of PyTorch Geometric."""

from __future__ import annotations

import copy
import importlib
import inspect
from collections.abc import Mapping
from typing import Any

import torch
import torch_geometric.nn as pyg_nn
from torch import Tensor, nn
from torch_geometric.data import Data
from torch_geometric.nn.resolver import activation_resolver

from structlora_pyg.config import nearest

CONVOLUTIONS = tuple(name for name in pyg_nn.conv.__all__ if name.endswith("Conv"))


class Coordinator(nn.Module):
    r"""Residual message passing over the adapter graph, a ``Data -> Data`` module.

    .. math::
        h^0 = W_{in}\,\hat x, \quad h^{l+1} = h^l + \sigma(\mathrm{conv}_l(h^l, E)), \quad
        x \leftarrow x + \tanh(g)\,\lVert x \rVert \frac{\delta}{\lVert \delta \rVert}, \quad \delta = W_{out}\,h^L

    with :math:`\hat x` the codes divided by their root mean square over the graph, so that the network sees relative
    strengths. The gain g starts at 0: coordination begins as the identity, and the correction of an update never
    exceeds the update itself (StructLoRA, arXiv 2603.14228, adds the message unbounded in parameter space).

    Args:
        channels: Width F of the node codes.
        conv: Convolution: class name in `torch_geometric.nn`, dotted path, class, or instance. An instance is used
            as it is (with more layers: deep copies of it).
        num_layers: Number of convolutions.
        hidden_channels: Width of the convolutions.
        act: Activation, by the name PyG resolves.
        residual: Add each convolution's input to its output.
        conv_kwargs: Keyword arguments of the convolution.
        weighted: The graphs carry ``edge_weight``.
        ignore_edge_weight: Allow a convolution that cannot take edge weights.

    Raises:
        ValueError: Unknown convolution; one that cannot run on (x, edge_index); one that would drop the edge weights.
    """

    def __init__(
        self,
        channels: int,
        conv: str | type[nn.Module] | nn.Module = "GCNConv",
        num_layers: int = 1,
        hidden_channels: int = 64,
        act: str = "tanh",
        residual: bool = True,
        conv_kwargs: Mapping[str, Any] | None = None,
        weighted: bool = True,
        ignore_edge_weight: bool = False,
    ) -> None:
        super().__init__()
        made = [make_conv(conv, hidden_channels, dict(conv_kwargs or {}), weighted) for _ in range(num_layers)]
        self.edge_argument = edge_argument(made[0]) if weighted else None
        if weighted and self.edge_argument is None and not ignore_edge_weight:
            raise ValueError(
                f"{type(made[0]).__name__} cannot take edge weights, but gradient edges carry them. Choose edges "
                "without weights (graph.edges=depth_chain), a convolution that takes them (GCNConv, GATv2Conv, "
                "GraphConv, TransformerConv), or set coordinator.ignore_edge_weight=true"
            )
        self.residual = residual
        self.input = nn.Linear(channels, hidden_channels)
        self.convs = nn.ModuleList(made)
        widths = [self._try(c, hidden_channels) for c in made]
        self.mix = nn.ModuleList(
            nn.Identity() if w == hidden_channels else nn.Linear(w, hidden_channels) for w in widths
        )
        self.act = activation_resolver(act)
        self.output = nn.Linear(hidden_channels, channels)
        self.gain = nn.Parameter(torch.zeros(()))

    def forward(self, data: Data) -> Data:
        """Return a shallow copy of `data` with ``message`` (N, F) and ``x`` plus the message."""
        x = data.x
        rms = x.square().mean().add(1e-30).sqrt()
        h = self.input(x / rms)
        for conv, mix in zip(self.convs, self.mix, strict=True):
            message = self.act(mix(self._convolve(conv, h, data)))
            h = h + message if self.residual else message
        delta = torch.nn.functional.normalize(self.output(h), dim=-1, eps=1e-8)
        strength = x.square().sum(-1, keepdim=True).add(1e-30).sqrt()
        out = copy.copy(data)
        out.message = float(data.get("active", True)) * torch.tanh(self.gain) * strength * delta
        out.x = x + out.message
        return out

    def _convolve(self, conv: nn.Module, h: Tensor, data: Data) -> Tensor:
        if self.edge_argument is None:
            return conv(h, data.edge_index)
        weight = data.edge_weight.to(h.dtype)
        if self.edge_argument == "edge_attr":
            weight = weight.unsqueeze(-1)
        return conv(h, data.edge_index, **{self.edge_argument: weight})

    def _try(self, conv: nn.Module, width: int) -> int:
        """Run a convolution on a graph of three nodes and return its output width."""
        edge_index = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])
        probe = Data(x=torch.randn(3, width), edge_index=edge_index, edge_weight=torch.ones(4))
        state = torch.get_rng_state()
        try:
            with torch.no_grad():
                result = self._convolve(copy.deepcopy(conv), probe.x, probe)
        except Exception as error:
            raise ValueError(
                f"{type(conv).__name__} cannot run on (x, edge_index): {error}. Choose another convolution, or pass "
                "coordinator.conv_kwargs that make it take single-type nodes"
            ) from error
        finally:
            torch.set_rng_state(state)
        if not isinstance(result, Tensor) or result.dim() != 2 or result.size(0) != 3:
            raise ValueError(f"{type(conv).__name__} does not return one feature vector a node; choose another one")
        return result.size(1)


def make_conv(
    conv: str | type[nn.Module] | nn.Module, channels: int, kwargs: dict[str, Any], weighted: bool
) -> nn.Module:
    """Return a convolution of width `channels` from a name, dotted path, class or instance.

    ``GIN``-like convolutions get a two-layer perceptron as their ``nn``; attention gets ``edge_dim=1`` where the graph
    carries weights, because without it PyG ignores ``edge_attr`` without a word.
    """
    if isinstance(conv, nn.Module):
        if kwargs:
            raise ValueError("coordinator.conv_kwargs has no effect on an instance; build it with them instead")
        return copy.deepcopy(conv)
    cls = resolve_conv(conv) if isinstance(conv, str) else conv
    parameters = inspect.signature(cls.__init__).parameters
    arguments = dict(kwargs)
    if "in_channels" in parameters:
        arguments.setdefault("in_channels", channels)
    if "out_channels" in parameters:
        arguments.setdefault("out_channels", channels)
    if "channels" in parameters:
        arguments.setdefault("channels", channels)
    if "nn" in parameters:
        arguments.setdefault("nn", pyg_nn.MLP([channels, channels, channels], act="tanh", norm=None))
    if weighted and "edge_dim" in parameters:
        arguments.setdefault("edge_dim", 1)
    required = [
        n
        for n, p in parameters.items()
        if n != "self" and p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    missing = [n for n in required if n not in arguments]
    if missing:
        raise ValueError(
            f"{cls.__name__} needs {', '.join(missing)}; pass coordinator.conv_kwargs={{{missing[0]!r}: ...}}"
        )
    try:
        return cls(**arguments)
    except (TypeError, ValueError, AssertionError) as error:
        raise ValueError(f"{cls.__name__}({arguments}) cannot be built: {error}") from error


def resolve_conv(name: str) -> Any:
    """Return the convolution class of a name in `torch_geometric.nn` or a dotted path."""
    if "." in name:
        return import_path(name)
    for candidate in (name, f"{name}Conv"):
        if candidate in CONVOLUTIONS:
            return getattr(pyg_nn, candidate)
    raise ValueError(f"{name!r} is no convolution of torch_geometric.nn.{nearest(name, CONVOLUTIONS)}")


def import_path(path: str) -> Any:
    """Import an object by its dotted path."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{path!r} cannot be imported: {error}; give package.module.ClassName") from error


def edge_argument(conv: nn.Module) -> str | None:
    """Return the forward argument through which a convolution uses a scalar per edge, or None."""
    parameters = inspect.signature(conv.forward).parameters
    if "edge_weight" in parameters:
        return "edge_weight"
    if "edge_attr" in parameters and getattr(conv, "edge_dim", 1) is not None:
        return "edge_attr"
    return None
