"""Whether the stages do their work: what messages attend to and smooth, whether gates know what directions are worth.

The deeper a graph network, the more alike the features of neighbours become, until nothing tells nodes apart. The
Dirichlet energy measures it (Cai and Wang 2020, arXiv 2006.13318; Rusch, Bronstein and Mishra 2023, arXiv 2303.10993,
survey this measure and others).

A filter whose gates do not follow what the loss loses when a direction is removed has not learned which directions
matter. Three quantities a direction are put beside that loss: its gate, its norm ``|b_j| |a_j|``, which needs no
filter, and the first-order estimate ``-m_j dL/dm_j``, which needs a single backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch_geometric.data import Data

from structlora_pyg.nn.attention import Attention, watched_attention
from structlora_pyg.nn.coordinator import Coordinator
from structlora_pyg.nn.filter import IBFilter
from structlora_pyg.tuner.graph_pass import GraphPass, evaluating
from structlora_pyg.tuner.model import StructLoraModel


def dirichlet_energy(
    x: Tensor, edge_index: Tensor, edge_weight: Tensor | None = None, relative: bool = False
) -> Tensor:
    r"""Return the Dirichlet energy of node features, a scalar >= 0.

    .. math::
        E(X) = \mathrm{tr}(X^\top \tilde L X) = \frac{1}{2} \sum_{(i, j)} w_{ij}
        \left\lVert \frac{x_i}{\sqrt{1 + d_i}} - \frac{x_j}{\sqrt{1 + d_j}} \right\rVert^2, \quad
        \tilde L = I - \tilde D^{-1/2} (W + I) \tilde D^{-1/2}

    with :math:`d_i = \sum_j w_{ij}`: the symmetrically normalised Laplacian with self-loops, along which `GCNConv`
    propagates (Cai and Wang 2020, definition 2). It is 0 where :math:`x_i / \sqrt{1 + d_i}` is the same on every
    connected component, thus for constant features on a regular graph, and without edges.

    Args:
        x: (N, F) features.
        edge_index: (2, E) edges, both ways; one that stands there one way only counts half both ways.
        edge_weight: (E,) weights >= 0; default 1.
        relative: Divide by the squared norm of `x`: a number in [0, 2), the same for any multiple of `x`, so that
            layers and depths compare. 0 for features that are 0.
    """
    source, target = edge_index
    weight = x.new_ones(source.numel()) if edge_weight is None else edge_weight.to(x.dtype)
    degree = x.new_zeros(x.size(0)).index_add(0, source, weight / 2).index_add(0, target, weight / 2)
    scaled = x / (1 + degree).sqrt().unsqueeze(-1)
    energy = 0.5 * (weight * (scaled[source] - scaled[target]).square().sum(-1)).sum()
    if not relative:
        return energy
    norm = x.square().sum()
    return torch.where(norm > 0, energy / norm, torch.zeros_like(energy))


@torch.no_grad()
def layer_energies(coordinator: Coordinator, data: Data) -> list[float]:
    """Return the relative Dirichlet energy of the coordinator's input h^0 and of the features after each convolution.

    Args:
        coordinator: The network; a ready stack of PyG (``GCN``, ``GIN``, ...) counts as one convolution.
        data: A graph with ``x`` as the coordinator is given it, ``edge_index``, and ``edge_weight`` where there is one.
    """
    weight = data.edge_weight if "edge_weight" in data else None
    return [float(dirichlet_energy(h, data.edge_index, weight, relative=True)) for h in coordinator.states(data)]


def coordinator_energies(model: StructLoraModel) -> list[float] | None:
    """Return `layer_energies` of a model on its current graph.

    None without a coordinator, and where they are not defined: a transform of the graph may make edge weights negative.
    """
    *_, last = model.graph_pass.stages
    graph, levels = model.adapter_graph(), model.graph_pass.levels
    if levels is not None and levels.network is not None:
        energies = layer_energies(levels.network, levels.seen(graph))
    elif isinstance(last, Coordinator):
        graph.x = graph.x - graph.message  # what the coordinator was given
        energies = layer_energies(last, graph)
    else:
        return None
    return energies if all(map(math.isfinite, energies)) else None


def attention(model: StructLoraModel) -> list[Attention]:
    """Return the attention weights of the coordinator on the current adapter graph, layer by layer.

    Args:
        model: A model whose coordinator has convolutions that take ``return_attention_weights``: ``GATConv``,
            ``GATv2Conv``, ``TransformerConv``, ``RGATConv``, and the stack ``GAT``.

    Returns:
        ``(edge_index (2, E'), alpha (E', heads))`` per layer, detached, in eval mode. The edges are those that the
        convolution really used, with the loops it added (``GATConv`` and ``GATv2Conv`` do): over the edges into a
        node, the weights of a head add up to 1.

    Raises:
        ValueError: If the coordinator has no such convolution.
    """
    with watched_attention(model.graph_pass) as found:
        model.adapter_graph()
    if not found:
        config = model.structlora_config.coordinator
        raise ValueError(
            f"coordinator.conv={config.conv} with coordinator.hetero={config.hetero} has no attention weights over the "
            "graph's edges; choose GATv2Conv or TransformerConv, with hetero=none"
        )
    return found


@dataclass(frozen=True, kw_only=True)
class Importance:
    """Directions of all updates, K of them, in the order of the graph's nodes.

    Attributes:
        removal: (K,) rise of the loss when the direction's gate is set to 0.
        first_order: (K,) estimate of it from one backward pass.
        gate: (K,) what the filter learned: the logit of the gate where it has one (the gates themselves are cut at 1,
            so that all the open ones are equal), else the gate.
        norm: (K,) norm of the direction without its gate.
        level: (K,) noise level of its rank code in training; 0 without noise.
    """

    removal: Tensor
    first_order: Tensor
    gate: Tensor
    norm: Tensor
    level: Tensor

    def correlations(self) -> dict[str, float | None]:
        """Return Spearman's rank correlations; None where one side is constant.

        ``removal_gate`` and ``removal_level`` are those that count; ``removal_norm`` is what the size alone would have
        told; ``removal_first_order`` says how good the estimate is; ``gate_first_order`` pairs the gate with it.
        """
        pairs = {
            "removal_gate": (self.removal, self.gate),
            "removal_level": (self.removal, self.level),
            "removal_norm": (self.removal, self.norm),
            "removal_first_order": (self.removal, self.first_order),
            "gate_first_order": (self.gate, self.first_order),
        }
        return {name: _rank_correlation(*pair) for name, pair in pairs.items()}


def direction_importance(model: StructLoraModel, loss: Callable[[], Tensor]) -> Importance:
    """Measure every direction of a coordinated model in eval mode; it is left as it was.

    The cost is one forward pass a direction, and one backward pass.

    Args:
        model: The model; plain LoRA is one without filter, coordinator and edges.
        loss: Runs the model on examples that stay the same, and returns a scalar loss.
    """
    graph_pass = model.graph_pass
    gates = graph_pass.stages[0]
    with evaluating(model):
        factor = torch.ones_like(graph_pass.graph.scaling).requires_grad_()
        with _factor(gates, factor), torch.enable_grad():
            (gradient,) = torch.autograd.grad(loss(), factor)
        with torch.no_grad():
            graph = model.adapter_graph()
            exists = graph.scaling != 0
            with _factor(gates, torch.ones_like(factor)) as varied:
                model.hooks.run()
                start = float(loss())
                rise = torch.zeros_like(varied)
                for i, j in exists.nonzero().tolist():
                    varied[i, j] = 0.0
                    model.hooks.run()
                    rise[i, j] = float(loss()) - start
                    varied[i, j] = 1.0
        model.hooks.run()
    learned = gates.logits.detach() if isinstance(gates, IBFilter) else graph.gate
    level = graph.level.expand_as(rise) if "level" in graph else torch.zeros_like(rise)
    chosen = (rise, -gradient, learned, _norms(graph_pass), level)
    removal, first_order, gate, norm, level = (values[exists].double().cpu() for values in chosen)
    return Importance(removal=removal, first_order=first_order, gate=gate, norm=norm, level=level)


@torch.no_grad()
def close_directions(model: StructLoraModel, worth: Tensor, share: float = 0.1) -> int:
    """Set the directions of least worth to exactly 0, once training is over; return how many they are.

    The rise of the held-out loss without a direction estimates the information, in nats, that it alone has on the
    labels. Directions that have none can go: ``export(folder, ragged=True)`` leaves them out.

    Args:
        model: The model; messages that change updates can open a direction again.
        worth: (K,) of every direction, such as `Importance.removal` on held-out examples.
        share: Part of all directions that is closed, in [0, 1).

    Raises:
        ValueError: If there are not as many directions.
    """
    graph, adapters = model.graph_pass.graph, model.graph_pass.adapters
    exists = graph.scaling.flatten() != 0
    if len(worth) != (count := int(exists.sum())):
        raise ValueError(f"the model has {count} directions, got the worth of {len(worth)}")
    closed = torch.zeros_like(exists)
    closed[exists.nonzero().flatten()[worth.argsort()[: int(share * count)].to(exists.device)]] = True
    for start, adapter in zip(graph.first_row, adapters, strict=True):
        adapters.pair(adapter)[1][:, closed[start : start + adapter.r]] = 0.0
    return int(closed.sum())


@torch.no_grad()
def _norms(graph_pass: GraphPass) -> Tensor:
    """Return ``|b_j| |a_j|`` of every direction, (N, D) as the gates."""
    graph = graph_pass.graph
    table = torch.zeros(graph.scaling.numel(), device=graph.scaling.device)
    for start, adapter in zip(graph.first_row, graph_pass.adapters, strict=True):
        a, b = graph_pass.adapters.pair(adapter)
        table[start : start + adapter.r] = (a.norm(dim=1) * b.norm(dim=0)).to(table)
    return table.view_as(graph.scaling)


@contextmanager
def _factor(gates: Any, factor: Tensor) -> Iterator[Tensor]:
    gates.factor = factor
    try:
        yield factor
    finally:
        gates.factor = None


def _rank_correlation(x: Tensor, y: Tensor) -> float | None:
    from scipy.stats import spearmanr  # slow to import, and all that reads it is done after training

    if len(x.unique()) < 2 or len(y.unique()) < 2:
        return None
    rho = float(spearmanr(x.numpy(), y.numpy()).statistic)
    return rho if math.isfinite(rho) else None
