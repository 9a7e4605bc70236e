"""Configurations from YAML files, ``key.sub=value`` overrides and stored runs, and back to plain values.

Every problem is reported at once, by its dotted path, before anything is loaded.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from peft import LoraConfig

from structlora_pyg.checks import ConfigError, Section, build, nearest, short
from structlora_pyg.study.config import SECTIONS, RunConfig

CONFIG_FILE = "config.json"  # of a run, in its folder
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the one in C takes a tenth of the time


def parse_config(
    cls: type[Section], tree: Mapping[str, Any], check: Callable[[Any], list[str]] = lambda built: []
) -> tuple[Any, list[str]]:
    """Return a section, or a whole configuration, built from nested mappings, and every problem.

    Args:
        cls: What to build.
        tree: Its values by name.
        check: Returns more problems of an instance.

    Returns:
        The instance, None if there are problems, and a message for each of them: dotted path, value got, values
        allowed, nearest name.
    """
    built, found = build(cls, tree)
    found = list(dict.fromkeys([*found, *([] if built is None else check(built))]))
    return (None if found else built), found


def stored_config(folder: str | Path) -> RunConfig:
    """Return the configuration that a run keeps in its folder, what is new since at its default.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is damaged, another program's, or does not fit this version.
    """
    file = Path(folder) / CONFIG_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; give the train.output_dir of a run of structlora train")
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
        config, found = parse_config(RunConfig, tree)
        found += [] if {"method", "train", "adapter"} <= tree.keys() else ["it lacks sections of a run"]
    except (OSError, ValueError, AttributeError) as error:
        found = [short(error)]
    if found:
        raise ValueError(f"{file} is damaged, another program's, or of another version: {found[0]}")
    return config


def load_config(
    path: str | Path | None = None,
    overrides: Sequence[str] = (),
    check: Callable[[RunConfig], list[str]] = lambda config: [],
) -> RunConfig:
    """Build a `RunConfig` from a YAML file and ``key.sub=value`` overrides.

    Args:
        path: YAML file, or the name of a shipped one (``rte`` is ``structlora_pyg/configs/rte.yaml``).
        overrides: Strings ``key.sub=value``; the value is read as YAML.
        check: Returns more problems, for instance `structlora_pyg.study.run.run_problems`.

    Raises:
        ConfigError: With every problem found: unreadable file, unknown keys, wrong types, values out of range.
    """
    tree, found = read_yaml(path)
    if found:
        raise ConfigError(found)
    for item in overrides:
        found += override(tree, item)
    config, more = parse_config(RunConfig, tree, check)
    if config is None or found:
        raise ConfigError(found + more)
    return config


def shipped_configs() -> dict[str, Path]:
    """Return the YAML files that come with the package, by name."""
    return {p.stem: p for p in sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))}


def read_yaml(path: str | Path | None, shipped: bool = True) -> tuple[dict[str, Any], list[str]]:
    """Return the content of a YAML file and what is wrong with it.

    Args:
        path: The file; None: nothing.
        shipped: Take the name of a shipped configuration for its file.
    """
    if path is None:
        return {}, []
    file = Path(path)
    known = shipped_configs()
    if shipped and not file.is_file() and str(path) in known:
        file = known[str(path)]
    try:
        tree = yaml.load(file.read_text(encoding="utf-8"), LOADER)
    except FileNotFoundError:
        more = f"; shipped configs: {', '.join(known)}."
        if not shipped:
            run = "; that names the configuration of a run, a grid is a file such as benchmarks/configs/glue.yaml"
            more = run if str(path) in known else ""
        return {}, [f"config file {str(path)!r} does not exist{more}{nearest(str(path), known) if shipped else ''}"]
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        return {}, [f"config file {str(path)!r} cannot be read: {' '.join(str(error).split())}"]
    if not isinstance(tree, dict):
        return {}, [f"config file {str(path)!r} must hold a mapping of keys, got {type(tree).__name__}"]
    if "peft_type" in tree:
        return {}, [
            f"{path} is the configuration of an adapter that PEFT saved, not of a run, whose own is config.json in its "
            f"train.output_dir; to look at the adapter: structlora inspect {file.parent}"
        ]
    return tree, []


def override(tree: dict[str, Any], item: str) -> list[str]:
    """Put ``key.sub=value`` into nested keys, the value read as YAML; return what is wrong with it."""
    key, separator, text = item.partition("=")
    if not separator or not key:
        return [f"override {item!r} is not of the form key.sub=value"]
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return [f"override {item!r}: the value is not valid YAML; quote it"]
    return put(tree, key, value)


def put(tree: dict[str, Any], key: str, value: Any) -> list[str]:
    """Set a dotted key in nested mappings; return what is wrong with it."""
    *parents, leaf = key.split(".")
    node = tree
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            return [f"{key}={value!r}: {parent!r} holds a value, not a section"]
        node = child
    node[leaf] = value
    return []


def config_to_dict(config: RunConfig) -> dict[str, Any]:
    """Return a configuration as plain values; of PEFT's own settings only those that are not the default."""
    default, lora = LoraConfig(), config.adapter.to_lora_config()
    names = [f.name for f in dataclasses.fields(LoraConfig) if f.init]
    changed = {n: getattr(lora, n) for n in names if getattr(lora, n) != getattr(default, n)}
    sections = {name: dataclasses.asdict(getattr(config, name)) for name in SECTIONS}
    return json.loads(to_json({**sections, "adapter": {**changed, **config.adapter.own_fields()}}))


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested keys joined by dots."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        deeper = isinstance(value, Mapping) and value
        found |= flat(value, f"{prefix}{key}.") if deeper else {f"{prefix}{key}": value}
    return found


def to_json(value: Any) -> str:
    """Return JSON text with a final newline; sets become sorted lists, what else JSON has no form for becomes text."""
    return json.dumps(value, indent=2, allow_nan=False, default=_plain) + "\n"


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, (set, frozenset)) else str(value)
