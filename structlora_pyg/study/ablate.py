"""An ablation: one configuration, a row for every change to it, and the controls of message passing.

The rows become the methods of a `structlora_pyg.study.grid.GridConfig`, so that they run, resume and are reported as
those of every comparison. `structlora_pyg.study.sweeps` reads what is to be changed, `structlora_pyg.data.edges`
explains the controls.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from structlora_pyg.checks import ConfigError, build
from structlora_pyg.config import StructLoraConfig
from structlora_pyg.data.edges import GRADIENT_EDGES
from structlora_pyg.data.transforms import make_transform
from structlora_pyg.nn.conv import example_graph
from structlora_pyg.study.config_files import put, read_yaml
from structlora_pyg.study.grid import GridConfig, said_once
from structlora_pyg.study.methods import METHODS, unknown_method
from structlora_pyg.study.report.records import read_record
from structlora_pyg.study.run_checks import run_problems, schedule_problems
from structlora_pyg.study.run_config import RunConfig
from structlora_pyg.study.run_folder import flat, to_json
from structlora_pyg.study.run_store import run_key
from structlora_pyg.study.schema import Grid
from structlora_pyg.study.sweeps import Value, changes, label, read_settings, short
from structlora_pyg.tuner.model import build_coordinator

EXAMPLE = "adapter.coordinator.conv=GCNConv,GATv2Conv"
BASE = "base"  # label of the row that nothing is changed in
RANK, FRACTION, RATE = "adapter.r", "data.train_fraction", "train.lr"  # axes of a comparison, not settings of a row
# Types of nodes and edges of a small graph: what `hetero` has to run on between roles, and within one.
TWO_ROLES = (
    ["query", "value"],
    [("query", "same_role", "query"), ("query", "other", "value"), ("value", "other", "query")],
)
PLAIN = {
    "structlora": ("LoRA", "lora"),
    "structlora_qlora": ("QLoRA", "qlora"),
    "structlora_dora": ("DoRA", "dora"),
    "structlora_fa": ("LoRA-FA", "lora_fa"),
}
CONTROLS = (
    "Controls: no edges (no neighbours), random edges (as many as the chain), shuffled nodes (the same graph, nodes "
    "exchanged), frozen coordinator (random weights, only the gain is trained), MLP coordinator (no messages, as many "
    "parameters)."
)


def ablation(
    config: str | Path,
    settings: Sequence[str],
    seeds: int = 5,
    list_mode: Literal["product", "list"] = "product",
    controls: bool = False,
    learning_rates: Sequence[float] = (),
) -> GridConfig:
    """Return an ablation as a grid; its baseline is the row ``base``.

    Args:
        config: YAML file of a run, or the name of a shipped one.
        settings: Strings ``key.sub=value`` or ``key.sub=value,value``. Several values of ``adapter.r`` or
            ``data.train_fraction`` become columns, all others rows.
        seeds: Runs a row, >= 1.
        list_mode: ``product``: a row for every combination. ``list``: one key is changed at a time.
        controls: Add the rows of `control_rows`.
        learning_rates: What every row chooses from on a part cut from train; default: ``train.lr`` for all.

    Raises:
        ConfigError: With every problem of every row, each said once.
    """
    given, found = read_settings(settings)
    fixed = {key: values[0].value for key, values in given.items() if len(values) == 1}
    swept = {key: values for key, values in given.items() if len(values) > 1}
    if not swept and not controls and not found:
        found.append(f"nothing to compare: give a key several values, {EXAMPLE}, or --controls")
    axes = {key: swept.pop(key) for key in (RANK, FRACTION) if key in swept}
    base, _ = _built(config, fixed)

    def new(key: str, value: Value) -> bool:
        changed, _ = _built(config, {**fixed, key: value.value})
        return base is None or changed is None or _value_of(changed, key) != _value_of(base, key)

    rows: dict[str, dict[str, Any]] = {BASE: {}}
    for change in changes(swept, new, list_mode):
        rows[label(change)] = {key: value.value for key, value in change.items()}
    if controls and base is not None:
        more, problems = control_rows(base)
        rows, found = {**rows, **more}, [*found, *problems]
    # Every value alone as well: what is wrong with one must not hide what is wrong with another.
    singles = [(key, value) for key, values in {**swept, **axes}.items() for value in values]
    others = {label({key: value}): {key: value.value} for key, value in singles}
    kept, problems = _distinct(config, fixed, rows, others)
    if found or problems or base is None:
        raise ConfigError([*found, *problems])
    if len(kept) == 1 and not axes:
        why = f"method.name={base.method.name} does not read what is changed"
        raise ConfigError([f"no row differs from the base; {why}"])
    stem = Path(config).stem
    varied = [short(key) for key in (*swept, *axes)] + ["controls"] * controls
    held = base.data.validation_share
    grid = GridConfig(
        name="-".join([stem, *varied]),
        title=f"Ablation of {stem}: {', '.join(varied)}",
        note=_note(base, fixed, list(swept), controls),
        baseline=BASE,
        tasks={base.data.task: {"config": str(config)}},
        methods={name: _entry(row) for name, row in kept.items()},
        ranks=[v.value for v in axes.get(RANK, [])] or [base.adapter.r],
        fractions=[v.value for v in axes.get(FRACTION, [])] or [base.data.train_fraction],
        seeds=seeds,
        settings=fixed,
        learning_rates=[float(rate) for rate in learning_rates] or [base.train.lr],
        watch_every=base.train.watch_every,
        importance_examples=base.train.importance_examples,
        validation=held > 0,
        tuning_share=held or GridConfig.tuning_share,
    )
    if problems := grid.problems():
        raise ConfigError(problems)
    return grid


def own_name(grid: GridConfig, output_dir: str | Path) -> str:
    """Return the name of an ablation, with a number behind it where the folder holds another one of that name.

    One that has more rows, seeds or columns takes the place of the smaller one.

    Raises:
        RecordError: If the folder holds a damaged file of that name, or one of another version.
    """
    fixed = json.loads(to_json({"all": grid.settings, "tasks": grid.tasks}))
    rows = json.loads(to_json(grid.methods)).items()
    for name in itertools.chain([grid.name], (f"{grid.name}-{n}" for n in itertools.count(2))):
        file = Path(output_dir) / "grids" / f"{name}.json"
        if not file.exists():
            break
        there = read_record(file, Grid).get("settings", {})
        if there.get("methods", {}).items() <= rows and all(there.get(key) == value for key, value in fixed.items()):
            break
    return name


def _distinct(
    config: str | Path,
    fixed: Mapping[str, Any],
    rows: Mapping[str, Mapping[str, Any]],
    others: Mapping[str, Mapping[str, Any]],
) -> tuple[dict[str, Mapping[str, Any]], list[str]]:
    """Return the rows that are different runs, and every problem of all rows and of `others`."""
    places: dict[str, list[str]] = {}
    kept: dict[str, str] = {}
    for name, row in {**rows, **others}.items():
        built, problems = _built(config, {**fixed, **row})
        if built is not None:
            kept.setdefault(run_key(built), name)
            problems = row_problems(built)
        for problem in problems:
            places.setdefault(problem, []).append(name)
    return {name: row for name, row in rows.items() if name in kept.values()}, said_once(places)


def control_rows(base: RunConfig) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Return the controls of `structlora_pyg.data.edges` that a configuration can have, and what is wrong."""
    if base.method.name not in PLAIN:
        known = ", ".join(PLAIN)
        return {}, [f"--controls belongs to method.name={known}; got {base.method.name}, which passes no messages"]
    name, method = PLAIN[base.method.name]
    rows: dict[str, dict[str, Any]] = {name: {"method.name": method}, "no filter": {"adapter.filter.kind": "none"}}
    if base.adapter.coordinator.conv in (None, "none"):
        return rows, []
    graph, part = "adapter.graph", "adapter.coordinator"
    rows |= {
        "no coordinator": {
            f"{part}.conv": "none",
            f"{part}.messages": True,
            f"{part}.frozen": False,
            f"{part}.hetero": "none",
        },
        "no edges": {f"{graph}.edges": "none", f"{graph}.shuffle_nodes": False, f"{part}.hetero": "none"},
        "random edges": {f"{graph}.edges": "random"},
        "shuffled nodes": {f"{graph}.shuffle_nodes": True},
        "frozen coordinator": {f"{part}.frozen": True},
        "MLP coordinator": {f"{part}.messages": False},
    }
    if base.adapter.graph.edges in ("full", "none", "learned"):  # where all nodes are alike
        del rows["shuffled nodes"]
    if base.adapter.graph.edges == "learned":  # nothing would train them
        for row in ("no coordinator", "MLP coordinator"):
            rows[row][f"{graph}.edges"] = "none"
    return {name: {k: v for k, v in row.items() if _value_of(base, k) != v} for name, row in rows.items()}, []


