"""Stock PyG transforms, edge features and edge types in the adapter graph."""

import pytest
import torch
import torch_geometric.transforms as T
from helpers.adapted import adapt, train
from helpers.tiny import ARCHITECTURES

TINY = ARCHITECTURES["llama"]
LAPLACIAN = {"name": "AddLaplacianEigenvectorPE", "k": 2, "is_undirected": True}


def graph_of(**options):
    return adapt(TINY, graph={"refresh_every": 2, **options}).adapter_graph()


def test_positional_encodings_are_those_of_pyg_and_enter_the_coordinator() -> None:
    graph = graph_of(edges="depth_chain", transforms=[{"name": "AddRandomWalkPE", "walk_length": 3}])
    plain = graph_of(edges="depth_chain")
    want = T.AddRandomWalkPE(3, attr_name="walk")(plain.clone()).walk
    torch.testing.assert_close(graph.random_walk_pe, want)
    wide = adapt(TINY, graph={"transforms": [LAPLACIAN]}).graph_pass.stages[1]
    assert wide.input.in_features == 256 + 2


def test_a_virtual_node_is_joined_to_all_adapters_and_has_no_direction() -> None:
    graph = graph_of(transforms=["VirtualNode"], virtual_nodes=1, edge_types=True)
    assert graph.num_nodes == 7
    assert graph.name[-1] == "virtual 0"
    assert set(graph.edge_index[1][graph.edge_index[0] == 6].tolist()) == set(range(6))
    assert not graph.scaling[6].any()
    assert not graph.gate[6].any()
    assert set(graph.edge_type[(graph.edge_index == 6).any(0)].tolist()) == {3}


def test_transforms_are_applied_again_when_edges_are_refreshed() -> None:
    model = adapt(TINY, graph={"edges": "gradient", "threshold": 0.0, "refresh_every": 1, "transforms": [LAPLACIAN]})
    before = model.graph_pass.graph.feature_laplacian_eigenvector_pe.clone()
    train(model, TINY.batch(), steps=4)
    assert not torch.equal(model.graph_pass.graph.feature_laplacian_eigenvector_pe, before)


def test_edge_features_say_what_joins_two_adapters() -> None:
    graph = graph_of(edges="full", edge_features=True)
    for (i, j), (weight, distance, same_role, same_block) in zip(
        graph.edge_index.T.tolist(), graph.edge_attr, strict=True
    ):
        assert float(weight) == 1.0
        assert float(distance) == abs(int(graph.depth[i]) - int(graph.depth[j])) / 2
        assert bool(same_role) == bool(graph.role[i] == graph.role[j])
        assert bool(same_block) == bool(graph.block[i] == graph.block[j])


@pytest.mark.parametrize(
    ("conv", "edges"),  # of gradient edges, the chain at the start has one type
    [("RGCNConv", "full"), ("RGCNConv", "gradient"), ("RGATConv", "full"), ("RGATConv", "gradient"),
     ("FastRGCNConv", "full"), ("FiLMConv", "gradient")],
)  # fmt: skip
def test_relational_convolutions_get_edge_types(conv: str, edges: str) -> None:
    options = {"edges": edges, "edge_types": True, "edge_features": conv == "RGATConv"}
    options |= {"refresh_every": 2, "threshold": 0.0}
    model = train(adapt(TINY, graph=options, coordinator={"conv": conv, "hidden_channels": 8}), TINY.batch())
    graph = model.adapter_graph()
    assert set(graph.edge_type.tolist()) == ({0, 1, 2} if edges == "full" else {0, 2})
    assert graph.message.abs().sum() > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"transforms": ["VirtualNod"]}, "Did you mean 'VirtualNode'"),
        ({"transforms": ["VirtualNode"]}, "graph.virtual_nodes=1"),
        ({"transforms": ["LargestConnectedComponents"]}, "cannot vanish"),
        ({"transforms": ["NormalizeFeatures"]}, "has no effect"),
        ({"transforms": [{"name": "AddRandomWalkPE"}]}, "needs walk_length"),
        ({"transforms": ["ToDense"]}, "ToDense"),
        ({"virtual_nodes": 1}, "no effect"),
    ],
)
def test_unfit_transforms_are_refused_with_the_fix(options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        graph_of(**options)
