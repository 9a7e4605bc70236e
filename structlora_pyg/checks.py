"""Values from outside become typed dataclasses here, and every problem becomes a line that names key, value and fix."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import difflib
import functools
import importlib
import inspect
import json
import math
import os
import tempfile
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Union, cast, get_args, get_origin


class ConfigError(ValueError):
    """All problems of a configuration, one per line; it takes one of them, or a list.

    Attributes:
        problems: The single messages, each naming the key, the value got and the fix.
    """

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
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


def asks(function: Any) -> dict[str, bool]:
    """Return the arguments that a function or class can be given by name, and whether it needs each."""
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default is p.empty for p in parameters if p.kind in named}


def construct(
    part: Any,
    known: Mapping[str, Any],
    given: Mapping[str, Any],
    asked: Mapping[str, bool] | None = None,
    key: str = "",
) -> Any:
    """Call a class with what it asks for by name.

    Args:
        part: A class, or a function that returns an object.
        known: Values by name, of which it gets what it asks for.
        given: Arguments it gets in any case; they win.
        asked: What it asks for, where its signature does not say all.
        key: What a user would write `given` behind, for the message.

    Raises:
        ValueError: If an argument is missing, or the call fails.
    """
    name, asked = getattr(part, "__name__", str(part)), asks(part) if asked is None else asked
    arguments = {n: v for n, v in known.items() if n in asked} | dict(given)
    if missing := [n for n, needed in asked.items() if needed and n not in arguments]:
        hint = "{" + ", ".join(f"{n!r}: ..." for n in missing) + "}"
        raise ValueError(f"{name} needs {', '.join(missing)}; pass {key}={hint}")
    try:
        return part(**arguments)
    except Exception as error:  # whatever a foreign constructor raises becomes one clear message
        raise ValueError(f"{name} cannot be built: {first_line(error)}") from error


def make_part(spec: Any, known: Mapping[str, Any], names: Mapping[str, Any] | None = None, what: str = "part") -> Any:
    """Return an object that a setting asks for.

    Args:
        spec: One of `names`, a dotted path, a class or function, which is called with what it asks for by name; a
            mapping of such a ``name`` and further arguments; or an object, which is copied.
        known: Values by name.
        names: Classes by short name.
        what: What `names` are, for the message.

    Raises:
        ValueError: Unknown name, missing argument, or a constructor that fails.
    """
    given = dict(spec) if isinstance(spec, Mapping) else {}
    spec = given.pop("name", "") if isinstance(spec, Mapping) else spec
    if isinstance(spec, str):
        if spec not in (names or {}) and "." not in spec:
            raise ValueError(f"{spec!r} is no {what} and no dotted path.{nearest(spec, names or ())}")
        spec = (names or {}).get(spec) or import_path(spec)
    if not isinstance(spec, (type, types.FunctionType, functools.partial)):
        return copy.deepcopy(spec)
    return construct(spec, known, given, key="arguments")


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, without its full stop."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


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
        raise ConfigError(f"{error.name} is not installed: pip install 'structlora-pyg[{extra}]'") from error


def fits_json(value: Any) -> bool:
    """Tell whether a value can be written to a file as JSON."""
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True


class Rule(NamedTuple):
    """What a value has to be besides its type, as metadata of an annotation: ``Annotated[int, bounds(1)]``."""

    text: str
    holds: Callable[[Any], bool]


def bounds(low: float, high: float = math.inf, open_low: bool = False, open_high: bool = False) -> Rule:
    """Return the rule that a number is in an interval."""

    def holds(x: float) -> bool:
        return (low < x if open_low else low <= x) and (x < high if open_high else x <= high)

    if high == math.inf:
        return Rule(f"{'>' if open_low else '>='} {low:g}", holds)
    return Rule(f"in {'(' if open_low else '['}{low:g}, {high:g}{')' if open_high else ']'}", holds)


Count = Annotated[int, bounds(1)]
CountOrZero = Annotated[int, bounds(0)]
Positive = Annotated[float, bounds(0, open_low=True)]
NotNegative = Annotated[float, bounds(0)]
Share = Annotated[float, bounds(0, 1, open_high=True)]


class Section:
    """A part of a configuration: a dataclass with defaults, whose annotations say what values are allowed."""

    has_presets: ClassVar[bool] = False  # whether it builds the sections in it, from mappings, itself

    def conflicts(self) -> list[str]:
        """Return what does not go together, empty if all does; for subclasses to say."""
        return []

    def problems(self) -> list[str]:
        """Return every problem of the values, or else what does not go together; empty if all is well."""
        kind, found = cast(Any, type(self)), []
        for name in inspect.get_annotations(kind):
            if name in self.__dataclass_fields__:  # type: ignore[attr-defined]
                value = getattr(self, name)
                got, more = read(value, _hints(kind)[name], name)
                # What is a number in a file may be written as text, what is built in Python may not.
                text = isinstance(value, str) and not isinstance(got, str)
                found += [f"{name}: got {value!r}, expected a number"] if text else more
        return found or self.conflicts()

    @classmethod
    def hint(cls, key: str) -> str:
        """Return what an unknown key may have meant."""
        return nearest(key, [field.name for field in dataclasses.fields(cls) if field.init])  # type: ignore[arg-type]


def build(cls: Any, tree: Mapping[str, Any], prefix: str = "") -> tuple[Any, list[str]]:
    """Return an instance of a section and every problem, keys given with `prefix`.

    A bad value is reported and left at its default, so that the checks of the other values still run; there is no
    instance (None) only where it could not be made at all.

    Args:
        cls: A `Section`. Where a field is a section of its own, it takes a mapping too.
        tree: Values by name.
        prefix: What to put before the names.
    """
    hints, found = _hints(cls), []
    known = [field.name for field in dataclasses.fields(cls) if field.init]
    values: dict[str, Any] = {}
    for key, value in tree.items():
        if key not in known:
            found.append(f"{prefix}{key}: unknown key.{cls.hint(str(key))}")
        elif cls.has_presets and _is_section(hints[key]) and isinstance(value, Mapping):
            values[key] = value
        else:
            got, more = read(value, hints[key], f"{prefix}{key}")
            found += more
            if not more or isinstance(got, Section):
                values[key] = got
    try:
        instance = cls(**values)
    except ConfigError as error:
        return None, found + [prefix + p for p in error.problems]
    except (TypeError, ValueError) as error:  # PEFT's own checks of LoRA's arguments
        return None, [*found, f"{prefix.rstrip('.')}: {error}"]
    # The values have been read above; a section with presets has raised what does not go together.
    more = [] if cls.has_presets else [prefix + p for p in instance.conflicts()]
    return instance, list(dict.fromkeys([*found, *more]))


def read(value: Any, hint: Any, place: str) -> tuple[Any, list[str]]:
    """Return a value as the annotated type, and what is wrong with it; `place` is its dotted path."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        got, found = read(value, args[0], place)
        broken = [] if found else [rule for rule in args[1:] if not rule.holds(got)]
        return got, found + [f"{place} must be {rule.text}, got {value!r}" for rule in broken]
    if origin is Literal:
        if value is False:  # YAML 1.1 reads a bare off and a bare no as false
            value = next((word for word in ("off", "no") if word in args), value)
        return value, [] if value in args else [not_one_of(place, value, map(str, args))]
    if origin in (Union, types.UnionType):
        tries = [read(value, a, place) for a in args]
        return next((t for t in tries if not t[1]), tries[0])
    if _is_section(hint):
        if isinstance(value, hint):
            return value, [f"{place}.{p}" for p in value.problems()]
        if isinstance(value, Mapping):
            return build(hint, value, f"{place}.")
        return value, [f"{place}: got {value!r}, expected a section of settings"]
    if (origin is list and isinstance(value, (list, tuple))) or (origin is dict and isinstance(value, Mapping)):
        items: Any = value.items() if isinstance(value, Mapping) else enumerate(value)
        inner = {key: read(item, args[-1], f"{place}.{key}") for key, item in items}
        found = [p for _, more in inner.values() for p in more]
        return ({k: v for k, (v, _) in inner.items()} if origin is dict else [v for v, _ in inner.values()]), found
    if hint is float and isinstance(value, str):  # YAML 1.1 reads 5e-4 as a string
        with contextlib.suppress(ValueError):
            value = float(value)
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and -1e300 < value < 1e300
    good, expected = {
        float: (number, "a number"),
        int: (number and isinstance(value, int), "an integer"),
        bool: (isinstance(value, bool), "a bool"),
        str: (isinstance(value, str), "a text"),
        type(None): (value is None, "nothing"),
        list: (isinstance(value, (list, tuple)), "a list"),
        dict: (isinstance(value, Mapping), "a mapping"),
    }.get(origin or hint, (True, ""))
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):  # one of PEFT's
        good, expected = isinstance(value, hint), f"a {hint.__name__}"
    wrong = f"{place}: got {value!r}, expected {expected}"
    return (float(value) if good and hint is float else value), [wrong] * (not good)


