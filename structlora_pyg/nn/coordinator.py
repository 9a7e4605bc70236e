"""The coordinator: message passing between adapters with any convolution of PyTorch Geometric."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch_geometric.data import Data
from torch_geometric.nn import MLP
from torch_geometric.nn.inits import reset
from torch_geometric.nn.models.basic_gnn import BasicGNN
from torch_geometric.nn.resolver import activation_resolver
from torch_geometric.transforms import BaseTransform
from torch_geometric.typing import Adj, Metadata
from torch_geometric.utils import scatter

from structlora_pyg.nn.conv import (
    EDGE_INFORMATION,
    arguments_of,
    edge_information,
    example_graph,
    forward_arguments,
    make_conv,
    try_conv,
)
from structlora_pyg.nn.hetero_conv import RelationalConv

logger = logging.getLogger(__name__)
TENSORS = ("edge_weight", "batch", "edge_attr", "edge_type")  # what `forward` takes by itself, beside x and edge_index


class Coordinator(nn.Module, BaseTransform):
    r"""Residual message passing over the adapter graph: a layer of tensors, and a transform ``Data -> Data``.

    .. math::
        h^0 = W_{in}\,\hat x, \quad h^{l+1} = h^l + \sigma(\mathrm{conv}_l(h^l, E)), \quad \delta = W_{out}\,h^L, \quad
        x \leftarrow x + \tanh(\lambda g)\,\lVert x \rVert \frac{\delta}{\lVert \delta \rVert}

    with :math:`\hat x` the codes divided by their root mean square over the graph, so that the network sees relative
    strengths. The gain g starts at 0: coordination begins as the identity, and the correction of an update never
    exceeds the update itself. :math:`\lambda` is `lr_scale`. With ``bounded=False`` the convolutions work on the codes
    themselves and all they add counts, :math:`h^0 = x,\ x \leftarrow h^L`, which is StructLoRA (arXiv 2603.14228)
    literally.

    Args:
        channels: Width F of the node codes.
        conv: Convolution, or one of PyG's ready stacks (``GCN``, ``GraphSAGE``, ``GIN``, ``GAT``, ``PNA``,
            ``EdgeCNN``): class name in `torch_geometric.nn`, name in GraphGym's registry, dotted path, class, or
            instance, which is copied; with `hetero`, a mapping of relations to any of these.
        example: A graph with what will be there: the edge information, and the attributes that convolutions ask for by
            name; default: one without edge weights, with the ``edge_dim`` and ``num_relations`` of `conv`.
        features: Attributes (N, k) of the nodes that stand beside `x` in the input; default: those of `example` whose
            name is ``pe`` or ends in ``_pe``, as those of PyG's positional encodings do.
        metadata: Node types and edge types for `hetero`, `GraphBuilder.metadata`.

    The other arguments are those of `structlora_pyg.nn.CoordinatorConfig`.

    Attributes:
        edge_information: What the convolutions use of ``edge_weight``, ``edge_attr``, ``edge_type``.

    Raises:
        ValueError: Unknown convolution; one that cannot run on (x, edge_index), or with `hetero` on two node types.
    """

    def __init__(
        self,
        channels: int,
        conv: Any = "GCNConv",
        num_layers: int = 1,
        hidden_channels: int = 64,
        act: str = "tanh",
        residual: bool = True,
        messages: bool = True,
        frozen: bool = False,
        conv_kwargs: Mapping[str, Any] | None = None,
        lr_scale: float = 1.0,
        bounded: bool = True,
        example: Data | None = None,
        features: Sequence[str] | None = None,
        hetero: str = "none",
        metadata: Metadata | None = None,
    ) -> None:
        super().__init__()
        if example is None:
            sizes = vars(conv) if isinstance(conv, nn.Module) else conv_kwargs or {}
            example = example_graph(relations=sizes.get("num_relations", 0), edge_dim=sizes.get("edge_dim") or 0)
        hidden_channels = hidden_channels if bounded else channels
        options = (conv_kwargs or {}, example, num_layers, act)
        made: list[Any]
        if hetero == "none":
            first = make_conv(conv, hidden_channels, *options)
            copies = 1 if isinstance(first, BasicGNN) else num_layers
            made = [first, *(make_conv(conv, hidden_channels, *options) for _ in range(copies - 1))]
            widths = [try_conv(c, hidden_channels, example) for c in made]
            self.edge_information = edge_information(first, example)
        else:
            if metadata is None:
                raise ValueError(f"hetero={hetero!r} needs the types of nodes and edges: metadata=graph.metadata()")
            typed = RelationalConv(conv, hidden_channels, metadata, hetero, *options)
            copies = 1 if typed.stack else num_layers
            again = (RelationalConv(conv, hidden_channels, metadata, hetero, *options) for _ in range(copies - 1))
            made, widths = [typed, *again], [typed.out_channels] * copies
            self.edge_information = typed.edge_information
        self.name = getattr(made[0], "name", type(made[0]).__name__)
        self.residual = residual
        encodings = [k for k in example.to_dict() if k == "pe" or k.endswith("_pe")]
        self.features = encodings if features is None else list(features)
        self.arguments = [forward_arguments(c, example) for c in made]
        extra = sum(example[name].size(1) for name in self.features)
        if extra and not bounded:
            raise ValueError(f"bounded=False adds to the codes alone; leave {', '.join(self.features)} out")
        self.input = RelativeLinear(channels + extra, hidden_channels) if bounded else Codes()
        self.convs = nn.ModuleList(made)
        self.mix = nn.ModuleList(
            nn.Identity() if w == hidden_channels else nn.Linear(w, hidden_channels) for w in widths
        )
        if not messages:
            made = [matched_perceptron([c, m], hidden_channels, act) for c, m in zip(made, self.mix, strict=True)]
            self.convs, self.mix = nn.ModuleList(made), nn.ModuleList(nn.Identity() for _ in made)
            self.arguments = [() for _ in made]
        self.act = activation_resolver(act)
        self.output = BoundedLinear(hidden_channels, channels, lr_scale) if bounded else Added()
        if frozen:
            self.requires_grad_(False)
            if bounded:
                self.gain.requires_grad_(True)

    def log(self, example: Data) -> None:
        """Say what of the edges is used: PyG drops weights that a convolution does not take without a word."""
        used = ", ".join(self.edge_information) or "nothing else of them"
        unheard = "edge_weight" in example and not {"edge_weight", "edge_attr"} & set(self.edge_information)
        used = f" and uses {used}" if {*EDGE_INFORMATION} & {*example.keys()} else ""
        logger.info("%s passes messages along the edges%s%s", self.name, used, "; their weights are left out" * unheard)

    @property
    def gain(self) -> Any:
        """The gain g (1,), where messages are bounded."""
        return self.output.gain

    def reset_parameters(self) -> None:
        """Draw all parameters anew; the gain is 0 again."""
        for child in self.children():
            reset(child)

    def forward(
        self,
        x: Tensor | Data,
        edge_index: Adj | None = None,
        edge_weight: Tensor | None = None,
        batch: Tensor | None = None,
        edge_attr: Tensor | None = None,
        edge_type: Tensor | None = None,
        pe: Tensor | None = None,
        data: Data | None = None,
    ) -> Any:
        """Return `x` plus the message; of a graph, a shallow copy with ``message`` (N, F) and ``x`` plus the message.

        Args:
            x: (N, F) node codes, or a graph with what the other arguments are.
            edge_index: (2, E) edges, or a sparse adjacency matrix (transposed, as PyG has it).
            edge_weight: (E,) their weights.
            batch: (N,) the graph of every node; codes are compared within a graph.
            edge_attr: (E, k) attributes of the edges; default: their weights.
            edge_type: (E,) types of the edges.
            pe: (N, k) features beside the codes.
            data: The graph that convolutions find other attributes in, where they ask for some.
        """
        if isinstance(x, Data):
            return self._transform(x)
        edges = {"edge_weight": edge_weight, "batch": batch, "edge_attr": edge_attr, "edge_type": edge_type}
        return x + self.output(self.states(x, pe, data, edge_index=edge_index, **edges)[-1], x)

    def _transform(self, data: Data) -> Data:
        active = torch.as_tensor(data.get("active", True)).to(data.x)
        if active.numel() > 1:  # of every graph in a batch
            active = active[data.batch].unsqueeze(-1)
        out = copy.copy(data)
        out.message = active * self.output(self.states(data)[-1], data.x)
        out.x = data.x + out.message
        return out

    def inputs(self, data: Data) -> dict[str, Any]:
        """Return the arguments of `forward` from a graph; what edges and nodes carry beside x, in the type of x."""
        data = copy.copy(data)
        for name in ("edge_weight", "edge_attr", *self.features):
            if name in data and data[name] is not None:
                data[name] = data[name].to(data.x.dtype)
        pe = torch.cat([data[name] for name in self.features], dim=-1) if self.features else None
        edge_index = data.edge_index if "edge_index" in data else data.adj_t
        given = {name: data[name] for name in TENSORS if name in data}
        return {"x": data.x, "edge_index": edge_index, "pe": pe, "data": data, **given}

    def states(
        self, x: Tensor | Data, pe: Tensor | None = None, data: Data | None = None, **edges: Any
    ) -> list[Tensor]:
        """Return the hidden features (N, hidden_channels): h^0, then those after each convolution; see `forward`."""
        if isinstance(x, Data):
            return self.states(**self.inputs(x))
        batch = edges.get("batch")
        graph = {"x": x, **{n: value for n, value in edges.items() if value is not None}}
        asked = {name for names in self.arguments for name in names} - {"x_0", *edges}
        if asked:
            data = Data(**graph) if data is None else data
            graph = {**data.to_dict(), **graph, "data": data}
        h = [self.input(x, batch, pe)]
        graph["x_0"] = h[0]
        for conv, mix, names in zip(self.convs, self.mix, self.arguments, strict=True):
            message = self.act(mix(conv(h[-1], **arguments_of(graph, names))))
            h.append(h[-1] + message if self.residual else message)
        return h


class RelativeLinear(nn.Linear):
    """A linear layer on codes divided by their root mean square over their graph."""

    def forward(self, x: Tensor, batch: Tensor | None = None, pe: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Return (N, out_features) of `x` (N, F) and further features `pe` (N, k); `batch` as in `Coordinator`."""
        square = x.square()
        mean = square.mean() if batch is None else scatter(square.mean(-1), batch, reduce="mean")[batch].unsqueeze(-1)
        x = x / mean.add(1e-30).sqrt()
        return super().forward(x if pe is None else torch.cat([x, pe], dim=-1))


