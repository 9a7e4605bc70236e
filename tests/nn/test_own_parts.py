"""Parts of one's own, by dotted path, class or object, and whatever they ask for by name."""

import copy
import functools
import sys
import types

import pytest
import torch
import torch_geometric.nn as pyg_nn
import torch_geometric.transforms as T
from helpers.adapted import adapt, train
from helpers.graphs import graph
from helpers.tiny import ARCHITECTURES, logits
from torch import Tensor, nn
from torch_geometric.data import Batch, Data
from torch_geometric.explain import AttentionExplainer, Explainer, GNNExplainer
from torch_geometric.loader import DataLoader

from structlora_pyg import Coordinator, IBFilter, StructLoraModel
from structlora_pyg.data import Encoding
from structlora_pyg.nn import Filter, Lift

TINY = ARCHITECTURES["llama"]


class Asks(nn.Module):
    """Wants attributes of nodes and edges that no convolution of PyG wants, and the adjacency as a matrix."""

    def __init__(this, channels: int) -> None:
        super().__init__()
        this.conv, this.embed = pyg_nn.GraphConv(channels, channels), nn.Embedding(16, channels)

    def forward(self, x, adj_t, depth, role, node_type, block, gate, batch, edge_attr, laplacian_eigenvector_pe, data):
        assert len(gate) == len(role) == len(block) == len(laplacian_eigenvector_pe) == data.num_nodes
        assert edge_attr.size(1) == 4
        assert batch is None
        return self.conv(x + self.embed(depth) + self.embed(node_type), adj_t) * gate.mean(-1, keepdim=True)


class Scale(nn.Module):
    """A stage with a parameter."""

    def __init__(self, channels: int, start: float = 1.0) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.full((channels,), start))

    def forward(self, data: Data) -> Data:
        data = copy.copy(data)
        data.x = data.x * self.factor
        return data


class Code(Encoding):
    """An encoding with a constructor of its own."""

    def __init__(self, in_widths, out_widths) -> None:
        super().__init__(in_widths, out_widths, size=3)


class Halve(Filter):
    """A filter without parameters, with one argument of its own."""

    def __init__(self, scaling, slots, keep) -> None:
        super().__init__(scaling, slots)
        self.keep = keep

    def gates(self, data):
        gate = torch.full_like(data.scaling, self.keep)
        return gate, gate.new_zeros(())


class Grow(Lift):
    """A lift without parameters."""

    def forward(self, A, B, m, a, b, C, P, Q):
        return A, B * (m * (1 + C.mean((1, 2)).unsqueeze(1))).unsqueeze(1)


def ring(nodes: Data) -> tuple[Tensor, Tensor]:
    """Join every node to the next, with weights by depth."""
    i = torch.arange(nodes.num_nodes)
    j = i.roll(1)
    return torch.cat([torch.stack([i, j]), torch.stack([j, i])], dim=1), 1 / (1 + nodes.depth[i].repeat(2))


OWN = {
    "graph": {"edges": ring, "edge_features": True, "transforms": [{"name": "AddLaplacianEigenvectorPE", "k": 2}]},
    "coordinator": {"conv": Asks, "lift": Grow, "hidden_channels": 8},
    "encoding": {"kind": Code},
    "filter": {"kind": Halve},
    "stages": [Scale, {"name": Scale, "start": 0.5}],
}


def by_path(part):
    """Return the same setting with dotted paths in the place of classes and functions."""
    if isinstance(part, dict):
        return {key: by_path(value) for key, value in part.items()}
    if isinstance(part, list):
        return [by_path(value) for value in part]
    return f"own_parts.{part.__name__}" if isinstance(part, (type, types.FunctionType)) else part


@pytest.mark.parametrize("named", [False, True], ids=["classes", "paths"])
def test_every_part_may_be_ones_own_and_is_restored_from_a_checkpoint(named: bool, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "own_parts", sys.modules[__name__])
    model = train(adapt(TINY, **(by_path(OWN) if named else OWN)), TINY.batch())
    (halve, one, two, coordinator) = model.graph_pass.stages
    assert type(halve).__name__ == "Halve"
    assert isinstance(one, Scale)
    assert float(two.factor[0]) == pytest.approx(0.5, abs=0.2)
    assert coordinator.input.in_features == 9 + 2
    assert type(model.graph_pass.lift) is Grow
    built = model.adapter_graph()
    assert set(map(tuple, built.edge_index.T.tolist())) == {
        (i, j) for i in range(6) for j in ((i + 1) % 6, (i - 1) % 6)
    }
    assert built.is_sorted(sort_by_row=False)
    model.save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match=r"graph\.edges=.*ring"):
        StructLoraModel.from_pretrained(TINY.model(), tmp_path)
    again = StructLoraModel.from_pretrained(TINY.model(), tmp_path, trust_remote_code=True).eval()
    assert torch.equal(logits(again, TINY.batch()), logits(model, TINY.batch()))


