"""An ablation: one configuration, a row of the table for every change to it, and the controls of message passing.

The rows become the methods of a `structlora_pyg.study.grid.GridConfig`, so that they run, resume and are reported as
those of every comparison. `structlora_pyg.data.edges` explains the controls.

``key.sub=a,b`` gives a key several values, ``key.sub=a`` one. The values are read as the items of a YAML list:
``key=[a, b]`` is one value, a list; ``key=[a, b],[c]`` are two.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from torch_geometric.nn import MessagePassing

from structlora_pyg.checks import ConfigError, asks, read
from structlora_pyg.config import StructLoraConfig
from structlora_pyg.nn.conv import is_stack, resolve_conv
from structlora_pyg.stage_config import CoordinatorConfig
from structlora_pyg.study.config import RunConfig, flat, parse_config, put, read_yaml
from structlora_pyg.study.grid import Cell, GridConfig
from structlora_pyg.study.run_folder import to_json
from structlora_pyg.study.runs import run_key

BASE = "base"  # label of the row that nothing is changed in
RANK, FRACTION, RATE = "adapter.r", "data.train_fraction", "train.lr"  # axes of a grid, not settings of a row
VAGUE = ("kind", "name", "path", "size")  # names that mean nothing without their section
PLAIN = {
    "structlora": ("LoRA", "lora"),
    "structlora_qlora": ("QLoRA", "qlora"),
    "structlora_dora": ("DoRA", "dora"),
    "structlora_fa": ("LoRA-FA", "lora_fa"),
}
CONTROLS = (
    "Controls: no edges (no neighbors), random edges (as many as the chain), shuffled nodes (the same graph, nodes "
    "exchanged), frozen coordinator (random weights, only the gain is trained), MLP coordinator (no messages, as many "
    "parameters)."
)


def ablation(
    config: str | Path,
    settings: Sequence[str],
    seeds: int = 5,
    list_mode: Literal["product", "list"] = "product",
    controls: bool = False,
    learning_rates: Sequence[float | str] = (),
) -> GridConfig:
    """Return an ablation as a grid; its baseline is the row ``base``.

    Args:
        config: YAML file of a run, or the name of a shipped one.
        settings: Strings ``key.sub=value`` or ``key.sub=value,value``. Several values of ``adapter.r`` or
            ``data.train_fraction`` become columns, all others rows.
        seeds: Runs per row, >= 1.
        list_mode: ``product``: a row for every combination. ``list``: one key is changed at a time.
        controls: Add the rows of `control_rows`.
        learning_rates: What every row chooses from on a part cut from train; default: ``train.lr`` for all.

    Raises:
        ConfigError: With every problem of every row, each said once.
    """
    given, found = read_settings(settings)
    fixed = {key: values[0] for key, values in given.items() if len(values) == 1}
    varied = {key: values for key, values in given.items() if len(values) > 1}
    if not varied and not controls and not found:
        example = "adapter.coordinator.conv=GCNConv,GATv2Conv"
        found.append(f"nothing to compare: give a key several values, {example}, or --controls")
    swept = {key: values for key, values in varied.items() if key not in (RANK, FRACTION)}
    tree = read_yaml(config)
    wrong = [problem for key, value in flat(fixed).items() for problem in put(tree, key, value)]
    base, problems = parse_config(RunConfig, tree)
    if base is None or wrong:
        raise ConfigError([*found, *wrong, *problems])
    rows: dict[str, dict[str, Any]] = {BASE: {}}
    rows |= {_label(change): change for change in _changes(base, swept, list_mode)}
    rows = {name: _own_arguments(row, base.adapter.coordinator) for name, row in rows.items()}
    if controls:
        more, problems = control_rows(base)
        rows, found = {**rows, **more}, [*found, *problems]
    for row in rows.values():
        if RATE in row:
            row["learning_rates"] = [read(row.pop(RATE), float, RATE)[0]]
    stem, held = Path(config).stem, base.data.validation_share
    names = [*map(_short, swept), *(_short(key) for key in varied if key not in swept), *["controls"] * controls]
    digest = hashlib.sha256(to_json([config, given, controls]).encode()).hexdigest()[:4]  # other values, another table
    has = ", ".join(f"{_short(key)}={_text(_value_of(base, key))}" for key in swept)
    same, told = _label(fixed), CONTROLS if controls else ""
    values = {
        "name": "-".join([stem, *names, digest]),
        "title": f"Ablation of {stem}: {', '.join(names)}",
        "note": " ".join(filter(None, [has and f"The base has {has}.", same and f"All rows have {same}.", told])),
        "baseline": BASE,
        "tasks": {base.data.task: {"config": str(config)}},
        "methods": rows,
        "ranks": varied.get(RANK, [base.adapter.r]),
        "fractions": varied.get(FRACTION, [base.data.train_fraction]),
        "seeds": seeds,
        "settings": fixed,
        "learning_rates": [*learning_rates] or [base.train.lr],
        "watch_every": base.train.watch_every,
        "importance_examples": base.train.importance_examples,
        "validation": held > 0,
        "tuning_share": held or GridConfig.tuning_share,
    }
    grid, problems = parse_config(GridConfig, values)
    if found or problems:
        raise ConfigError([*found, *problems])
    first: dict[str, str] = {}  # row by run: rows that are the same run are one row
    for name in rows:
        cell = Cell(name, base.data.task, grid.ranks[0], grid.fractions[0], 0)
        first.setdefault(run_key(grid.run(cell, grid.choices(cell.task, name)[0].lr)), name)
    grid.methods = {name: entry for name, entry in grid.methods.items() if name in first.values()}
    if len(first) == 1 and set(varied) == set(swept):
        raise ConfigError(f"no row differs from the base; method.name={base.method.name} does not read what is changed")
    return grid


def read_settings(settings: Sequence[str]) -> tuple[dict[str, list[Any]], list[str]]:
    """Return ``{key: values}`` of ``key.sub=value,value`` and what is wrong with it."""
    given: dict[str, list[Any]] = {}
    found = []
    for item in settings:
        key, separator, text = item.partition("=")
        try:
            # Brackets inside of a single value, as in a regular expression, need no quotes.
            values = yaml.safe_load(f"[{text}]") if "," in text else [yaml.safe_load(text)]
        except yaml.YAMLError:
            found.append(f"{item}: these are no YAML values with commas between them; quote them")
            continue
        if not separator or not key:
            found.append(f"{item!r} is not of the form key.sub=value or key.sub=value,value")
        elif key in given:
            found.append(f"{key} is given twice; write all of its values behind one: {key}=a,b")
        elif key in ("train.seed", "adapter.seed", "train.output_dir"):
            found.append(f"{key} cannot be set here: rows are compared seed by seed; give --seeds and --output-dir")
        elif key == "data.task" and len(values) > 1:
            found.append(f"{key} takes one value, the same for all rows, got {text}")
        else:
            given[key] = values
    return given, found


def _changes(base: RunConfig, swept: Mapping[str, list[Any]], list_mode: str) -> list[dict[str, Any]]:
    """Return what each row has other than the base, which itself is left out."""
    differing = {
        key: [v for v in values if _value_of(base, key) not in (v, read(v, float, key)[0])]
        for key, values in swept.items()
    }
    if list_mode == "list":
        return [{key: value} for key, values in differing.items() for value in values]
    combinations = (dict(zip(swept, values, strict=True)) for values in itertools.product(*swept.values()))
    changes = ({key: value for key, value in c.items() if value in differing[key]} for c in combinations)
    return [change for change in changes if change]


def _own_arguments(row: Mapping[str, Any], base: CoordinatorConfig) -> dict[str, Any]:
    """Return a row without the arguments of the base's convolution that its own convolution does not know."""
    conv, key = row.get("adapter.coordinator.conv"), "adapter.coordinator.conv_kwargs"
    if not isinstance(conv, str) or conv == "none" or any(name.startswith(key) for name in row):
        return dict(row)
    try:
        cls = resolve_conv(conv)
        known = {*asks(cls), *asks(MessagePassing)}
    except ValueError:  # said where the row is tried
        return dict(row)
    kept = {name: value for name, value in base.conv_kwargs.items() if is_stack(cls) or name in known}
    changed = {key: {}, **{f"{key}.{name}": value for name, value in kept.items()}}
    return {**row, **(changed if len(kept) < len(base.conv_kwargs) else {})}


