"""Controls keep what they say they keep, and take away the rest."""

import warnings

import pytest
import torch
from helpers.adapted import adapt
from helpers.graphs import graph
from helpers.tiny import ARCHITECTURES, loss
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch_geometric.utils import dense_to_sparse, to_dense_adj

from structlora_pyg import ConfigError, Coordinator, StructLoraConfig, parameter_groups
from structlora_pyg.data.edges import shuffled

CONVS = ("GCNConv", "GATv2Conv", "SAGEConv", "GINConv", "TransformerConv")


def dense(edge_index: torch.Tensor, edge_weight: torch.Tensor, n: int) -> torch.Tensor:
    return to_dense_adj(edge_index, edge_attr=edge_weight, max_num_nodes=n)[0]


@given(st.integers(2, 12), st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_shuffled_edges_are_the_same_graph_with_its_nodes_exchanged(n: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    before = torch.rand(n, n, generator=g) * (torch.rand(n, n, generator=g) < 0.4)  # one way is not the other
    edge_index, edge_weight = dense_to_sparse(before)
    edges = shuffled(edge_index, edge_weight, n, seed)
    after = dense(*edges, n)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(after[order][:, order], before)
    assert sorted((after > 0).sum(1).tolist()) == sorted((before > 0).sum(1).tolist())
    assert all(torch.equal(a, b) for a, b in zip(edges, shuffled(edge_index, edge_weight, n, seed), strict=True))


@pytest.mark.parametrize("known", [False, True], ids=["chain", "gradients"])
def test_shuffled_nodes_keep_their_codes_and_get_the_neighbours_of_others(known: bool) -> None:
    tiny = ARCHITECTURES["roberta"]
    plain = adapt(tiny).graph_pass.graph
    graphs = [
        adapt(tiny, graph={"edges": "hybrid", "shuffle_nodes": True}, seed=seed).graph_pass.graph for seed in (0, 1)
    ]
    cosine = torch.rand(6, 6, generator=torch.Generator().manual_seed(0)) if known else None
    for g in (plain, *graphs):
        g.set_edges(cosine)
    edges = [dense(g.edge_index, g.edge_weight, 6) for g in (plain, *graphs)]
    assert not torch.equal(edges[0], edges[1])
    assert not torch.equal(edges[1], edges[2])
    for other in edges[1:]:
        torch.testing.assert_close(other.sum(1).sort().values, edges[0].sum(1).sort().values)
    same_role = plain.role[graphs[0].edge_index[0]] == plain.role[graphs[0].edge_index[1]]
    assert torch.equal(graphs[0].edge_attr[:, 2], same_role.float())  # what joins two nodes is told of these two
    torch.testing.assert_close(graphs[0].example().x, plain.example().x)


@pytest.mark.parametrize(
    ("conv", "options"),
    [*((conv, {}) for conv in CONVS), ("GATv2Conv", {"heads": 2}), ("TransformerConv", {"heads": 2})],
)
def test_the_perceptron_has_the_parameters_of_the_convolution_and_no_messages(conv: str, options: dict) -> None:
    data = graph()
    made = {"conv": conv, "num_layers": 2, "hidden_channels": 24, "conv_kwargs": options}
    full, control = (Coordinator(data.x.size(1), **made, messages=messages) for messages in (True, False))
    counts = [sum(p.numel() for p in c.parameters() if p.requires_grad) for c in (full, control)]
    assert abs(counts[0] - counts[1]) <= 2 * 24
    assert abs(counts[0] - counts[1]) < 0.02 * counts[0]
    for network in (full, control):
        nn.init.constant_(network.gain, 0.5)
    cut = data.clone()
    cut.edge_index, cut.edge_weight = data.edge_index[:, :4], data.edge_weight[:4]
    assert not torch.allclose(full(cut).message, full(data).message, atol=1e-4)
    assert torch.equal(control(cut).message, control(data).message)
    control(data).message.square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in control.convs.parameters())


def test_a_frozen_coordinator_trains_its_gain_and_nothing_else_and_is_a_part_of_a_checkpoint(tmp_path) -> None:
    tiny = ARCHITECTURES["roberta"]
    model, batch = adapt(tiny, coordinator={"conv": "GATv2Conv", "frozen": True, "hidden_channels": 8}), tiny.batch()
    coordinator = model.graph_pass.stages[-1]
    start = {name: p.detach().clone() for name, p in coordinator.named_parameters()}
    assert len(start) > 5
    optimizer = torch.optim.AdamW(parameter_groups(model, 1e-2))
    model.train()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for _ in range(4):
            loss(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
    for name, p in coordinator.named_parameters():
        assert torch.equal(p, start[name]) == (name != "output.gain"), name
        assert (p in optimizer.state) == (name == "output.gain"), name
    assert model.parameter_counts()["training_only"] == 1 + model.graph_pass.stages[0].gate_offset.numel()
    with torch.no_grad():
        coordinator.input.weight.add_(1.0)
    model.save_pretrained(str(tmp_path))
    restored = type(model).from_pretrained(tiny.model(), tmp_path)
    assert torch.equal(*(m.graph_pass.stages[-1].input.weight for m in (model, restored)))
    assert restored.parameter_counts() == model.parameter_counts()


def test_controls_without_effect_are_refused() -> None:
    with pytest.raises(ConfigError) as error:
        StructLoraConfig(
            graph={"edges": "none", "shuffle_nodes": True},
            coordinator={"conv": "none", "messages": False, "frozen": True},
        )
    assert [p.split(" has no effect")[0] for p in error.value.problems] == [
        "graph.shuffle_nodes", "coordinator.messages=false", "coordinator.frozen=true",
    ]  # fmt: skip
