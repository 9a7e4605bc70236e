"""The adapter graph as HeteroData, and convolutions with weights of their own for every edge type."""

import copy
from collections import Counter

import pytest
import torch
import torch_geometric.nn as pyg_nn
from helpers.adapted import adapt
from helpers.slow import slow_but
from helpers.tiny import ARCHITECTURES
from torch import Tensor, nn
from torch_geometric.data import Data, HeteroData

from structlora_pyg import ConfigError, Coordinator
from structlora_pyg.analysis.inspect import conv_reports
from structlora_pyg.data import to_hetero_data
from structlora_pyg.data.hetero import EDGE_TYPES, node_type_names
from structlora_pyg.nn.conv import CONVOLUTIONS, MODELS
from structlora_pyg.nn.hetero_conv import RelationalConv

TINY = ARCHITECTURES["llama"]
TARGETS = ["q_proj", "v_proj", "up_proj"]
USUAL = ("GraphConv", "GATv2Conv", "HGTConv")
RELATIONAL = slow_but(USUAL, dict.fromkeys((*USUAL, *CONVOLUTIONS, *MODELS)))
NAMES = ["q_proj", "v_proj"]
METADATA = (
    NAMES,
    [(a, r, b) for a in NAMES for r in EDGE_TYPES[:3] for b in NAMES if (r == "same_role") == (a == b)],
)  # fmt: skip


def cosines(n: int, seed: int = 0) -> Tensor:
    unit = nn.functional.normalize(torch.randn(n, 4, generator=torch.Generator().manual_seed(seed)), dim=1)
    return unit @ unit.T


def example(channels: int = 16, blocks: int = 3) -> Data:
    """Return a weighted graph of q and v in some blocks in which every edge type of `METADATA` occurs."""
    n = 2 * blocks
    i, j = torch.cartesian_prod(torch.arange(n), torch.arange(n)).T
    keep = (i != j) & ((i + 2 * j) % 5 != 0)
    g = torch.Generator().manual_seed(0)
    return Data(
        x=torch.randn(n, channels, generator=g),
        edge_index=torch.stack([i[keep], j[keep]]),
        edge_weight=torch.rand(int(keep.sum()), generator=g) * 0.8 + 0.1,
        role=torch.arange(n) % 2,
        block=torch.arange(n) // 2,
    )


def same_graph(hetero: HeteroData, graph: Data) -> bool:
    """Tell whether every node and every edge of a graph is there once, with all its attributes."""
    kinds = (("n_id", hetero.node_stores, graph.num_nodes), ("e_id", hetero.edge_stores, graph.num_edges))
    for key, stores, count in kinds:
        ids = torch.cat([store[key] for store in stores])
        assert torch.equal(ids.sort().values, torch.arange(count))
        for name in {*graph.node_attrs(), "name"} & {*graph.keys()} if key == "n_id" else graph.edge_attrs():
            for store in stores:
                if name == "edge_index":
                    ends = [hetero[kind].n_id for kind in store._key[::2]]
                    mine = torch.stack([n_id[row] for n_id, row in zip(ends, store.edge_index, strict=True)])
                    assert torch.equal(mine, graph.edge_index[:, store.e_id])
                else:
                    want = [graph[name][i] for i in store[key].tolist()]
                    assert all(torch.as_tensor(a == b).all() for a, b in zip(store[name], want, strict=True))
    return True


@pytest.mark.parametrize(
    "options",
    [
        {"edges": "hybrid", "threshold": 0.0, "edge_features": True, "edge_types": True},
        {"edges": "hybrid", "transforms": ["VirtualNode"], "virtual_nodes": 1},
        {"edges": "depth_chain", "node": "layer"},
        {"edges": "none"},
        {"edges": "learned"},  # all codes are 0, so there is no edge yet
        {"edges": "gradient", "threshold": 0.0, "top_k": 1},
    ],
    ids=lambda o: "+".join(map(str, o.values())),
)
def test_hetero_data_hold_every_node_and_edge_with_all_attributes(options) -> None:
    model = adapt(TINY, target_modules=TARGETS, graph=options)
    model.graph_pass.graph.set_edges(cosines(model.graph_pass.graph.num_nodes))
    graph, hetero = model.adapter_graph(), model.hetero_adapter_graph()
    assert hetero.validate(raise_on_error=True)
    assert same_graph(hetero, graph)
    mixed = copy.copy(graph)  # nothing depends on the order in which nodes and edges come
    order = torch.randperm(graph.num_edges, generator=torch.Generator().manual_seed(0))
    for key in graph.edge_attrs():
        mixed[key] = graph[key][:, order] if key == "edge_index" else graph[key][order]
    assert same_graph(to_hetero_data(mixed, model.graph_pass.graph.node_types), mixed)


