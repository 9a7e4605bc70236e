"""The demo and the tasks that need no download: digits and graphs."""

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch_geometric.utils import erdos_renyi_graph, to_dense_adj

from structlora_pyg import cli
from structlora_pyg.checks import ConfigError
from structlora_pyg.study import commands
from structlora_pyg.study.config import DataConfig, RunConfig, load_config
from structlora_pyg.study.tasks import ModelError, load_task, small
from structlora_pyg.study.train import train

SHORT = ["train.max_steps=6", "adapter.schedule.warmup_steps=1", "adapter.schedule.ramp_steps=2"]
GAT = ["model.architecture=gat", "adapter.target_modules=[lin_l,lin_r]"]


@pytest.fixture(scope="module", autouse=True)
def bases(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Pretrain for a few steps only, on a few graphs, and return where the bases are kept."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(small.DIGITS_RECIPE, "steps", 5)
        patch.setitem(small.GRAPHS_RECIPE, "steps", 5)
        patch.setattr(small, "SOURCE", 32)
        yield tmp_path_factory.mktemp("bases")


def config(name: str, bases: Path, folder: Path, *overrides: str) -> RunConfig:
    return load_config(name, [*SHORT, f"model.path={bases}", f"train.output_dir={folder / 'run'}", *overrides])


@pytest.mark.slow
def test_demo_pairs_both_methods_and_writes_the_report(tmp_path: Path, monkeypatch, capsys) -> None:
    """The quick demo in four steps instead of forty."""
    folder = tmp_path / "runs" / "demo"
    tree = yaml.safe_load(commands.DEMO.read_text())
    steps = {"train.max_steps": 4, "adapter.schedule.warmup_steps": 1, "adapter.schedule.ramp_steps": 2}
    tree["sizes"]["quick"]["settings"] |= steps
    (tmp_path / "demo.yaml").write_text(yaml.safe_dump(tree))
    monkeypatch.setattr(commands, "DEMO", tmp_path / "demo.yaml")
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    assert cli.main(["demo", "--quick", "--output-dir", str(folder)]) == 0
    table = json.loads((folder / "grids" / "demo-quick.json").read_text())
    assert {(c["method"], c["seed"]) for c in table["cells"]} == {
        (m, s) for m in ("LoRA", "StructLoRA") for s in (0, 1)
    }
    report = (folder / "report.html").read_text()
    assert "StructLoRA and LoRA learn new digits" in report
    assert "<svg" in report
    printed = capsys.readouterr().out
    assert re.search(r"StructLoRA[ |]+\d+\.\d ± \d+\.\d", printed)
    assert str(folder / "report.html") in printed


def test_parts_of_the_digits_do_not_overlap_and_a_seed_draws_as_many_of_every_class() -> None:
    parts = small.read_digits()
    assert {n: len(y) for n, (_, y) in parts.items()} == {"known": 901, "pool": 298, "validation": 150, "test": 448}
    assert torch.bincount(parts["validation"][1]).tolist() == [30] * 5
    pictures = [picture.numpy().tobytes() for name in ("pool", "validation", "test") for picture in parts[name][0]]
    assert len(set(pictures)) == len(pictures)

    def drawn(seed: int = 0, **limits: float) -> tuple[torch.Tensor, torch.Tensor]:
        return small.draw(parts["pool"], DataConfig(**limits), seed=seed)

    (x, y), (same, _), (other, _) = (drawn(seed, train_limit=50) for seed in (5, 5, 6))
    assert torch.bincount(y).tolist() == [10] * 5
    assert torch.equal(same, x)
    assert not torch.equal(other, x)
    assert torch.bincount(drawn(train_fraction=0.1)[1]).unique().numel() == 1
    assert len(drawn()[1]) == 298
    for limit in (7, 1000):
        with pytest.raises(ConfigError, match=f"data.train_limit={limit}: .* a multiple of 5 up to"):
            drawn(train_limit=limit)


@pytest.mark.parametrize("name", ["digits", "graphs"])
def test_settings_are_chosen_on_examples_that_are_neither_trained_nor_tested_on(name: str, bases: Path) -> None:
    settings = load_config(name, [f"model.path={bases}", "data.train_limit=null"])
    final = load_task(settings.model, settings.data, 0)
    settings.data.validation_share = 0.2
    tuning = load_task(settings.model, settings.data, 0)

    def inputs(examples: Any) -> set[bytes]:
        return {(example[0] if name == "digits" else example.x).numpy().tobytes() for example in examples}

    train_set, held_out, test = inputs(final.train_set), inputs(tuning.eval_set), inputs(final.eval_set)
    assert inputs(tuning.train_set) == train_set
    assert not train_set & held_out
    assert not train_set & test
    assert not held_out & test


def test_a_base_is_pretrained_once_and_again_if_its_file_is_damaged(tmp_path: Path, caplog) -> None:
    settings = load_config("digits", [f"model.path={tmp_path}"])

    def base() -> dict[str, torch.Tensor]:
        network = load_task(settings.model, settings.data, 0).model
        assert all(p.grad is None for p in network.parameters())  # or clipping would count what is left
        return network.state_dict()

    first = base()
    (file,) = tmp_path.iterdir()
    content, written = file.read_bytes(), file.stat().st_mtime_ns
    assert all(torch.equal(value, first[key]) for key, value in base().items())
    assert file.stat().st_mtime_ns == written
    file.write_bytes(content.replace(b"head.bias", b"tail.bias"))
    assert all(torch.equal(value, first[key]) for key, value in base().items())
    assert "is damaged" in caplog.text
    assert file.read_bytes() == content


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("digits", ["model.architecture=vit_tinny_patch16_224"], "cannot be built .* Unknown model"),
        ("digits", ["model.overrides.in_chans=3"], "cannot be built .* 3 channels"),
        ("graphs", ["model.architecture=gpt"], "kind='gpt'; give gps or gat"),
        ("graphs", ["model.overrides={depth: 3}"], "unexpected keyword argument 'depth'"),
        ("graphs", ["model.library=timm"], "set model.library=pyg"),
    ],
)
def test_a_model_that_does_not_fit_is_named(name: str, overrides: list[str], message: str, bases: Path) -> None:
    settings = load_config(name, [f"model.path={bases}", *overrides])
    with pytest.raises((ConfigError, ModelError), match=message):
        load_task(settings.model, settings.data, 0)