def test_a_stage_put_in_by_hand_is_restored_into_a_model_that_has_it_too(tmp_path) -> None:
    model = adapt(TINY)
    model.graph_pass.stages.insert(1, Scale(256))
    train(model, TINY.batch()).save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="put in by hand belong into its `stages`"):
        StructLoraModel.from_pretrained(TINY.model(), tmp_path)
    again = adapt(TINY, stages=[Scale(256)])
    again.load_training_state(tmp_path)
    assert torch.equal(logits(again.eval(), TINY.batch()), logits(model, TINY.batch()))


CONVS = {
    "name of GraphGym": lambda: {"conv": "gcn_conv"},
    "partial": lambda: {"conv": functools.partial(pyg_nn.GATv2Conv, heads=2)},
    "widths of a perceptron": lambda: {"conv": "GINConv", "conv_kwargs": {"nn": [12, 12]}},
    "sorted aggregation": lambda: {"conv": "SAGEConv", "conv_kwargs": {"aggr": "lstm"}},
    "relations": lambda: {"conv": {"same_role": "GCNConv", "other": "GATv2Conv"}, "hetero": "hetero_conv"},
    "registered with GraphGym": lambda: {"conv": "halves"},
    "HeteroConv": lambda: {
        "conv": pyg_nn.HeteroConv(
            {
                ("q_proj", "other", "v_proj"): pyg_nn.SAGEConv(8, 8),
                ("v_proj", "other", "q_proj"): pyg_nn.GATConv((8, 8), 8, add_self_loops=False),
            }
        ),
        "hetero": "hetero_conv",
    },
}


class Halves(nn.Module):
    """A layer as GraphGym has them."""

    def __init__(self, layer_config, **kwargs) -> None:
        super().__init__()
        self.lin = nn.Linear(layer_config.dim_in, layer_config.dim_out)

    def forward(self, batch):
        batch.x = self.lin(batch.x) / 2
        return batch


@pytest.mark.parametrize("given", CONVS)
def test_convolutions_are_written_as_pyg_writes_them(given: str, monkeypatch) -> None:
    from torch_geometric.graphgym import register

    monkeypatch.setitem(register.layer_dict, "halves", Halves)
    options = {"edges": "full"} if given == "HeteroConv" else {"edges": "gradient", "threshold": 0.0, "top_k": 6}
    made = {"hidden_channels": 8, **CONVS[given]()}
    if given == "relations":
        made["conv"]["same_block"] = pyg_nn.GraphConv(8, 8)
    model = train(adapt(TINY, graph={"refresh_every": 1, **options}, coordinator=made), TINY.batch())
    assert model.adapter_graph().message.abs().sum() > 0


def layer(conv: str = "GCNConv", **options) -> Coordinator:
    torch.manual_seed(0)
    made = Coordinator(16, conv, hidden_channels=8, **options)
    nn.init.constant_(made.gain, 0.5)
    return made.eval()


@torch.no_grad()
def test_a_coordinator_is_a_layer_of_tensors_and_a_transform_of_graphs() -> None:
    data = graph()
    for conv in ("GCNConv", "SAGEConv", "GraphConv"):
        made = layer(conv)
        assert torch.equal(made(data.x, data.edge_index, data.edge_weight), made(data).x)
        assert torch.equal(T.Compose([made])(data).x, made(data).x)
        sparse = T.ToSparseTensor(attr="edge_weight")(copy.copy(data))
        if conv != "SAGEConv":  # which takes weights of a matrix, and no others
            torch.testing.assert_close(made(sparse).x, made(data).x)
    assert not torch.equal(layer()(data.x, data.edge_index), layer()(data).x)  # the weights were heard
    walk = T.AddRandomWalkPE(4)(copy.copy(data))
    assert layer(example=walk).input.in_features == 20
    other = walk.clone()
    other.random_walk_pe = walk.random_walk_pe.flip(0)
    assert not torch.equal(layer(example=walk)(other).x, layer(example=walk)(walk).x)
    made.reset_parameters()
    assert torch.equal(made(data).x, data.x)


@torch.no_grad()
def test_a_layer_alone_takes_the_attributes_and_types_of_edges_that_its_convolution_names() -> None:
    data = graph()
    given = {"edge_attr": torch.rand(data.num_edges, 3), "edge_type": torch.arange(data.num_edges) % 3}
    for name, conv, options in (
        ("edge_type", "RGCNConv", {"num_relations": 3}),
        ("edge_attr", "GINEConv", {"edge_dim": 3}),
        ("edge_type", pyg_nn.RGATConv(8, 8, num_relations=3), None),
        ("edge_attr", pyg_nn.GATv2Conv(8, 8, edge_dim=3), None),
    ):
        made, other = layer(conv, conv_kwargs=options), given[name].flip(0)
        x = made(data.x, data.edge_index, **{name: given[name]})
        assert not torch.equal(x, made(data.x, data.edge_index, **{name: other}))