def test_as_many_edges_as_nodes_are_not_taken_for_nodes() -> None:
    graph = example()
    graph = Data(**{k: v[..., :6] if k.startswith("edge") else v for k, v in graph.to_dict().items()})
    assert graph.num_edges == graph.num_nodes
    assert same_graph(to_hetero_data(graph, NAMES), graph)


def test_types_say_which_roles_an_edge_joins_and_how() -> None:
    model = adapt(TINY, target_modules=TARGETS, graph={"edges": "full"})
    graph, hetero = model.adapter_graph(), model.hetero_adapter_graph()
    assert hetero.node_types == model.graph_pass.graph.node_types == TARGETS
    assert sum(store.edge_index.size(1) for store in hetero.edge_stores) == graph.num_edges == 9 * 8
    for name in TARGETS:
        assert all(n.endswith(name) for n in hetero[name].name)
        assert torch.equal(hetero[name].x, graph.x[hetero[name].n_id])
    for source, relation, target in hetero.edge_types:
        i, j = hetero[source, relation, target].edge_index
        same_block = hetero[source].block[i] == hetero[target].block[j]
        assert (source == target) == (relation == "same_role")
        assert bool((same_block == (relation == "same_block")).all())
    assert Counter(relation for _, relation, _ in hetero.edge_types) == {"same_role": 3, "same_block": 6, "other": 6}


def test_metadata_names_every_type_that_a_refresh_can_bring() -> None:
    graph = adapt(TINY, graph={"edges": "gradient", "threshold": 0.0, "top_k": 2}).graph_pass.graph
    node_types, edge_types = graph.metadata()
    assert (node_types, edge_types) == (METADATA[0], sorted(METADATA[1], key=edge_types.index))
    seen = set()
    for seed in range(8):
        graph.set_edges(cosines(6, seed))
        seen |= set(to_hetero_data(graph.example(), node_types).edge_types)
    assert seen == set(edge_types)
    assert adapt(TINY).graph_pass.graph.metadata()[1] == graph.metadata()[1]
    chain = adapt(TINY, graph={"edges": "depth_chain"}).graph_pass.graph
    assert chain.metadata()[1] == [("q_proj", "same_role", "q_proj"), ("v_proj", "same_role", "v_proj")]


def test_node_types_are_short_distinct_identifiers() -> None:
    roles = ["encoder.block.*.layer.*.SelfAttention.q", "decoder.block.*.layer.*.SelfAttention.q"]
    assert node_type_names(roles) == ["encoder_block_layer_SelfAttention_q", "decoder_block_layer_SelfAttention_q"]
    assert node_type_names(["blocks.*.attn.qkv[q]", "blocks.*.attn.qkv[v]"]) == ["q", "v"]
    assert node_type_names(["convs.*.mlp.0", "convs.*.mlp.3"]) == ["mlp_0", "mlp_3"]
    assert node_type_names(["*"]) == ["layer"]
    for odd in (["virtual", "a"], ["a.b__c_", "a.b_c"], ["a_b.c", "a.b_c"]):
        names = node_type_names(odd)
        assert len({*names, "virtual"}) == 3
        assert all(n.isidentifier() and "__" not in n for n in names)


