"""The shape that a JSON file has to have, as plain Python, and the first place where one does not have it.

``str, bool, int, float``: a value of that kind (an int is a float, a bool is no number); ``[shape]``: a list;
``{"key": shape}``: an object with at least these keys, ``"key?"`` one that may be absent; ``{str: shape}``: an object
with any keys; ``(shape,)``: that, or null.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterator
from typing import Any

KINDS = {str: "text", bool: "true or false", int: "a whole number", float: "a number"}


def misfit(value: Any, shape: Any) -> str | None:
    """Return what was found where `value` does not have `shape`, and what was expected; None if it has."""
    return next(_misfits(value, shape, ""), None)


def _misfits(value: Any, shape: Any, place: str) -> Iterator[str]:
    if isinstance(shape, tuple):
        if value is not None:
            yield from _misfits(value, shape[0], place)
    elif isinstance(shape, list):
        if not isinstance(value, list):
            yield _said(place, value, "a list")
            return
        for i, inner in enumerate(value):
            yield from _misfits(inner, shape[0], f"{place}[{i}]")
    elif isinstance(shape, dict):
        if not isinstance(value, dict):
            yield _said(place, value, "an object")
            return
        for key, inner in shape.items():
            for name in value if key is str else [key.removesuffix("?")]:
                deeper = f"{place}.{name}" if place else name
                if name in value:
                    yield from _misfits(value[name], inner, deeper)
                elif not key.endswith("?"):
                    yield f"it has no {deeper!r}"
    elif isinstance(value, bool) != (shape is bool) or not isinstance(value, (int, float) if shape is float else shape):
        yield _said(place, value, KINDS[shape])


def _said(place: str, value: Any, expected: str) -> str:
    return f"its {place!r} is {reprlib.repr(value)}, not {expected}"