def row_problems(config: RunConfig) -> list[str]:
    """Return what would stop a run of a valid configuration before its first step, as far as it shows without data."""
    adapter = config.adapter
    # What is looked at is left to the grid, which looks where there is something.
    settings = dataclasses.replace(config.train, watch_every=0, importance_examples=0)
    found = run_problems(dataclasses.replace(config, train=settings))
    if not METHODS[config.method.name].is_structlora:
        return found
    if settings.max_steps is not None:
        found += schedule_problems(adapter, settings.max_steps)
    try:
        for spec in adapter.graph.transforms:
            make_transform(spec)
        _try_coordinator(adapter)
    except ValueError as error:
        found.append(str(error))
    return found


def _try_coordinator(adapter: StructLoraConfig) -> None:
    """Build the coordinator on a small graph that carries what the graph of the run will."""
    if adapter.coordinator.conv in (None, "none"):
        return
    graph = adapter.graph
    weighted = graph.edges in (*GRADIENT_EDGES, "learned") or bool(graph.transforms)
    example = example_graph(weighted=weighted, relations=4 if graph.edge_types else 0)
    example.role = torch.zeros(example.num_nodes, dtype=torch.long)
    if graph.edge_features:
        example.edge_attr = torch.ones(example.num_edges, 4)
    with torch.random.fork_rng(devices=[]):
        build_coordinator(adapter.coordinator, example.num_features, example, TWO_ROLES)