@pytest.mark.parametrize("conv", ["SAGEConv", "GraphConv", "GINConv"])
def test_with_shared_weights_relations_add_up_to_the_homogeneous_convolution(conv: str) -> None:
    data = example()
    data.x, data.edge_weight = data.x.double(), data.edge_weight.double()
    kwargs = {"SAGEConv": {"aggr": "sum", "bias": False}, "GraphConv": {"bias": False}}.get(conv, {"nn": nn.Identity()})
    made = RelationalConv(conv, 16, METADATA, "hetero_conv", kwargs, data).double()
    one = getattr(pyg_nn, conv)(*([16, 16] if conv != "GINConv" else []), **kwargs).double()
    for relation in made.net.convs.values():
        relation.load_state_dict(one.state_dict())
    with torch.no_grad():
        got = made(data.x, data.edge_index, data)
        arguments = {"edge_weight": data.edge_weight} if conv == "GraphConv" else {}
        want = one(data.x, data.edge_index, **arguments)
        # Every relation that arrives brings the node's own term; the homogeneous convolution has it once.
        own = one(data.x, data.edge_index[:, :0], **{k: v[:0] for k, v in arguments.items()})
        arriving = Counter(NAMES.index(target) for _, _, target in to_hetero_data(data, NAMES).edge_types)
        extra = torch.tensor([arriving[int(role)] - 1 for role in data.role]).unsqueeze(1) * own
    torch.testing.assert_close(got, want + extra, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("conv", RELATIONAL)
def test_relational_coordination_is_equivariant_and_hears_other_roles_and_weights(conv: str) -> None:
    data, kind = example(), "to_hetero" if conv in MODELS else "hetero_conv"
    if conv not in USUAL and not any(report.name == conv and report.hetero for report in conv_reports()):
        pytest.skip(f"{conv} does not run as relations")
    options = {"hidden_channels": 8, "hetero": kind, "metadata": METADATA}
    torch.manual_seed(0)
    layers = 1 if kind == "to_hetero" else 2  # a second layer of the stack GAT forgets where a node came from
    made = Coordinator(16, conv, num_layers=layers, example=data, **options).eval()
    with torch.no_grad():
        made.gain.fill_(0.7)
        want = made(data).message
        order = torch.tensor([3, 0, 5, 1, 4, 2])
        moved = Data(**{k: v[order] for k, v in data.to_dict().items() if not k.startswith("edge")})
        moved.edge_index, moved.edge_weight = order.argsort()[data.edge_index], data.edge_weight
        torch.testing.assert_close(made(moved).message, want[order], atol=1e-5, rtol=1e-4)
        # A message from q of block 0 arrives at v of block 2, along an edge of type other only.
        single = copy.copy(data)
        single.edge_index, single.edge_weight = torch.tensor([[0, 2], [5, 0]]), torch.tensor([0.3, 0.9])
        before = made(single).message
        single.x = data.x.clone()
        single.x[0] = data.x[0].flip(0)  # of the same norm, so that the common scale stays
        after = made(single).message
        assert (before[5] - after[5]).abs().max() > 1e-4
        torch.testing.assert_close(before[[1, 3]], after[[1, 3]])
        if made.edge_information:
            lighter = copy.copy(data)
            lighter.edge_weight = data.edge_weight * torch.linspace(0.1, 1, data.num_edges)
            assert not torch.allclose(made(lighter).message, want)


def test_node_types_that_no_edge_reaches_get_nothing_and_keep_their_parameters_in_the_step() -> None:
    data = example()
    data.edge_index = torch.tensor([[0, 2], [2, 4]])  # within q alone
    for edges in (2, 0):
        data.edge_index, data.edge_weight = data.edge_index[:, :edges], torch.ones(edges, requires_grad=True)
        made = RelationalConv("GraphConv", 16, METADATA, "hetero_conv", {}, data).train()
        out = made(data.x, data.edge_index, data)
        assert bool((out[1::2] == 0).all())
        assert bool((out[::2] != 0).any()) == bool(edges)
        out.sum().backward()
        assert all(p.grad is not None for p in (*made.parameters(), data.edge_weight))


def test_an_edge_type_that_was_not_declared_is_not_dropped_in_silence() -> None:
    made = RelationalConv("GraphConv", 16, (NAMES, METADATA[1][:1]), "hetero_conv", {}, example())
    with pytest.raises(ValueError, match="no convolution for the edge type"):
        made(example().x, example().edge_index, example())


@pytest.mark.parametrize(
    ("conv", "kind", "message"),
    [
        ("GCNConv", "hetero_conv", "GCNConv cannot run on .x_src, x_dst.*GraphConv, SAGEConv.*edges=depth_chain"),
        ("RGCNConv", "hetero_conv", "tells relations apart by itself.*edge_types=true"),
        ("GraphSAGE", "hetero_conv", "set hetero=to_hetero"),
        ("SAGEConv", "to_hetero", "set hetero=hetero_conv"),
        ("PNA", "to_hetero", "GraphSAGE, GIN, GAT, EdgeCNN"),
        ("GraphConvv", "hetero_conv", "Did you mean 'GraphConv'"),
    ],
)
def test_what_cannot_run_between_roles_is_refused_with_the_fix(conv: str, kind: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adapt(TINY, coordinator={"conv": conv, "hetero": kind})


def test_misspelt_kinds_and_settings_without_effect_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"(?s)graph\.edges='learnt' is unknown.*coordinator\.hetero.*'hetero_conv'"):
        adapt(TINY, coordinator={"conv": "none", "hetero": "heteroconv"}, graph={"edges": "learnt"})
    with pytest.raises(ConfigError, match=r"coordinator\.hetero=hetero_conv has no effect with coordinator\.conv=none"):
        adapt(TINY, coordinator={"conv": "none", "hetero": "hetero_conv"})
    with pytest.raises(ValueError, match=r"metadata=graph\.metadata"):
        Coordinator(16, "GraphConv", hetero="hetero_conv")
    with pytest.raises(ValueError, match="needs edges"):
        adapt(TINY, graph={"edges": "none"}, coordinator={"conv": "GraphConv", "hetero": "hetero_conv"})
    with pytest.raises(ValueError, match="2 roles, but 1 node types"):
        to_hetero_data(example(), ["q"])
