"""A table of a page that can be sorted by its headings and filtered by some of its columns.

The script is `page/sort_filter.js`. Without it the whole table stands there, in the order of its rows.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

from structlora_pyg.study.report.page import page_file
from structlora_pyg.study.report.tables import Table, heading, paragraph

Cell = str | tuple[str, float]


@dataclass(frozen=True, kw_only=True)
class SortableTable:
    """A long table with a control for every filtered column, and headings that sort.

    Args:
        columns: Headings, one a column.
        rows: Cells: text, or text and the number to sort by; NaN comes last in both directions.
        filters: Headings of the columns to choose a value of.
        title: Heading above it.
        note: What a reader has to know to read it.

    Raises:
        ValueError: A row of another length, or a filter that is no column.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    filters: Sequence[str] = ()
    title: str = ""
    note: str = ""

    def __post_init__(self) -> None:
        self.table()
        for name in self.filters:
            if name not in self.columns:
                raise ValueError(f"the filter {name!r} is no column; use some of {', '.join(self.columns)}")

    def table(self) -> Table:
        """Return the same rows as a table that stands still."""
        rows = [[_text(cell) for cell in row] for row in self.rows]
        return Table(columns=self.columns, rows=rows, title=self.title, note=self.note)

    def html(self, anchor: str) -> str:
        """Return a section with controls, which the script shows, and the table."""
        head = "".join(f'<th scope="col">{html.escape(c)}</th>' for c in self.columns)
        body = "".join(
            "<tr>" + "".join(_cell_html(cell, "th" if j == 0 else "td") for j, cell in enumerate(row)) + "</tr>"
            for row in self.rows
        )
        label = html.escape(self.title or "table")
        return (
            f'<section class="sortable" id="{anchor}">{heading(self.title)}{self._controls(anchor)}'
            f'<div class="scroll" tabindex="0" role="region" aria-label="{label}">'
            f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
            f"{paragraph(self.note, 'note')}<script>{page_file('sort_filter.js')}</script></section>"
        )

    def _controls(self, anchor: str) -> str:
        fields = ""
        for name in self.filters:
            column = list(self.columns).index(name)
            found = dict.fromkeys((_number(row[column]), _text(row[column])) for row in self.rows)
            values = sorted(found, key=lambda value: value[0])  # texts keep the order of the rows
            options = "".join(f"<option>{html.escape(text)}</option>" for _, text in values)
            fields += (
                f'<label for="{anchor}-{column}">{html.escape(name)} <select id="{anchor}-{column}" '
                f'data-column="{column}"><option value="">all</option>{options}</select></label>'
            )
        count = f"{len(self.rows)} of {len(self.rows)} rows"
        return (
            f'<form class="controls" hidden>{fields}<button type="reset">reset</button>'
            f'<output aria-live="polite">{count}</output></form>'
        )


def _text(cell: Cell) -> str:
    return cell if isinstance(cell, str) else cell[0]


def _number(cell: Cell) -> float:
    """Return the number that orders the values of a control; text has none."""
    return 0.0 if isinstance(cell, str) or math.isnan(cell[1]) else cell[1]


def _cell_html(cell: Cell, kind: str) -> str:
    scope = ' scope="row"' if kind == "th" else ""
    number = "" if isinstance(cell, str) else f' data-number="{"" if math.isnan(cell[1]) else repr(float(cell[1]))}"'
    return f"<{kind}{scope}{number}>{html.escape(_text(cell))}</{kind}>"