def _value_of(config: RunConfig, key: str) -> Any:
    node: Any = config
    for part in key.split("."):
        node = node.get(part) if isinstance(node, Mapping) else vars(node).get(part)
        if node is None:
            return None
    return node


def _built(config: str | Path, settings: Mapping[str, Any]) -> tuple[RunConfig | None, list[str]]:
    """Return a run's configuration as a grid makes it, and every problem."""
    tree, found = read_yaml(config)
    for key, value in flat(settings).items():
        found += put(tree, key, copy.deepcopy(value))
    built, more = build(RunConfig, tree)
    if built is not None:
        found += unknown_method(built.method.name)
    return None if found else built, found + more


def _entry(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row as a method of a grid, which has a place of its own for learning rates."""
    rates = {"learning_rates": [float(row[RATE])]} if RATE in row else {}
    return {**{key: value for key, value in row.items() if key != RATE}, **rates}


def _note(base: RunConfig, fixed: Mapping[str, Any], swept: Sequence[str], controls: bool) -> str:
    has = ", ".join(f"{short(key)}={_text(_value_of(base, key))}" for key in swept)
    others = ", ".join(f"{short(key)}={_text(value)}" for key, value in fixed.items())
    sentences = [f"The base has {has}." if has else "", f"All rows have {others}." if others else ""]
    return " ".join(text for text in [*sentences, CONTROLS if controls else ""] if text)


def _text(value: Any) -> str:
    if isinstance(value, set):
        value = sorted(value)
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("\n").removesuffix("\n...")
