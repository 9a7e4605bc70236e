r"""Tables as LaTeX fragments: booktabs, one ``table`` environment each, for ``\input``."""

from __future__ import annotations

import re

from structlora_pyg.study.report.tables import MARK, NONE, Table, marks

ROWS = 42  # more do not fit on a page
WIDE = 88  # letters a line that still fit in \small
SIGNS = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"$<$", ">": r"$>$", "|": r"$|$", '"': "''",
    "±": r"$\pm$", "\u00d7": r"$\times$", NONE: "--", "\u2014": "---", "\u2212": r"$-$", "≤": r"$\leq$", "≥": r"$\geq$",
    "Δ": r"$\Delta$", "→": r"$\rightarrow$", "…": r"\ldots{}", "°": r"$^\circ$", "·": r"$\cdot$",
    "[": "{[}", "]": "{]}",
}  # fmt: skip


def escape(text: str) -> str:
    r"""Return text in which nothing is a command: ``50 %`` becomes ``50 \%``.

    Brackets stand in braces, as one at the start of a row would be read as an argument of the line break before it.
    """
    text = "".join(SIGNS.get(letter, letter) for letter in " ".join(text.split()))
    return re.sub(r"(?<![\w.)])-(?=\d)", "$-$", text)


def latex(table: Table, label: str, title: str = "") -> str:
    """Return a table as one ``table`` environment; a long one is continued in further environments.

    Args:
        table: The table.
        label: What ``tab:`` labels it by, without special characters.
        title: The caption; default: the table's title.
    """
    parts = [range(i, min(i + ROWS, len(table.rows))) for i in range(0, max(len(table.rows), 1), ROWS)]
    return "\n\n".join(
        _environment(table, label, title or table.title, rows, k, len(parts)) for k, rows in enumerate(parts)
    )


def _environment(table: Table, label: str, title: str, rows: range, part: int, parts: int) -> str:
    caption = escape(title) + (f" ({part + 1} of {parts})" if parts > 1 else "")
    names = table.levels[-1] if table.levels else table.columns
    widths = [max(len(row[j]) for row in (*table.rows, names)) for j in range(len(names))]
    wide = sum(widths) + 2 * len(widths) > WIDE
    lines = [r"\begin{table}[tp]", r"  \centering"]
    lines += [rf"  \caption{{{caption}}}", rf"  \label{{tab:{label}{f'-{part + 1}' if part else ''}}}", r"  \small"]
    if wide:
        lines.append(r"  \resizebox{\linewidth}{!}{%")
    lines.append(rf"  \begin{{tabular}}{{l{'r' * (len(table.columns) - 1)}}}")
    lines += [r"    \toprule", *_head(table), r"    \midrule"]
    for i in rows:
        cells = [_cell(table, i, j) for j in range(len(table.columns))]
        lines.append(f"    {' & '.join(cells)} \\\\")
    lines += [r"    \bottomrule", r"  \end{tabular}" + ("}" if wide else "")]
    notes = [
        rf"\textsuperscript{{{mark}}} {escape(text)}" for mark, text in zip(marks(), table.footnotes, strict=False)
    ]
    if table.note and not part:
        notes.append(escape(table.note))
    if notes:
        below = r"\footnotesize " + r"\par ".join(notes)
        lines.append(rf"  \par\smallskip\begin{{minipage}}{{\linewidth}}{below}\end{{minipage}}")
    return "\n".join([*lines, r"\end{table}"])


def _head(table: Table) -> list[str]:
    """Return the rows of headings, with a rule below those that stand above several columns."""
    levels = [list(level) for level in table.levels] or [list(table.columns)]
    lines, taken = [], [0] * len(table.columns)  # rows for which a column is filled by a heading above
    for row in table.spans():
        cells, rules, j, waiting = [], [], 0, list(row)
        while j < len(table.columns):
            if taken[j]:
                taken[j] -= 1
                cells.append("")
                j += 1
                continue
            text, width, down = waiting.pop(0)
            taken[j : j + width] = [down - 1] * width
            if width > 1:
                cells.append(rf"\multicolumn{{{width}}}{{c}}{{{escape(text)}}}")
                rules.append(rf"\cmidrule(lr){{{j + 1}-{j + width}}}")
            else:
                cells.append(escape(text))
            j += width
        lines.append(f"    {' & '.join(cells)} \\\\{' ' if rules else ''}{''.join(rules)}")
    assert len(lines) == len(levels)
    return lines


def _cell(table: Table, i: int, j: int) -> str:
    text, mark = table.rows[i][j], ""
    if table.footnotes and (found := MARK.search(text)):
        text, mark = text[: found.start()], rf"\textsuperscript{{{found[1]}}}"
    text = escape(text) + mark
    return rf"\textbf{{{text}}}" if (i, j) in table.strong else text
