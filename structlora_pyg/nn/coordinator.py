"""The coordinator: message passing between adapters with any convolution of PyTorch Geometric."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch_geometric.data import Data
from torch_geometric.nn import MLP
from torch_geometric.nn.models.basic_gnn import BasicGNN
from torch_geometric.nn.resolver import activation_resolver
from torch_geometric.typing import Metadata

from structlora_pyg.nn.conv import edge_information, example_graph, make_conv, run_conv, try_conv
from structlora_pyg.nn.hetero_conv import RelationalConv


class Coordinator(nn.Module):
    r"""Residual message passing over the adapter graph, a ``Data -> Data`` module.

    .. math::
        h^0 = W_{in}\,\hat x, \quad h^{l+1} = h^l + \sigma(\mathrm{conv}_l(h^l, E)), \quad \delta = W_{out}\,h^L, \quad
        x \leftarrow x + \tanh(\lambda g)\,\lVert x \rVert \frac{\delta}{\lVert \delta \rVert}

    with :math:`\hat x` the codes divided by their root mean square over the graph, so that the network sees relative
    strengths. The gain g starts at 0: coordination begins as the identity, and the correction of an update never
    exceeds the update itself (StructLoRA, arXiv 2603.14228, adds the message unbounded in parameter space).
    :math:`\lambda` is `lr_scale`.

    Args:
        channels: Width F of the node codes.
        conv: Convolution, or one of PyG's ready stacks (``GCN``, ``GraphSAGE``, ``GIN``, ``GAT``, ``PNA``,
            ``EdgeCNN``): class name in `torch_geometric.nn`, dotted path, class, or instance, which is copied.
        example: A graph with the edge information that will be there; default: one with ``edge_weight``.
        metadata: Node types and edge types for `hetero`, `GraphBuilder.metadata`.

    The other arguments are those of `structlora_pyg.nn.CoordinatorConfig`.

    Raises:
        ValueError: Unknown convolution; one that cannot run on (x, edge_index), or with `hetero` on two node types; one
            that would drop the edge weights.
    """

    def __init__(
        self,
        channels: int,
        conv: str | type[nn.Module] | nn.Module = "GCNConv",
        num_layers: int = 1,
        hidden_channels: int = 64,
        act: str = "tanh",
        residual: bool = True,
        messages: bool = True,
        frozen: bool = False,
        conv_kwargs: Mapping[str, Any] | None = None,
        ignore_edge_weight: bool = False,
        lr_scale: float = 1.0,
        example: Data | None = None,
        hetero: str = "none",
        metadata: Metadata | None = None,
    ) -> None:
        super().__init__()
        example = example_graph() if example is None else example
        options = (conv_kwargs or {}, example, num_layers, act)
        made: list[nn.Module]
        if hetero == "none":
            first = make_conv(conv, hidden_channels, *options)
            copies = 1 if isinstance(first, BasicGNN) else num_layers
            made = [first, *(make_conv(conv, hidden_channels, *options) for _ in range(copies - 1))]
            widths = [try_conv(c, hidden_channels, example) for c in made]
            heard = edge_information(first, example)
        else:
            if metadata is None:
                raise ValueError(f"hetero={hetero!r} needs the types of nodes and edges: metadata=graph.metadata()")
            typed = RelationalConv(conv, hidden_channels, metadata, hetero, *options)
            copies = 1 if typed.stack else num_layers
            again = (RelationalConv(conv, hidden_channels, metadata, hetero, *options) for _ in range(copies - 1))
            made, widths = [typed, *again], [typed.out_channels] * copies
            heard = typed.edge_information
        self.edge_information = heard
        if "edge_weight" in example and not {"edge_weight", "edge_attr"} & set(heard) and not ignore_edge_weight:
            raise ValueError(
                f"{type(made[0]).__name__} cannot take edge weights, but the edges carry them. Choose edges "
                "without weights (graph.edges=depth_chain), a convolution that takes them (GCNConv, GATv2Conv, "
                "GraphConv, TransformerConv), or set coordinator.ignore_edge_weight=true"
            )
        self.residual, self.lr_scale = residual, lr_scale
        extra = example.pe.size(1) if "pe" in example else 0
        self.input = nn.Linear(channels + extra, hidden_channels)
        self.convs = nn.ModuleList(made)
        self.mix = nn.ModuleList(
            nn.Identity() if w == hidden_channels else nn.Linear(w, hidden_channels) for w in widths
        )
        if not messages:
            made = [matched_perceptron([c, m], hidden_channels, act) for c, m in zip(made, self.mix, strict=True)]
            self.convs, self.mix = nn.ModuleList(made), nn.ModuleList(nn.Identity() for _ in made)
        self.act = activation_resolver(act)
        self.output = nn.Linear(hidden_channels, channels)
        if frozen:
            self.requires_grad_(False)
        self.gain = nn.Parameter(torch.zeros(1))  # DeepSpeed and FSDP2 cannot handle a scalar

    def forward(self, data: Data) -> Data:
        """Return a shallow copy of `data` with ``message`` (N, F) and ``x`` plus the message."""
        x = data.x
        delta = torch.nn.functional.normalize(self.output(self.states(data)[-1]), dim=-1, eps=1e-8)
        strength = x.square().sum(-1, keepdim=True).add(1e-30).sqrt()
        out = copy.copy(data)
        out.message = float(data.get("active", True)) * torch.tanh(self.lr_scale * self.gain) * strength * delta
        out.x = x + out.message
        return out

    def states(self, data: Data) -> list[Tensor]:
        """Return the hidden features (N, hidden_channels): h^0, then those after each convolution."""
        x = data.x
        rms = x.square().mean().add(1e-30).sqrt()
        features = torch.cat([x / rms, data.pe.to(x.dtype)], dim=-1) if "pe" in data else x / rms
        h = [self.input(features)]
        for conv, mix in zip(self.convs, self.mix, strict=True):
            message = self.act(mix(run_conv(conv, h[-1], h[0], data)))
            h.append(h[-1] + message if self.residual else message)
        return h


def matched_perceptron(replaced: Sequence[nn.Module], channels: int, act: str) -> nn.Module:
    """Return a perceptron on single nodes with as many trainable parameters as some modules have together.

    It has one hidden layer, whose width is solved for, so that the counts differ by at most half a hidden unit:
    `channels` parameters. A convolution of at most 2 `channels` parameters has no such perceptron and gives way to the
    identity.

    Args:
        replaced: The modules in whose place it stands.
        channels: Width of input and output.
        act: Activation of the hidden layer, by the name PyG resolves.
    """
    parameters = sum(p.numel() for module in replaced for p in module.parameters() if p.requires_grad)
    unit = 2 * channels + 1  # a row in, a bias, a column out; the biases of the output come on top
    width = round((parameters - channels) / unit)
    return MLP([channels, width, channels], act=act, norm=None) if width >= 1 else nn.Identity()
