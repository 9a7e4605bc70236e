"""What a comparison consists of: every run's configuration, and what is wrong before anything has run."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.slow import slow_but

from structlora_pyg.checks import ConfigError
from structlora_pyg.study.config import load_config
from structlora_pyg.study.grid import Cell, GridConfig, load_grid
from structlora_pyg.study.runs import run_key

SHIPPED = sorted((Path(__file__).parents[2] / "benchmarks" / "configs").glob("*.yaml"))
SIZES = [(f, size) for f in SHIPPED for size in (None, *yaml.safe_load(f.read_text()).get("sizes", {}))]


def grid(**changes: Any) -> GridConfig:
    values: dict[str, Any] = {
        "name": "g",
        "tasks": {"rte": {"config": "rte"}},
        "methods": {"LoRA": {"method.name": "lora"}, "ours": {"method.name": "structlora"}},
    }
    return GridConfig(**{**values, **changes})


@pytest.mark.parametrize(("file", "size"), slow_but(((f, None) for f in SHIPPED), SIZES))
def test_every_shipped_grid_is_valid_in_every_size(file: Path, size: str | None) -> None:
    chosen = load_grid(file, size=size)
    cells = chosen.cells()
    assert len(cells) == len(set(cells)) > 0
    assert chosen.name == (file.stem if size is None else f"{file.stem}-{size}")


def test_a_size_replaces_fields_and_entries(tmp_path: Path) -> None:
    file = tmp_path / "g.yaml"
    entries = {"a": {"config": "rte"}, "b": {"config": "mrpc"}}
    sizes = {"mini": {"seeds": 2, "tasks": {"b": None, "c": {"config": "cola"}}}}
    methods = {"LoRA": {"method.name": "lora"}}
    file.write_text(yaml.safe_dump({"tasks": entries, "methods": methods, "sizes": sizes}))
    assert (load_grid(file).seeds, list(load_grid(file).tasks)) == (5, ["a", "b"])
    assert list(load_grid(file, ["tasks.a=null"]).tasks) == ["b"]
    mini = load_grid(file, size="mini")
    assert (mini.name, mini.seeds, list(mini.tasks)) == ("g-mini", 2, ["a", "c"])
    with pytest.raises(ConfigError, match="known: mini"):
        load_grid(file, size="minni")


def test_a_run_takes_rank_fraction_seed_and_settings_of_its_cell() -> None:
    settings = {"train.max_steps": 7, "adapter": {"graph": {"edges": "full"}}}
    config = grid(settings=settings, watch_every=3, importance_examples=4).run(Cell("ours", "rte", 2, 0.25, 0), 1e-3)
    assert (config.adapter.r, config.adapter.lora_alpha) == (2, 4)  # rte.yaml has 8 and 16
    assert (config.adapter.seed, config.train.seed, config.train.lr) == (0, 0, 1e-3)
    assert (config.data.train_fraction, config.data.validation_share) == (0.25, 0.0)
    assert (config.train.max_steps, config.adapter.graph.edges) == (7, "full")
    assert (config.train.watch_every, config.train.importance_examples) == (3, 4)
    # Methods without updates or gates are not asked for them, nor are runs that choose a rate.
    other = grid(methods={"full": {"method.name": "full"}}, watch_every=3, importance_examples=4)
    tuning = grid(settings={"train.watch_every": 5, "train.importance_examples": 2})
    for train in (
        other.run(Cell("full", "rte", 8, 1.0, 0), 1e-3).train,
        *(tuning.run(Cell(method, "rte", 8, 1.0, 1000), 1e-3, tuning=True).train for method in tuning.methods),
    ):
        assert (train.watch_every, train.importance_examples) == (0, 0)


def test_learning_rates_are_chosen_on_a_part_of_train_with_seeds_of_their_own() -> None:
    several = grid(learning_rates=[1e-4, 1e-3], tuning_seeds=2, ranks=[4, 8], fractions=[0.1, 1.0], seeds=5)
    trials = list(several.tuning_trials())
    assert len(trials) == 2 * 2 * 2
    for config, cell, _ in trials:
        assert config.data.validation_share == several.tuning_share
        assert (cell.rank, cell.fraction) == (4, 1.0)
        assert config.train.seed == config.adapter.seed >= 1000
    assert not list(grid(learning_rates=[1e-3]).tuning_trials())
    settings = grid(validation=True)  # chosen so too, and the evaluation split is never read
    assert settings.run(settings.cells()[0], 1e-3).data.validation_share == settings.tuning_share


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"methods": {"x": {"method.name": "lorra"}}}, "Did you mean 'lora'"),
        ({"methods": {"x": {"adapter.graph.edgs": "full"}}}, "Did you mean 'edges'"),
        ({"methods": ["lora"]}, "methods: got ['lora'], expected a mapping"),
        ({"methods": {"x": "lora"}}, "methods.x: got 'lora', expected a mapping"),
        ({"tasks": {"rte": {}}}, "tasks.rte.config: got None, expected a text"),
        ({"tasks": {"rte": {"config": "rtee"}}}, "does not exist; shipped configs"),
        ({"baseline": "Lora"}, "Did you mean 'LoRA'"),
        ({"methods": {"x": {"method.name": "lora", "tune": {"adapter.lora_dropout": [0.5, 2]}}}}, "lora_dropout"),
        ({"methods": {"x": {"method.name": "lora", "tune": {"adapter.lora_dropout": []}}}}, "at least 1"),
        ({"ranks": [0]}, "ranks.0 must be >= 1, got 0"),
        ({"ranks": [8, 8]}, "ranks must be different values, at least one, got [8, 8]"),
        ({"fractions": [10]}, "fractions.0 must be in (0, 1], got 10"),
        ({"learning_rates": ["fast"]}, "learning_rates.0: got 'fast', expected a number"),
        ({"seeds": 0}, "seeds must be >= 1"),
        ({"name": "a/b"}, "becomes the name of a file"),
        ({"tuning_share": 1.0}, "tuning_share must be in (0, 1), got 1.0"),
        ({"settings": {"train.max_steps": -1}}, "max_steps must be >= 1"),
        ({"nonsense": 1}, "nonsense: unknown key"),
    ],
)
def test_what_is_wrong_is_said_before_anything_runs(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    values = {"tasks": {"rte": {"config": "rte"}}, "methods": {"LoRA": {"method.name": "lora"}}, **changes}
    file = tmp_path / "grid.yaml"
    file.write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError) as error:
        load_grid(file, ["tuning_seeds=0"])
    assert said in str(error.value)
    assert "tuning_seeds must be >= 1, got 0" in str(error.value)  # all at once


def test_a_run_is_one_run_wherever_its_method_reads_the_same() -> None:
    methods = {"full": {"method.name": "full"}, "VeRA": {"method.name": "vera"}, "LoRA": {"method.name": "lora"}}
    table = grid(methods=methods, ranks=[2, 8])
    keys = {name: {run_key(table.run(Cell(name, "rte", r, 1.0, 0), 1e-3)) for r in (2, 8)} for name in methods}
    assert {name: len(found) for name, found in keys.items()} == {"full": 1, "VeRA": 1, "LoRA": 2}

    def key(**settings: Any) -> str:
        return run_key(grid(settings=settings).run(Cell("LoRA", "rte", 8, 1.0, 0), 1e-3))

    assert key(**{"adapter.graph.edges": "none", "adapter.filter.beta": 1.0}) == key()
    assert key(**{"adapter.fused_slices": ["q", "v"]}) != key()
    ours, other = Cell("ours", "rte", 8, 1.0, 0), grid(settings={"adapter.graph.edges": "full"})
    assert len({run_key(g.run(c, 1e-3)) for g in (grid(), other) for c in (ours, ours._replace(seed=1))}) == 4


def test_scaling_without_a_word_about_it_is_that_of_a_single_run(tmp_path: Path) -> None:
    file = tmp_path / "bare.yaml"
    file.write_text("model: {path: somewhere}\ndata: {task: rte, path: somewhere}\n")
    bare = grid(tasks={"rte": {"config": str(file)}}).run(Cell("LoRA", "rte", 8, 1.0, 0), 1e-3).adapter
    alone = load_config(str(file)).adapter
    assert (bare.r, bare.lora_alpha) == (alone.r, alone.lora_alpha)


def test_what_every_run_gets_from_the_grid_cannot_be_set_beside_it(tmp_path: Path) -> None:
    file = tmp_path / "g.yaml"
    values = {
        "tasks": {"rte": {"config": "rte", "train": {"seed": 3}}},
        "methods": {"r16": {"method.name": "lora", "adapter.r": 16}},
        "settings": {"train.lr": 1e-2},
    }
    file.write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError) as error:
        load_grid(file, ["settings.data.validation_share=0.3"])
    for place, way in (
        ("tasks.rte: train.seed", "use seeds"),
        ("methods.r16: adapter.r", "use ranks"),
        ("settings: train.lr", "use learning_rates"),
        ("settings: data.validation_share", "use validation and tuning_share"),
    ):
        assert any(p.startswith(place) and p.endswith(way) for p in error.value.problems)
