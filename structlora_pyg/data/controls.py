"""Controls: what message passing between adapters has to be compared with before it may be credited with anything.

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

`structlora ablate --controls` runs all of them beside a configuration.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch_geometric.nn import MLP
from torch_geometric.utils import coalesce


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
