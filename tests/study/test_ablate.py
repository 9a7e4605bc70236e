"""An ablation is a grid around one configuration: rows, labels, controls, and every problem before the first run."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from structlora_pyg.checks import ConfigError
from structlora_pyg.cli import main
from structlora_pyg.study.ablate import ablation, read_settings
from structlora_pyg.study.config import read_yaml
from structlora_pyg.study.grid import Cell
from structlora_pyg.study.runs import run_key

LAYERS, CONV = "adapter.coordinator.num_layers", "adapter.coordinator.conv"


def rows(*given_settings: str, **options: Any) -> dict[str, dict[str, Any]]:
    return ablation("stsb", given_settings, **options).methods


def problems(*given_settings: str, **options: Any) -> list[str]:
    with pytest.raises(ConfigError) as error:
        ablation("stsb", given_settings, **options)
    return error.value.problems


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("1,2", [1, 2]),
        ("GCNConv, GATv2Conv", ["GCNConv", "GATv2Conv"]),
        ("[query,value]", [["query", "value"]]),
        ("[query],[query,value]", [["query"], ["query", "value"]]),
        ("{heads: 2, concat: false},{}", [{"heads": 2, "concat": False}, {}]),
        ('"Describe, please"', ["Describe, please"]),
        ("null,0.5", [None, 0.5]),
        (".*[qv]_proj", [".*[qv]_proj"]),
    ],
)
def test_commas_separate_values_outside_of_brackets_and_quotes(text: str, values: list) -> None:
    given_values, found = read_settings([f"data.prompt={text}"])
    assert not found
    assert given_values["data.prompt"] == values


def test_a_product_has_a_row_a_combination_and_a_list_one_a_change() -> None:
    both = [f"{LAYERS}=1,2,3", f"{CONV}=GCNConv,GATv2Conv"]
    product = rows(*both)
    assert list(product) == [
        "base", "conv=GATv2Conv", "layers=2", "layers=2, conv=GATv2Conv", "layers=3", "layers=3, conv=GATv2Conv",
    ]  # fmt: skip
    assert product["layers=2, conv=GATv2Conv"] == {LAYERS: 2, CONV: "GATv2Conv"}
    assert list(rows(*both, list_mode="list")) == ["base", "layers=2", "layers=3", "conv=GATv2Conv"]
    assert list(rows(f"{LAYERS}=2,3")) == ["base", "layers=2", "layers=3"]  # the base is there, asked for or not
    assert list(rows("adapter.lora_dropout=0,0.1", "train.weight_decay=1e-2,0.1", list_mode="list")) == [
        "base", "lora_dropout=0.1", "weight_decay=0.1",
    ]  # fmt: skip


def test_rows_that_are_the_same_run_are_one_row() -> None:
    found = rows("method.name=structlora,lora", f"{LAYERS}=1,2")  # LoRA has no layers to vary
    assert list(found) == ["base", "layers=2", "method.name=lora"]
    edges = rows("adapter.graph.edges=hybrid,none,random,full", controls=True)
    assert "no edges" not in edges
    assert "random edges" not in edges
    assert {"edges=none", "edges=random", "edges=full", "shuffled nodes"} <= set(edges)


def test_controls_change_what_they_say_around_any_base() -> None:
    grid = ablation("stsb", ["adapter.graph.edges=depth_chain", f"{CONV}=GATv2Conv"], controls=True)
    assert list(grid.methods) == [
        "base", "LoRA", "no coordinator", "no edges", "random edges", "shuffled nodes", "frozen coordinator",
        "MLP coordinator", "one level", "fixed level",
    ]  # fmt: skip
    configs = {name: grid.run(Cell(name, "stsb", 8, 1.0, 0), 1e-3) for name in grid.methods}
    assert len({run_key(config) for config in configs.values()}) == 10
    assert configs["MLP coordinator"].adapter.coordinator.conv == "GATv2Conv"
    assert not configs["MLP coordinator"].adapter.coordinator.messages
    frozen = rows("adapter.coordinator.frozen=true", "adapter.graph.shuffle_nodes=true", controls=True)
    assert "frozen coordinator" not in frozen
    assert "shuffled nodes" not in frozen
    assert frozen["no coordinator"] == {CONV: "none", "adapter.coordinator.frozen": False}
    assert list(rows(f"{CONV}=none", controls=True)) == ["base", "LoRA"]
    gated = rows("adapter.coordinator.lift=tangent", "adapter.filter.noise=0", controls=True)
    assert list(gated)[:4] == ["base", "LoRA", "no filter", "no coordinator"]
    assert "one level" not in gated
    assert list(rows("method.name=structlora_dora", controls=True))[1] == "DoRA"
    hetero = "adapter.coordinator.hetero"
    typed = rows(f"{hetero}=hetero_conv", f"{CONV}=GATv2Conv", controls=True)
    assert typed["no edges"] == {"adapter.graph.edges": "none", hetero: "none"}
    assert typed["no coordinator"] == {CONV: "none", hetero: "none"}
    learned = rows("adapter.graph.edges=learned", controls=True)
    assert learned["MLP coordinator"] == {"adapter.coordinator.messages": False, "adapter.graph.edges": "none"}
    assert "shuffled nodes" not in learned


def test_arguments_of_the_bases_convolution_stay_with_the_convolutions_that_know_them(tmp_path) -> None:
    kwargs, file = "adapter.coordinator.conv_kwargs", tmp_path / "gat.yaml"
    tree = read_yaml("stsb")
    tree["adapter"]["coordinator"] = {"conv": "GATConv", "conv_kwargs": {"heads": 2}}
    file.write_text(yaml.safe_dump(tree))
    found = ablation(file, [f"{CONV}=GATv2Conv,GCNConv,GAT"]).methods
    assert found["conv=GATv2Conv"] == {CONV: "GATv2Conv"}
    assert found["conv=GAT"] == {CONV: "GAT"}
    assert found["conv=GCNConv"] == {CONV: "GCNConv", kwargs: {}}


def test_axes_of_a_comparison_stay_axes() -> None:
    grid = ablation(
        "stsb",
        ["adapter.r=2,8", "data.train_fraction=0.1,1", "train.lr=1e-3,3e-3", "train.watch_every=5", f"{LAYERS}=2"],
        seeds=2,
    )
    assert (grid.ranks, grid.fractions, grid.seeds, grid.watch_every) == ([2, 8], [0.1, 1], 2, 5)
    assert grid.methods == {
        "base": {}, "lr=1e-3": {"learning_rates": [1e-3]}, "lr=3e-3": {"learning_rates": [3e-3]},
    }  # fmt: skip
    assert [choice.lr for choice in grid.choices("stsb", "base")] == [5e-4]  # of the file
    run = grid.run(Cell("base", "stsb", 2, 1.0, 0), 5e-4)
    assert (run.adapter.r, run.adapter.lora_alpha, run.adapter.coordinator.num_layers) == (2, 4, 2)
    tuned = ablation("stsb", [], controls=True, learning_rates=[1e-3, 3e-3])
    assert [choice.lr for choice in tuned.choices("stsb", "LoRA")] == [1e-3, 3e-3]
    fixed = ablation("stsb", ["adapter.r=4", "train.lr=1e-3", "data.validation_share=0.3"], controls=True)
    run = fixed.run(Cell("base", "stsb", 4, 1.0, 0), fixed.learning_rates[0])
    assert (run.adapter.r, run.adapter.lora_alpha, run.train.lr) == (4, 16, 1e-3)  # as in structlora train
    assert run.data.validation_share == 0.3
    assert fixed.validation


def test_every_problem_of_every_row_is_said_once_and_before_any_run() -> None:
    found = problems(
        f"{CONV}=GCNConv,HypergraphConv,GATConvv", f"{LAYERS}=1,0", "train.max_steps=10", "train.lrr=1,2",
        "train.seed=3",
        "adapter.r=8,0", f"{CONV}=GATConv",
        "data.task=rte,stsb",
    )  # fmt: skip
    said = [
        f"{CONV} is given twice",
        "train.seed cannot be set here: rows are compared seed by seed", "data.task takes one value",
        "train.lrr: unknown key. Did you mean 'lr'", "num_layers must be >= 1, got 0", "ranks.1 must be >=",
        "warmup_steps=20, but training has 10", "HypergraphConv does not run along", "Did you mean 'GATConv'?",
    ]  # fmt: skip
    assert len(found) == len(said)
    for text in said:
        assert sum(text in problem for problem in found) == 1, text


def test_what_only_shows_when_something_is_built_is_said_too() -> None:
    found = problems(f"{CONV}=GCNConv,HypergraphConv,SignedConv", "train.max_steps=10", "adapter.lora_dropout=0,0.1")
    assert len(found) == 3
    assert found[0].startswith("base on stsb, rank 8 and 5 more: adapter.schedule.warmup_steps=20, but training has 10")
    where = "on stsb, rank 8 and 1 more: adapter.coordinator.conv:"
    assert found[1].startswith(f"conv=HypergraphConv {where} HypergraphConv does not run along")
    assert found[2].startswith(f"conv=SignedConv {where} SignedConv needs first_aggr")
    assert "is no transform" in problems("adapter.graph.transforms=[Nonsense]", controls=True)[0]
    assert "--controls belongs to method.name=structlora" in problems("method.name=dora", controls=True)[0]
    assert "nothing to compare" in problems(f"{LAYERS}=2")[0]
    assert "no row differs from the base" in problems("method.name=lora", f"{LAYERS}=2,3")[0]
    assert "'r' holds a value, not a section" in problems("adapter.r.x=1,2")[0]


@pytest.mark.slow
def test_the_command_that_is_shown_runs_and_reports(tiny_bert, rte_folder, tmp_path, capsys) -> None:
    page = (Path(__file__).parents[2] / "docs" / "guides" / "ablations.md").read_text()
    shown = shlex.split(re.findall(r"```bash\nstructlora (.*?)```", page, flags=re.S)[-1])
    shown = [word.replace("max_steps=10", "max_steps=3") for word in shown if "limit" not in word]
    here = [
        f"model.path={tiny_bert}", f"data.path={rte_folder}", "data.task=rte", "--seeds", "1", "--output-dir",
        str(tmp_path),
    ]  # fmt: skip
    assert main([*shown, *here, "--dry-run"]) == 0
    assert "11 rows, 11 runs" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    assert main([*shown, *here]) == 0
    assert "report.html" in capsys.readouterr().out
    (file,) = (tmp_path / "grids").glob("stsb-layers-controls-*.json")
    table = json.loads(file.read_text())
    assert table["baseline"] == "base"
    assert not table["failed"]
    depths = {}
    for cell in table["cells"]:
        run = json.loads((tmp_path / "runs" / f"{cell['key']}.json").read_text())
        *_, look = run["curves"]["structure"]
        depths[cell["method"]] = look["dirichlet"] and len(look["dirichlet"])
    without = [depths.pop(name) for name in ("LoRA", "no coordinator", "one level", "fixed level")]
    assert without == [None] * 4
    assert depths.pop("layers=2") == 3
    assert set(depths.values()) == {2}
    assert (tmp_path / "figures" / f"{file.stem}-training.svg").is_file()


def test_another_ablation_of_the_same_keys_gets_a_name_of_its_own() -> None:
    def named(*given_settings: str, **options: int) -> str:
        return ablation("stsb", given_settings, **options).name

    first = named(f"{CONV}=GCNConv,GATv2Conv")
    assert re.fullmatch("stsb-conv-[0-9a-f]{4}", first)
    assert named(f"{CONV}=GCNConv,GATv2Conv", seeds=9) == first
    assert named(f"{CONV}=GCNConv,GraphConv") != first
    assert named(f"{CONV}=GCNConv,GATv2Conv", "train.max_steps=50") != first
