"""Configurations from YAML files and ``key.sub=value`` overrides."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from structlora_pyg.checks import ConfigError, build
from structlora_pyg.study.run_config import RunConfig


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> RunConfig:
    """Build a `RunConfig` from a YAML file and ``key.sub=value`` overrides.

    Args:
        path: YAML file, or the name of a shipped one (``rte`` is ``structlora_pyg/configs/rte.yaml``).
        overrides: Strings ``key.sub=value``; the value is read as YAML.

    Raises:
        ConfigError: With every problem found: unreadable file, unknown keys, wrong types, values out of range.
    """
    tree, found = read_yaml(path)
    for item in overrides:
        found += override(tree, item)
    config, more = build(RunConfig, tree)
    if found or more:
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
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        more = f"; shipped configs: {', '.join(known)}."
        if not shipped:
            run = "; that names the configuration of a run, a grid is a file such as benchmarks/configs/glue.yaml"
            more = run if str(path) in known else ""
        return {}, [f"config file {str(path)!r} does not exist{more}"]
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        return {}, [f"config file {str(path)!r} cannot be read: {' '.join(str(error).split())}"]
    if not isinstance(tree, dict):
        return {}, [f"config file {str(path)!r} must hold a mapping of keys, got {type(tree).__name__}"]
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
