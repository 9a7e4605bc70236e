"""Adapter graphs over training are a PyG dataset, safe to load, the same whether or not a run was interrupted."""

import pickle
from collections.abc import Callable

import pytest
import torch
import torch_geometric.transforms as T
from helpers.adapted import descend, full_config
from helpers.runs import adapter_of, assert_identical, folder_of, interrupt, tiny_config
from helpers.tiny import ARCHITECTURES
from peft import LoraConfig, get_peft_model
from torch_geometric.data import Data
from torch_geometric.loader import DataLoader

from structlora_pyg import AdapterGraphDataset, GraphRecorder, get_structlora_model
from structlora_pyg.analysis.stages import attention
from structlora_pyg.checks import ConfigError
from structlora_pyg.study.train import train

TINY = ARCHITECTURES["llama"]
HEADS = {"heads": 2, "concat": False}


def adapted(conv: str = "GATv2Conv", conv_kwargs: dict | None = None, num_layers: int = 2):
    coordinator = {"conv": conv, "conv_kwargs": conv_kwargs or {}, "num_layers": num_layers, "hidden_channels": 8}
    options = {"schedule": {"warmup_steps": 1, "ramp_steps": 1}, "encoding": {"size": 4}, "graph": {"refresh_every": 2}}
    config = full_config(r=2, target_modules=["q_proj", "v_proj"], coordinator=coordinator, **options)
    return get_structlora_model(TINY.model(), config).train()


def fit(model, steps: int, each: Callable[[], object] = lambda: None) -> None:
    for _ in range(steps):
        descend(model.parameters(), lambda: model(**TINY.batch()).loss, steps=1)
        each()


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> tuple[AdapterGraphDataset, list[Data]]:
    """A dataset of four steps, and the graphs of the model at these steps."""
    root, model, graphs = tmp_path_factory.mktemp("recorded"), adapted(), []
    recorder = GraphRecorder(model, root, codes=True)

    def record() -> None:
        recorder.record()
        graphs.append(model.adapter_graph())

    fit(model, 4, record)
    return AdapterGraphDataset(root), graphs


def test_graphs_are_those_of_the_model_at_each_step(recorded) -> None:
    dataset, graphs = recorded
    assert dataset.steps == [1, 2, 3, 4]
    assert dataset.node_names == graphs[0].name
    for found, graph in zip(dataset, graphs, strict=True):
        assert found.validate(raise_on_error=True)
        for key in ("x", "edge_index", "gate", "scaling", "message", "depth", "role", "block", "code_A", "code_B"):
            torch.testing.assert_close(found[key], graph[key], rtol=0, atol=0)
        torch.testing.assert_close(found.edge_weight, graph.edge_weight, rtol=0, atol=0)
        assert {v.dtype for v in found.to_dict().values()} == {torch.float32, torch.int64}
    assert not torch.equal(dataset[0].x, dataset[3].x)


def test_it_is_a_dataset_of_pyg(recorded) -> None:
    dataset, _ = recorded
    assert dataset[1:3].steps == [2, 3]
    assert dataset[-1].step.tolist() == [4]
    batch = next(iter(DataLoader(dataset, batch_size=4)))
    assert batch.step.tolist() == [1, 2, 3, 4]
    for k, graph in enumerate(dataset):  # what is an index was shifted with its graph
        index = batch.attention_index_0
        mine = (index >= batch.ptr[k]) & (index < batch.ptr[k + 1])
        assert torch.equal(index[:, mine[0]] - batch.ptr[k], graph.attention_index_0)
    root = dataset.root
    assert AdapterGraphDataset(root, transform=T.Constant())[0].num_features == dataset.num_features + 1
    late = AdapterGraphDataset(root, pre_filter=lambda graph: int(graph.step) > 2)
    assert late.steps == [3, 4]
    assert AdapterGraphDataset(root).steps == [1, 2, 3, 4]


def test_any_code_can_write_its_graphs(recorded, tmp_path) -> None:
    dataset, graphs = recorded
    again = AdapterGraphDataset.from_graphs(graphs[1:], tmp_path / "all")
    assert (again.steps, again.node_names) == ([2, 3, 4], dataset.node_names)
    assert torch.equal(again[0].x, dataset[1].x)
    assert AdapterGraphDataset.from_graphs(graphs[:1], tmp_path / "one")[0].step.tolist() == [1]
    without = graphs[1].clone()
    del without.message
    for given, said in (
        ([], "empty"),
        ([graphs[0], graphs[0]], "a step of its own"),
        ([Data(x=torch.ones(2, 1))], "graph 0 has no step"),
        ([graphs[0], without], "differ in message"),
    ):
        with pytest.raises(ValueError, match=said):
            AdapterGraphDataset.from_graphs(given, tmp_path / "none")
    with pytest.raises(FileExistsError, match="choose another folder"):
        AdapterGraphDataset.from_graphs(graphs, tmp_path / "one")


