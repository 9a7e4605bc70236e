"""The numbers that the paper prints (StructLoRA, arXiv 2603.14228), to stand beside a comparison, never in it."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from structlora_pyg.study.report.cells import text_table
from structlora_pyg.study.report.page import Section


def paper_table(name: str) -> Section:
    """Return a table of the paper (arXiv 2603.14228), marked as such, to stand beside a comparison, never in it.

    Args:
        name: ``table1`` to ``table5``.

    Raises:
        ValueError: Another name.
    """
    known = _paper()
    if name not in known:
        raise ValueError(f"paper={name!r} is not a table of the paper; use {', '.join(known)} or null")
    number_of, found = name.removeprefix("table"), known[name]
    rows = [[label, *map(str, values)] for label, values in found["rows"].items()]
    return text_table(
        f"As printed in the paper, not reproduced: Table {number_of}, {found['title']}",
        pd.DataFrame(rows, columns=["", *found["columns"]]),
        f"As printed in arXiv 2603.14228, Table {number_of}: other models, data and hardware; not reproduced here.",
        found.get("remark", ""),
    )


@functools.cache
def _paper() -> dict[str, Any]:
    """Return the numbers that the paper prints, by the name of the table."""
    found = yaml.safe_load((Path(__file__).parent / "paper.yaml").read_text(encoding="utf-8"))
    return {name: table for name, table in found.items() if name.startswith("table")}