@torch.no_grad()
def test_a_batch_gives_node_for_node_what_its_graphs_give() -> None:
    graphs = [graph(6, seed=0), graph(4, seed=1), graph(5, seed=2)]
    for i, data in enumerate(graphs):
        data.x, data.active, data.step = data.x * 10**i, i != 1, i
    for made in (layer("GATv2Conv"), layer("GraphConv", num_layers=2)):
        single = torch.cat([made(data).message for data in graphs])
        torch.testing.assert_close(made(Batch.from_data_list(graphs)).message, single)
        assert not single[6:10].any()
    models = [adapt(TINY), adapt(TINY)]
    (batch,) = DataLoader([model.adapter_graph() for model in models], batch_size=2)
    assert batch.num_graphs == 2


def test_tools_of_pyg_take_a_coordinator_as_it_is() -> None:
    data, kind = graph(), {"explanation_type": "model", "edge_mask_type": "object"}
    kind["model_config"] = {"mode": "regression", "task_level": "node", "return_type": "raw"}
    for conv, algorithm in (("GCNConv", GNNExplainer(epochs=3)), ("GATConv", AttentionExplainer())):
        found = Explainer(layer(conv), algorithm, **kind)(data.x, data.edge_index, index=2)
        assert found.edge_mask.shape == (data.num_edges,)
    assert "GCNConv" in pyg_nn.summary(layer(), data.x, data.edge_index)
    captum = pyg_nn.to_captum_model(layer(), "node_and_edge", output_idx=2)
    mask = torch.ones(1, data.num_edges, requires_grad=True)
    (gradient,) = torch.autograd.grad(captum(data.x.unsqueeze(0), mask, data.edge_index).sum(), mask)
    assert bool(gradient.any())
    types = ["q", "v"], [("q", "a", "q"), ("q", "b", "v"), ("v", "c", "q")]
    typed = pyg_nn.to_hetero(layer("SAGEConv"), types)
    edges = {key: torch.tensor([[0, 1], [1, 2]]) for key in types[1]}
    out = typed({"q": torch.randn(4, 16), "v": torch.randn(3, 16)}, edges)
    assert {key: value.shape for key, value in out.items()} == {"q": (4, 16), "v": (3, 16)}


def test_messages_of_errors_name_arguments_and_no_keys_of_a_configuration() -> None:
    for conv, options, fix in (
        ("RGCNConv", {}, "conv_kwargs={'num_relations'"),
        ("GINEConv", {}, "a graph with edge_attr"),
        ("HGTConv", {}, "hetero=hetero_conv"),
        ("NNConv", {"hetero": "hetero_conv"}, "metadata"),
        ("GCNCov", {}, "Did you mean 'GCNConv'"),
        ("no.such.Conv", {}, "cannot be imported"),
        ("PointNetConv", {}, "cannot run"),
        ("HypergraphConv", {}, "does not run along edge_index"),
    ):
        with pytest.raises(ValueError, match=fix) as error:
            Coordinator(16, conv, **options)
        assert "coordinator." not in str(error.value)
    with pytest.raises(ValueError, match="'foo' is no stage and no dotted path"):
        adapt(TINY, stages=["foo"])


def test_batch_statistics_in_an_instance_are_warned_about() -> None:
    inner = pyg_nn.MLP([8, 8, 8])  # with PyG's default norm
    with pytest.warns(UserWarning, match="batch statistics"):
        layer(pyg_nn.GINConv(inner))


@torch.no_grad()
def test_a_filter_keeps_what_transforms_made_of_x_and_takes_batches() -> None:
    graphs = [graph(seed=seed) for seed in (0, 1)]
    for step, data in enumerate(graphs):
        data.step, data.active = step, step == 1
    made = IBFilter(graphs[0].scaling, init_logit=0.0)
    batch = made(Batch.from_data_list(graphs))
    for name in ("gate", "x"):
        torch.testing.assert_close(batch[name], torch.cat([made(data)[name] for data in graphs]))
    assert bool((batch.gate[:6] == 1).all())
    scaled = T.Compose([T.NormalizeFeatures(), made])(graphs[1].clone())
    assert not torch.allclose(scaled.x, made(graphs[1]).x)
    assert isinstance(made, T.BaseTransform)
    tensors = [graphs[1][name] for name in ("x", "code_A", "code_B", "scaling")]
    assert torch.equal(made.eval()(*tensors), made(graphs[1]).x)
    with pytest.raises(ValueError, match="gates for the 6 nodes of one model, and the graph has 4"):
        made(graph(4))
