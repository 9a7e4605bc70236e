"""The tables of the pages that are not made of sections yet."""

from __future__ import annotations

import html
import itertools
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

NONE = "\u2013"  # an empty cell
MARK = re.compile(r" ?\[([a-z]{1,2})\]$")  # a footnote mark at the end of a cell


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table whose first column names its rows; the same for page, document and terminal.

    Args:
        columns: Headings, one a column.
        rows: Cells as text, as many a row as there are columns.
        title: Heading above it.
        note: What a reader has to know to read it.
        levels: The same headings in several rows, one above the other, each as long as `columns`; equal neighbours
            stand once above their columns. Default: one row, `columns`.
        strong: ``(row, column)`` of the cells that are set in bold.
        footnotes: Text of the marks ``[a]``, ``[b]``, ... at the end of cells, in this order.

    Raises:
        ValueError: A row of another length.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    note: str = ""
    levels: Sequence[Sequence[str]] = ()
    strong: Collection[tuple[int, int]] = frozenset()
    footnotes: Sequence[str] = ()

    def __post_init__(self) -> None:
        for row in (*self.rows, *self.levels):
            if len(row) != len(self.columns):
                raise ValueError(f"the row {list(row)} has {len(row)} cells for {len(self.columns)} columns")

    def html(self, anchor: str) -> str:
        """Return a section with the table in a box that scrolls sideways where the screen is narrow."""
        body = "".join(
            f'<tr><th scope="row">{self._cell_html(i, 0)}</th>'
            + "".join(f"<td>{self._cell_html(i, j)}</td>" for j in range(1, len(row)))
            + "</tr>"
            for i, row in enumerate(self.rows)
        )
        notes = "".join(
            f"<li><sup>[{mark}]</sup> {html.escape(text)}</li>"
            for mark, text in zip(marks(), self.footnotes, strict=False)
        )
        label = html.escape(self.title or "table")
        return (
            f'<section id="{anchor}">{heading(self.title)}'
            f'<div class="scroll" tabindex="0" role="region" aria-label="{label}">'
            f"<table><thead>{self._head_html()}</thead><tbody>{body}</tbody></table></div>"
            + (f'<ul class="footnotes">{notes}</ul>' if notes else "")
            + f"{paragraph(self.note, 'note')}</section>"
        )

    def spans(self) -> list[list[tuple[str, int, int]]]:
        """Return the rows of headings as ``(text, columns, rows)``: how far each reaches to the right and down.

        A heading reaches right over equal neighbours that have equal headings above them, and down over rows that
        repeat it. The last row is never joined, as it names the columns.
        """
        levels = [list(level) for level in self.levels] or [list(self.columns)]
        last, found = len(levels) - 1, []
        for depth, level in enumerate(levels):
            above = [tuple(row[j] for row in levels[: depth + 1]) for j in range(len(level))]
            row, j = [], 0
            while j < len(level):
                down = 1
                while depth + down <= last and levels[depth + down][j] == level[j]:
                    down += 1
                width = 1
                if depth + down <= last:  # a heading that reaches the last row names one column
                    while j + width < len(level) and above[j + width] == above[j]:
                        width += 1
                if depth == 0 or levels[depth - 1][j] != level[j]:  # else the heading above reaches down to here
                    row.append((level[j], width, down))
                j += width
            found.append(row)
        return found

    def _head_html(self) -> str:
        cells = []
        for row in self.spans():
            line = ""
            for text, width, down in row:
                size = (f' colspan="{width}"' if width > 1 else "") + (f' rowspan="{down}"' if down > 1 else "")
                scope = "colgroup" if width > 1 else "col"
                line += f'<th scope="{scope}"{size}>{html.escape(text)}</th>'
            cells.append(f"<tr>{line}</tr>")
        return "".join(cells)

    def _cell_html(self, i: int, j: int) -> str:
        text = html.escape(self.rows[i][j])
        if self.footnotes:
            text = MARK.sub(r"&thinsp;<sup>[\1]</sup>", text)
        return f"<strong>{text}</strong>" if (i, j) in self.strong else text


def marks() -> itertools.chain[str]:
    """Return the marks of footnotes without end in sight: a, b, ..., z, aa, ab, ..., zz."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    return itertools.chain(letters, ("".join(pair) for pair in itertools.product(letters, repeat=2)))


def heading(title: str) -> str:
    """Return a second heading, or nothing."""
    return f"<h2>{html.escape(title)}</h2>" if title else ""


def paragraph(text: str, kind: str = "") -> str:
    """Return a paragraph of a class, or nothing."""
    attribute = f' class="{kind}"' if kind else ""
    return f"<p{attribute}>{html.escape(text)}</p>" if text else ""
