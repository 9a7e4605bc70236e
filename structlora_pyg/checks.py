"""Values from outside become typed dataclasses here, and every problem becomes a line that names key, value and fix."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import json
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin


class ConfigError(ValueError):
    """All problems of a configuration, one per line.

    Attributes:
        problems: The single messages, each naming the key, the value got and the fix.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        super().__init__(f"the configuration has {count}:\n" + "\n".join(f"  - {p}" for p in self.problems))


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the nearest of `known`, or an empty string."""
    match = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.5)
    return f" Did you mean {match[0]!r}?" if match else ""


def import_path(path: str) -> Any:
    """Import an object by its dotted path."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{path!r} cannot be imported: {error}; give package.module.ClassName") from error


def require(module: str, extra: str) -> Any:
    """Import an optional package.

    Args:
        module: Its dotted path, for instance ``matplotlib.pyplot``.
        extra: The extra of this package that brings it, for instance ``plot``.

    Raises:
        ConfigError: If it is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:  # it is there, but something that it needs is not
            raise
        raise ConfigError([f"{error.name} is not installed: pip install 'structlora-pyg[{extra}]'"]) from error


def fits_json(value: Any) -> bool:
    """Tell whether a value can be written to a file as JSON."""
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True


def hints_of(cls: type) -> dict[str, Any]:
    """Return the types of a dataclass's fields, by name."""
    return typing.get_type_hints(cls)


def build(cls: type, tree: Mapping[str, Any], prefix: str = "") -> tuple[Any, list[str]]:
    """Return an instance (None if there are problems) and every problem, keys given with `prefix`.

    A bad value is reported and left at its default, so that the checks of the other values still run. A dataclass with
    ``checks_itself`` builds its own sections and raises; any other has ``problems()``.
    """
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    hints, found = hints_of(cls), []
    values: dict[str, Any] = {}
    for key, value in tree.items():
        if key not in fields:
            found.append(f"{prefix}{key}: unknown key.{nearest(key, fields)}")
        elif dataclasses.is_dataclass(hints[key]) and isinstance(value, Mapping):
            itself = getattr(cls, "checks_itself", False)
            section, more = (value, []) if itself else build(hints[key], value, f"{prefix}{key}.")
            values |= {} if section is None else {key: section}
            found += more
        else:
            coerced, problem = _coerce(value, hints[key])
            values |= {} if problem else {key: coerced}
            found += [f"{prefix}{key}: {problem}"] if problem else []
    required = (f for f in fields.values() if f.default is f.default_factory is dataclasses.MISSING)
    missing = [f.name for f in required if f.name not in tree]
    if missing:
        return None, found + [f"{prefix}{name}: missing section" for name in missing]
    if any(f.default is f.default_factory is dataclasses.MISSING and n not in values for n, f in fields.items()):
        return None, found
    try:
        instance = cls(**values)
    except ConfigError as error:
        return None, found + [prefix + p for p in error.problems]
    except (TypeError, ValueError) as error:  # PEFT's own checks of LoRA's arguments
        return None, [*found, f"{prefix.rstrip('.')}: {error}"]
    if not getattr(cls, "checks_itself", False):
        found += [prefix + p for p in instance.problems()]
    return (None if found else instance), found


def _coerce(value: Any, hint: Any) -> tuple[Any, str]:
    """Return the value as the hinted type and an empty string, or the value and what is wrong with it."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any or hint is None:
        return value, ""
    if origin is Literal:
        if value is False and "no" in args:  # YAML 1.1 reads a bare no as false
            return "no", ""
        return (
            (value, "")
            if value in args
            else (value, f"got {value!r}, allowed: {', '.join(map(str, args))}." + nearest(value, map(str, args)))
        )
    if origin in (Union, types.UnionType):
        tries = [_coerce(value, a) for a in args]
        return next((t for t in tries if not t[1]), (value, tries[0][1]))
    if hint is type(None):
        return (value, "") if value is None else (value, f"got {value!r}, expected nothing")
    if hint is float and isinstance(value, str):  # YAML 1.1 reads 5e-4 as a string
        try:
            return float(value), ""
        except ValueError:
            return value, f"got {value!r}, expected a number"
    if hint is float:
        good = isinstance(value, (int, float)) and not isinstance(value, bool)
        return (float(value), "") if good else (value, f"got {value!r}, expected a number")
    if hint is int:
        good = isinstance(value, int) and not isinstance(value, bool)
        return (value, "") if good else (value, f"got {value!r}, expected an integer")
    if hint in (bool, str):
        return (value, "") if isinstance(value, hint) else (value, f"got {value!r}, expected a {hint.__name__}")
    if origin in (list, dict) and not isinstance(value, origin):
        return value, f"got {value!r}, expected a {origin.__name__}"
    if isinstance(hint, type) and dataclasses.is_dataclass(hint) and not isinstance(value, hint):
        return (
            value,
            f"got {value!r}, expected a section with keys {', '.join(f.name for f in dataclasses.fields(hint))}",
        )
    return value, ""


def not_one_of(name: str, value: Any, allowed: Iterable[str], more: str = "") -> str:
    """Return that a value is not one of those allowed, and the nearest that is."""
    allowed = list(allowed)
    return f"{name}={value!r} is unknown; allowed: {', '.join(allowed)} {more}".rstrip() + "." + nearest(value, allowed)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value


def at_least(config: Any, low: float, *names: str) -> list[str]:
    """Return a problem for every named attribute that is below a bound, or no number."""
    values = {name: getattr(config, name) for name in names}
    return [f"{n} must be >= {low:g}, got {v!r}" for n, v in values.items() if not (_is_number(v) and v >= low)]


def positive(config: Any, *names: str) -> list[str]:
    """Return a problem for every named attribute that is not above 0."""
    values = {name: getattr(config, name) for name in names}
    return [f"{n} must be > 0, got {v!r}" for n, v in values.items() if not (_is_number(v) and v > 0)]


def between(
    config: Any, low: float, high: float, *names: str, open_left: bool = False, open_right: bool = False
) -> list[str]:
    """Return a problem for every named attribute that is outside of an interval."""
    interval = f"{'(' if open_left else '['}{low:g}, {high:g}{')' if open_right else ']'}"
    found = []
    for name in names:
        value = getattr(config, name)
        inside = _is_number(value) and low <= value <= high
        if not inside or (open_left and value == low) or (open_right and value == high):
            found.append(f"{name} must be in {interval}, got {value!r}")
    return found