@pytest.mark.parametrize("seed", range(3))
def test_triangles_and_squares_are_those_found_by_looking(seed: int) -> None:
    torch.manual_seed(seed)
    n = 7
    edge_index = erdos_renyi_graph(n, 0.5)
    a = to_dense_adj(edge_index, max_num_nodes=n)[0].bool()
    triangles, squares = torch.zeros(n), torch.zeros(n)
    for i, j, k in itertools.combinations(range(n), 3):
        if a[i, j] and a[j, k] and a[k, i]:
            triangles[[i, j, k]] += 1
    for chosen in itertools.combinations(range(n), 4):
        first, *others = chosen
        for j, k, m in itertools.permutations(others):
            if j < m and a[first, j] and a[j, k] and a[k, m] and a[m, first]:
                squares[list(chosen)] += 1
    found = small.cycle_counts(edge_index, n)
    torch.testing.assert_close(found[0].float(), triangles)
    torch.testing.assert_close(found[1].float(), squares)


def test_structlora_trains_graph_networks(bases: Path, tmp_path: Path) -> None:
    found = train(config("graphs", bases, tmp_path, *GAT, "train.max_steps=15"), progress=False)
    assert found["losses"]["last"]["loss"] < found["losses"]["first"]["loss"]
    assert 0 <= found["metrics"]["accuracy"] <= 1
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