def test_a_recorder_left_alone_records_the_same(tmp_path) -> None:
    model = adapted()
    recorder = GraphRecorder(model, tmp_path / "a")
    fit(model, 5, lambda: model.graph_pass.step % 2 == 1 and recorder.record())  # counted at the next forward
    recorder.record()
    other = adapted()
    alone = GraphRecorder(other, tmp_path / "b", every=2)
    fit(other, 5)
    alone.record()
    a, b = (AdapterGraphDataset(tmp_path / name) for name in "ab")
    assert a.steps == b.steps == [2, 4, 5]
    assert all(torch.equal(x.x, y.x) for x, y in zip(a, b, strict=True))


def test_recording_changes_no_training_and_an_interrupted_run_leaves_the_same_files(
    tiny_bert, rte_folder, tmp_path
) -> None:
    plain, config = (
        tiny_config(tiny_bert, rte_folder, tmp_path / name, record_every=every, max_steps=5, save_every=save)
        for name, every, save in (("a", 0, 0), ("b", 3, 2))
    )
    train(plain)
    train(config)
    assert_identical(adapter_of(plain), adapter_of(config))
    root = folder_of(config) / "graphs"
    files = {file.name: file.read_bytes() for file in (root / "raw").iterdir()}
    assert AdapterGraphDataset(root).steps == [3, 5]  # the last step too
    interrupt(folder_of(config), 2)
    train(config, resume=True)
    assert {file.name: file.read_bytes() for file in (root / "raw").iterdir()} == files
    assert AdapterGraphDataset(root).steps == [3, 5]


def test_a_run_in_a_used_folder_replaces_what_it_repeats(tmp_path) -> None:
    for steps in (4, 2):
        model = adapted("none")
        recorder = GraphRecorder(model, tmp_path)
        fit(model, steps, recorder.record)
        assert AdapterGraphDataset(tmp_path).steps == list(range(1, steps + 1))


class Bomb:
    def __reduce__(self):
        return (exec, ("raise SystemExit('a file was run')",))


def test_files_of_strangers_are_never_run(recorded, tmp_path) -> None:
    _, graphs = recorded
    bomb = pickle.dumps(Bomb())
    root = tmp_path / "graphs"
    AdapterGraphDataset.from_graphs(graphs, root)
    (root / "processed").mkdir()
    for name in ("pre_transform.pt", "pre_filter.pt", "graphs.pt"):  # PyG's own files
        torch.save(Bomb(), root / "processed" / name)
    assert AdapterGraphDataset(root).steps == [1, 2, 3, 4]
    for content in (bomb, b"", (root / "raw" / "graph-00000002.pt").read_bytes()[:300]):
        (root / "raw" / "graph-00000002.pt").write_bytes(content)
        with pytest.raises(ValueError, match=r"graph-00000002\.pt is damaged .* delete it"):
            AdapterGraphDataset(root)


def test_what_cannot_be_recorded_is_refused(tmp_path, tiny_bert, rte_folder) -> None:
    with pytest.raises(FileNotFoundError, match="record_every"):
        AdapterGraphDataset(tmp_path)
    plain = get_peft_model(TINY.model(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="PeftModel has no adapter graph; give the model that get_structlora_model"):
        GraphRecorder(plain, tmp_path)
    said = r"coordinator\.conv=GCNConv with .*hetero=none has no attention weights .* choose GATv2Conv"
    with pytest.raises(ValueError, match=said):
        attention(adapted("GCNConv"))
    config = tiny_config(tiny_bert, rte_folder, tmp_path / "run", method="lora", record_every=2)
    with pytest.raises(ConfigError, match=r"train\.record_every has no effect with method\.name=lora"):
        train(config)


@pytest.mark.parametrize("conv", ["GATConv", "GATv2Conv", "TransformerConv"])
def test_attention_adds_up_to_one_over_the_edges_into_a_node(conv: str) -> None:
    model, loops = adapted(conv, HEADS), 0 if conv == "TransformerConv" else 6
    fit(model, 4)
    graph, layers = model.adapter_graph(), attention(model)
    assert len(layers) == 2
    for edge_index, alpha in layers:
        assert alpha.shape == (graph.num_edges + loops, 2)
        assert torch.equal(edge_index[:, : graph.num_edges], graph.edge_index)
        into = torch.zeros(6, 2).index_add(0, edge_index[1], alpha)
        torch.testing.assert_close(into[edge_index[1].unique()], torch.ones(len(edge_index[1].unique()), 2))
        assert alpha.std() > 0
    assert not torch.equal(layers[0][1], layers[1][1])
    assert model.graph_pass.stages[-1].convs[0]._forward_hooks == {}