class BoundedLinear(nn.Linear):
    """A linear layer whose output has at most the length of what it is added to, with a gain that starts at 0.

    Args:
        in_channels: Width of its input.
        out_channels: Width F of the codes.
        lr_scale: Learning rate of the gain relative to that of other parameters.
    """

    def __init__(self, in_channels: int, out_channels: int, lr_scale: float = 1.0) -> None:
        super().__init__(in_channels, out_channels)
        self.lr_scale = lr_scale
        self.gain = nn.Parameter(torch.zeros(1))  # DeepSpeed and FSDP2 cannot handle a scalar

    def reset_parameters(self) -> None:
        """Draw the weights anew; the gain is 0 again."""
        super().reset_parameters()
        if "gain" in self._parameters:  # the constructor of the base class calls this first
            nn.init.zeros_(self.gain)

    def forward(self, h: Tensor, x: Tensor) -> Tensor:  # type: ignore[override]
        """Return messages (N, F) for hidden features `h` (N, in_channels) and codes `x` (N, F)."""
        delta = nn.functional.normalize(super().forward(h), dim=-1, eps=1e-8)
        strength = x.square().sum(-1, keepdim=True).add(1e-30).sqrt()
        return torch.tanh(self.lr_scale * self.gain) * strength * delta


class Codes(nn.Module):
    """The codes as they are."""

    def forward(self, x: Tensor, batch: Tensor | None = None, pe: Tensor | None = None) -> Tensor:
        """Return `x`."""
        return x


class Added(nn.Module):
    """What the convolutions have added to the codes."""

    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        """Return the messages (N, F) for hidden features `h` (N, F) and codes `x` (N, F)."""
        return h - x


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
