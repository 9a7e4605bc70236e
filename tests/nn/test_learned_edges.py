"""Learned edges."""

import pytest
import torch
from helpers.adapted import adapt, train
from helpers.tiny import ARCHITECTURES, loss
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_geometric.data import Batch, Data
from torch_geometric.utils import is_undirected

from structlora_pyg import ConfigError, Coordinator
from structlora_pyg.nn import LearnedEdges

TINY = ARCHITECTURES["llama"]


def candidates(n: int = 7, channels: int = 5, seed: int = 0) -> Data:
    """Return a complete graph with random codes."""
    i, j = torch.cartesian_prod(torch.arange(n), torch.arange(n)).T
    x = torch.randn(n, channels, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Data(x=x, edge_index=torch.stack([i, j])[:, i != j])


def stage(channels: int = 5, **options) -> LearnedEdges:
    torch.manual_seed(1)
    return LearnedEdges(channels, **options).double()


@given(st.integers(2, 9), st.integers(1, 10), st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_learned_edges_are_the_strongest_of_the_weighted_cosine(n: int, top_k: int, seed: int) -> None:
    data, made = candidates(n, seed=seed), stage(top_k=top_k, heads=3)
    with torch.no_grad():
        graph = made(data)
        similarity = sum(
            torch.nn.functional.cosine_similarity(data.x[:, None] * w, data.x[None] * w, dim=-1) for w in made.weight
        )
    want = (1 + similarity / 3) / 2
    keep = torch.zeros(n, n, dtype=torch.bool)
    for i in range(n):
        others = sorted((j for j in range(n) if j != i), key=lambda j: -float(want[i, j]))
        keep[i, others[:top_k]] = True
    keep = keep | keep.T
    assert torch.equal(graph.edge_index, keep.nonzero().T)
    torch.testing.assert_close(graph.edge_weight, want[keep], atol=1e-12, rtol=1e-12)
    assert is_undirected(graph.edge_index, graph.edge_weight)
    assert ((graph.edge_weight >= 0) & (graph.edge_weight <= 1)).all()


def test_learned_edges_depend_neither_on_the_order_nor_on_the_batch_and_leave_their_input_alone() -> None:
    data, made = candidates(), stage(top_k=2)
    before = data.clone()
    order = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    moved = Data(x=data.x[order], edge_index=order.argsort()[data.edge_index])
    with torch.no_grad():
        one, two = (torch.zeros(7, 7, dtype=torch.float64) for _ in range(2))
        a, b = made(data), made(moved)
        one[tuple(a.edge_index)], two[tuple(order[b.edge_index])] = a.edge_weight, b.edge_weight
    torch.testing.assert_close(one, two)
    assert data.keys() == before.keys()
    assert all(torch.equal(data[k], before[k]) for k in before.keys())  # noqa: SIM118
    graphs = [candidates(4, seed=3), candidates(6, seed=4)]
    with torch.no_grad():
        batch, first, second = (made(g) for g in (Batch.from_data_list(graphs), *graphs))
    assert torch.equal(batch.edge_index, torch.cat([first.edge_index, second.edge_index + 4], dim=1))
    torch.testing.assert_close(batch.edge_weight, torch.cat([first.edge_weight, second.edge_weight]))


def test_codes_that_are_zero_have_no_edges_and_give_finite_gradients() -> None:
    data, made = candidates(6, 16), stage(16, top_k=2)
    coordinator = Coordinator(16, "GCNConv", hidden_channels=8).double()
    with torch.no_grad():
        coordinator.gain.fill_(0.5)
    for empty in (slice(0, 2), slice(None)):
        data.x = candidates(6, 16).x.index_fill(0, torch.arange(6)[empty], 0.0).requires_grad_()
        graph = made(data)
        assert not torch.isin(graph.edge_index, torch.arange(6)[empty]).any()
        assert bool(graph.num_edges) == (empty == slice(0, 2))
        coordinator(graph).x.square().sum().backward()
        assert torch.isfinite(data.x.grad).all()
        assert torch.isfinite(made.weight.grad).all()


@pytest.mark.parametrize("conv", ["GCNConv", "GATv2Conv"])
def test_learned_edges_get_gradients_and_move(conv: str) -> None:
    graph = {"edges": "learned", "top_k": 2, "refresh_every": 1, "edge_features": conv == "GATv2Conv"}
    model = adapt(TINY, graph=graph, coordinator={"conv": conv, "hidden_channels": 8})
    learned = model.graph_pass.stages[1]
    before = learned.weight.detach().clone()
    train(model, TINY.batch(), steps=6)
    assert not torch.equal(learned.weight, before)
    assert not torch.allclose(learned.weight / before, (learned.weight / before)[0, 0])  # more than weight decay
    result = model.adapter_graph()
    assert result.is_undirected()
    assert result.edge_weight.min() > 0
    if conv == "GATv2Conv":
        assert torch.equal(result.edge_attr[:, 0], result.edge_weight)
    learned.weight.grad = None
    loss(model.train(), TINY.batch()).backward()
    assert float(learned.weight.grad.abs().sum()) > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"coordinator": {"conv": "SAGEConv"}}, "no gradient would reach them.*GCNConv"),
        ({"coordinator": {"conv": "none"}}, r"graph\.edges=learned has no effect with coordinator\.conv=none"),
        ({"graph": {"edges": "learned", "transforms": ["TwoHop"]}}, "learned ones change at every step"),
    ],
)
def test_learned_edges_that_nothing_would_train_are_refused(changes, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        adapt(TINY, **{"graph": {"edges": "learned"}, **changes})
