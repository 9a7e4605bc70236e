"""Configuration: strict, all errors at once, each with its fix; and models that do not fit it."""

import dataclasses
import math

import pytest
import torch_geometric.nn as pyg_nn
from helpers.adapted import adapt
from helpers.tiny import ARCHITECTURES
from peft import get_peft_model

from structlora_pyg import ConfigError, StructLoraConfig, get_structlora_model
from structlora_pyg.study.config import load_config

BASE = ["model.path=m", "data.path=d"]


def problems(*overrides: str, path=None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, [*BASE, *overrides])
    return caught.value.problems


def test_defaults_are_valid_and_overrides_arrive() -> None:
    given = ["adapter.coordinator.conv=GATv2Conv", "train.lr=5e-4", "adapter.r=4", "train.mixed_precision=no"]
    config = load_config(None, [*BASE, *given])
    assert config.adapter.coordinator.conv == "GATv2Conv"
    assert config.train.lr == 5e-4
    assert config.train.mixed_precision == "no"  # in YAML a bare one is false
    assert config.adapter.r == 4


def test_every_problem_is_reported_at_once_with_the_nearest_key() -> None:
    filters = ["adapter.filter.beat=1", "adapter.filter.prior=3", "adapter.graph.edges=hybird", "adapter.r=0"]
    numbers = ["train.lr=-1", "train.warmup_ratio=2", "train.batch_size=many"]
    found = problems(*filters, *numbers, "model.library=tim", "data.taks=rte")
    text = "\n".join(found)
    assert len(found) == 9
    for word in ("'beta'", "prior", "'hybrid'", "adapter.r", "train.lr", "warmup_ratio", "'timm'", "'task'", "many"):
        assert word in text


def test_a_setting_without_effect_is_an_error() -> None:
    assert "no effect" in problems("adapter.filter.gamma=0.1")[0]
    assert "no effect" in problems("adapter.filter.label_term=task")[0]
    assert "no effect" in problems("model.architecture=vit_tiny")[0]
    assert "num_labels" in problems("adapter.filter.gamma=0.1", "adapter.filter.label_term=decoder")[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [("a: [", "cannot be read"), ("- 1", "mapping"), ("\x00", "cannot be read"), ("model: 3", "section")],
)
def test_files_that_hold_no_configuration_are_named(tmp_path, content: str, message: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError, match=message):
        load_config(file)


def test_sections_come_as_mappings_or_objects_and_round_trip() -> None:
    config = StructLoraConfig(r=4, target_modules=["q"], filter={"beta": 3.0}, coordinator={"conv": pyg_nn.GATConv})
    again = StructLoraConfig(r=4, target_modules=["q"], **config.own_fields())
    assert again.filter == config.filter
    assert again.coordinator.conv.endswith("GATConv")
    assert dataclasses.asdict(again.graph) == dataclasses.asdict(config.graph)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("llama", {"target_modules": "no_such.*"}, "linear layers"),
        ("timm_vit", {"target_modules": None}, "all-linear"),
        ("llama", {"fused_slices": ["q"]}, "no effect"),
        ("llama", {"init_lora_weights": "gradient"}, "train_step"),
    ],
)
def test_what_does_not_fit_a_model_is_said_before_it_is_changed(name: str, options: dict, said: str) -> None:
    tiny = ARCHITECTURES[name]
    model = tiny.model()
    before = [n for n, _ in model.named_modules()]
    with pytest.raises(ConfigError, match=said):
        get_structlora_model(model, StructLoraConfig(**{"r": 2, "target_modules": tiny.targets, **options}))
    config = StructLoraConfig(r=2, target_modules=tiny.targets or "all-linear")
    with pytest.raises(ConfigError, match="get_structlora_model"):
        get_peft_model(model, config)  # PEFT alone does not take it
    assert [n for n, _ in model.named_modules()] == before
    next(p for n, p in model.named_parameters() if n.endswith(("q_proj.weight", "qkv.weight"))).data[0, 0] = math.nan
    with pytest.raises(ConfigError, match="NaN"):
        get_structlora_model(model, config)


def test_layer_nodes_hold_the_adapters_of_a_block() -> None:
    model = adapt(ARCHITECTURES["llama"], graph={"node": "layer", "edges": "depth_chain"})
    graph = model.adapter_graph()
    assert graph.validate(raise_on_error=True)
    assert graph.num_nodes == 3
    assert graph.x.shape == (3, 2 * 256)
    assert graph.gate.shape == (3, 4)
    assert graph.edge_index.T.tolist() == [[1, 0], [0, 1], [2, 1], [1, 2]]


@pytest.mark.parametrize("start", ["true", "gaussian", "orthogonal", "shared", "gradient"])
def test_every_start_of_lora_a_can_be_given_as_text(start: str) -> None:
    assert str(load_config("rte", [f"adapter.init_lora_weights={start}"]).adapter.init_lora_weights).lower() == start


@pytest.mark.parametrize("name", ["target_modules", "exclude_modules", "modules_to_save"])
def test_names_of_modules_are_text(name: str) -> None:
    for value in (["q_proj", None], [3], 3, {"q_proj": 1}):
        with pytest.raises(ConfigError, match=rf"{name} must be a name or a list of names, got"):
            StructLoraConfig(**{name: value})
    StructLoraConfig(**{name: ["q_proj", "v_proj"]})