def _is_section(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Section)


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls, include_extras=True)


def not_one_of(name: str, value: Any, allowed: Iterable[str], more: str = "") -> str:
    """Return that a value is not one of those allowed, and the nearest that is."""
    allowed = list(allowed)
    return f"{name}={value!r} is unknown; allowed: {', '.join(allowed)} {more}".rstrip() + "." + nearest(value, allowed)


def part_problems(name: str, value: Any, allowed: Sequence[str]) -> list[str]:
    """Return what is wrong with a setting that `make_part` reads: a short name, a dotted path, or an object."""
    known = not isinstance(value, str) or value in allowed or "." in value
    good = known and (isinstance(value, str) or callable(value))
    return [] if good else [not_one_of(name, value, allowed, "or a dotted path, class or object")]


def replace_file(path: str | Path, content: str | bytes) -> Path:
    """Write a file beside its place, flush it to disk and move it there in one step.

    A reader, or a run that starts after a crash, sees the old file or the new one, never a part of it.

    Args:
        path: Where the file goes, which is returned; missing parent folders are made.
        content: Text (written as UTF-8) or bytes.

    Raises:
        OSError: If the folder cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode("utf-8") if isinstance(content, str) else content
    # A name of its own for every writer: two processes may write the same file at once.
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes files that only their owner can read
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return path


def check_writable(folder: str | Path, setting: str) -> None:
    """Make sure that a folder can be made and written to, before any work; nothing is left behind.

    Args:
        folder: The folder, which need not exist.
        setting: What names it, for the error.

    Raises:
        OSError: If it cannot; the message names setting, folder and reason.
    """
    place = Path(folder).expanduser().absolute()
    try:
        there = next(p for p in (place, *place.parents) if p.exists())
        os.rmdir(tempfile.mkdtemp(dir=there))
    except OSError as error:
        raise OSError(f"{setting}={folder} cannot be written to ({error.strerror}); choose another folder") from error


def short(error: BaseException, most: int = 300) -> str:
    """Return the message of an error on one line of at most `most` characters; its type if it has none."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= most else text[:most] + " ..."