def _label(change: Mapping[str, Any]) -> str:
    """Return ``conv=GATv2Conv, layers=2`` for a row."""
    return ", ".join(f"{_short(key)}={_text(value)}" for key, value in change.items())


def _short(key: str) -> str:
    """Return the last part of a key, without ``num_``; the last two where one says too little."""
    *sections, leaf = key.split(".")
    stages = [section for section in vars(StructLoraConfig()).values() if dataclasses.is_dataclass(section)]
    if leaf in VAGUE or sum(leaf in vars(section) for section in stages) > 1:
        return ".".join([*sections[-1:], leaf])
    return leaf.removeprefix("num_")


def control_rows(base: RunConfig) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Return the controls of `structlora_pyg.data.edges` that a configuration can have, and what is wrong."""
    if base.method.name not in PLAIN:
        known = ", ".join(PLAIN)
        return {}, [f"--controls belongs to method.name={known}; got {base.method.name}, which passes no messages"]
    name, method = PLAIN[base.method.name]
    rows: dict[str, dict[str, Any]] = {name: {"method.name": method}, "no filter": {"adapter.filter.kind": "none"}}
    if base.adapter.coordinator.lift == "none":  # without noise nothing is left
        del rows["no filter"]
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
    if base.adapter.taught:
        rows |= {"one level": {f"{part}.levels": "global"}, "fixed level": {f"{part}.levels": "fixed"}}
    if base.adapter.graph.edges in ("full", "none", "learned"):  # where all nodes are alike
        del rows["shuffled nodes"]
    if base.adapter.graph.edges == "learned":  # nothing would train them
        for row in ("no coordinator", "MLP coordinator"):
            rows[row][f"{graph}.edges"] = "none"
    return {name: {k: v for k, v in row.items() if _value_of(base, k) != v} for name, row in rows.items()}, []


def _value_of(config: RunConfig, key: str) -> Any:
    node: Any = config
    for part in key.split("."):
        node = (node if isinstance(node, Mapping) else getattr(node, "__dict__", {})).get(part)
    return node


def _text(value: Any) -> str:
    if isinstance(value, set):
        value = sorted(value)
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("\n").removesuffix("\n...")
