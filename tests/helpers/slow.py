"""Cases that ``make test`` leaves out, see CONTRIBUTING.md."""

from collections.abc import Iterable
from typing import Any

import pytest


def slow_but(usual: Iterable[Any], cases: Iterable[Any]) -> list[Any]:
    """Return cases as parameters of a test, all but the usual ones marked as slow."""
    usual, params = [*usual], []
    for case in cases:
        values = case if isinstance(case, tuple) else (case,)
        params.append(pytest.param(*values, marks=[] if case in usual else [pytest.mark.slow]))
    return params
