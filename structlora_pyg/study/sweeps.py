"""The syntax of an ablation: ``key.sub=a,b`` gives a key several values, ``key.sub=a`` one.

Commas inside brackets, braces or quotes belong to a value: ``key=[a, b]`` is one value, a list; ``key=[a, b],[c]`` are
two. Values are read as YAML, as everywhere on the command line.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import yaml

from structlora_pyg.config import StructLoraConfig

VAGUE = ("kind", "name", "path", "size")  # names that mean nothing without their section
OTHERWISE = {  # keys that are set in another way
    "train.seed": "rows are compared seed by seed; --seeds N runs the seeds 0 to N - 1",
    "adapter.seed": "rows are compared seed by seed; --seeds N runs the seeds 0 to N - 1",
    "train.output_dir": "the folder of all runs is --output-dir",
}
SAME_FOR_ALL = ("train.watch_every", "train.importance_examples", "data.validation_share", "data.task")


class Value(NamedTuple):
    """A value of a key.

    Attributes:
        text: As it was written.
        value: As YAML reads it.
    """

    text: str
    value: Any


def read_settings(settings: Sequence[str]) -> tuple[dict[str, list[Value]], list[str]]:
    """Return ``{key: values}`` of ``key.sub=value,value`` and what is wrong with it."""
    given: dict[str, list[Value]] = {}
    found = []
    for item in settings:
        key, separator, text = item.partition("=")
        if not separator or not key:
            found.append(f"{item!r} is not of the form key.sub=value or key.sub=value,value")
        elif key in given:
            found.append(f"{key} is given twice; write all of its values behind one: {key}=a,b")
        else:
            values, problems = _values(key, text)
            found += problems
            if key in OTHERWISE:
                found.append(f"{key} cannot be set here: {OTHERWISE[key]}")
            elif key in SAME_FOR_ALL and len(values) > 1:
                found.append(f"{key} takes one value, the same for all rows, got {text}")
            elif values:
                given[key] = values
    return given, found


def _values(key: str, text: str) -> tuple[list[Value], list[str]]:
    pieces = [piece.strip() for piece in split_values(text)]
    if not all(pieces) and len(pieces) > 1:
        return [], [f"{key}={text}: there is nothing between two commas, or after the last one"]
    try:
        values = [Value(piece, yaml.safe_load(piece)) for piece in pieces]
    except yaml.YAMLError:
        return [], [f"{key}={text}: the value is not valid YAML; quote it"]
    seen = [repr(value.value) for value in values]
    twice = [value.text for i, value in enumerate(values) if seen[i] in seen[:i]]
    return values, [f"{key}={text}: {value} stands there twice" for value in twice]


def split_values(text: str) -> list[str]:
    """Return the pieces between the commas that stand outside brackets, braces and quotes."""
    pieces, depth, quote = [""], 0, ""
    for character in text:
        if character == "," and depth == 0 and not quote:
            pieces.append("")
            continue
        pieces[-1] += character
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        else:
            depth += (character in "[{") - (character in "]}")
    return pieces


def changes(
    swept: Mapping[str, Sequence[Value]], new: Callable[[str, Value], bool], list_mode: str
) -> Iterator[dict[str, Value]]:
    """Yield what each row has other than the base, which itself is left out; `new` tells what differs from it."""
    differing = {key: [value for value in values if new(key, value)] for key, values in swept.items()}
    if list_mode == "list":
        yield from ({key: value} for key, values in differing.items() for value in values)
        return
    for combination in itertools.product(*([(key, v) for v in values] for key, values in swept.items())):
        if change := {key: value for key, value in combination if value in differing[key]}:
            yield change


def label(change: Mapping[str, Value]) -> str:
    """Return ``conv=GATv2Conv, layers=2`` for a row."""
    return ", ".join(f"{short(key)}={value.text}" for key, value in change.items())


def short(key: str) -> str:
    """Return the last part of a key, without ``num_``; the last two where one says too little."""
    *sections, leaf = key.split(".")
    shared = sum(leaf in vars(section) for section in vars(StructLoraConfig()).values() if _is_section(section)) > 1
    vague = leaf in VAGUE or shared
    return ".".join([*sections[-1:], leaf]) if vague else leaf.removeprefix("num_")


def _is_section(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)
