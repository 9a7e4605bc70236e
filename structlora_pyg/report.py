"""Reports: one self-contained HTML page of tables, figures and text.

A page is a list of parts; `Table`, `FigureSection`, `Text` and `Details` are parts, and so is anything with their
``html`` method. The page needs no network and no script: styles and SVG figures stand inside it.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import matplotlib
from matplotlib.figure import Figure

from structlora_pyg.files import replace_file
from structlora_pyg.plots import GRID, INK, MUTED


class Part(Protocol):
    """A piece of a page."""

    def html(self, anchor: str) -> str:
        """Return the HTML of this part; every id in it starts with `anchor`, which no other part has."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table whose first column names its rows; the same for page and terminal.

    Args:
        columns: Headings, one a column.
        rows: Cells as text, as many a row as there are columns.
        title: Heading above it.
        note: What a reader has to know to read it.

    Raises:
        ValueError: A row of another length.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    note: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"the row {list(row)} has {len(row)} cells for {len(self.columns)} columns")

    def html(self, anchor: str) -> str:
        """Return a section with the table in a box that scrolls sideways where the screen is narrow."""
        head = "".join(f'<th scope="col">{html.escape(c)}</th>' for c in self.columns)
        body = "".join(
            f'<tr><th scope="row">{html.escape(row[0])}</th>'
            + "".join(f"<td>{html.escape(cell)}</td>" for cell in row[1:])
            + "</tr>"
            for row in self.rows
        )
        label = html.escape(self.title or "table")
        return (
            f'<section id="{anchor}">{_heading(self.title)}'
            f'<div class="scroll" tabindex="0" role="region" aria-label="{label}">'
            f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
            f"{_paragraph(self.note, 'note')}</section>"
        )

    def text(self) -> str:
        """Return the table for a terminal: first column flush left, the others flush right."""
        table = [list(self.columns), *(list(row) for row in self.rows)]
        widths = [max(len(row[k]) for row in table) for k in range(len(self.columns))]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
            for row in table
        ]
        lines.insert(1, "  ".join("-" * w for w in widths))
        return "\n".join(line.rstrip() for line in lines)


@dataclass(frozen=True, kw_only=True)
class FigureSection:
    """A figure with heading and caption.

    Args:
        title: Heading above it.
        figure: The figure.
        alt: What the figure shows, for those who do not see it.
        caption: Text below it.
        narrow: The same figure for narrow screens; default: `figure`, which then scrolls sideways.
    """

    title: str
    figure: Figure
    alt: str
    caption: str = ""
    narrow: Figure | None = None

    def html(self, anchor: str) -> str:
        """Return a section with the figure as inline SVG."""
        if self.narrow is None:
            drawing = (
                f'<div class="scroll" tabindex="0" role="region" aria-label="{html.escape(self.title)}">'
                f"{svg(self.figure, f'{anchor}-a', self.alt)}</div>"
            )
        else:
            drawing = (
                f'<div class="wide">{svg(self.figure, f"{anchor}-a", self.alt)}</div>'
                f'<div class="narrow">{svg(self.narrow, f"{anchor}-b", self.alt)}</div>'
            )
        caption = f"<figcaption>{html.escape(self.caption)}</figcaption>" if self.caption else ""
        return f'<section id="{anchor}">{_heading(self.title)}<figure>{drawing}{caption}</figure></section>'


@dataclass(frozen=True, kw_only=True)
class Text:
    """Paragraphs under a heading.

    Args:
        title: Heading.
        paragraphs: Plain text, one string a paragraph.
    """

    title: str
    paragraphs: Sequence[str]

    def html(self, anchor: str) -> str:
        """Return a section of paragraphs."""
        text = "".join(_paragraph(p) for p in self.paragraphs)
        return f'<section id="{anchor}">{_heading(self.title)}{text}</section>'


@dataclass(frozen=True, kw_only=True)
class Details:
    """Preformatted text that opens on a click: configurations, versions, raw numbers.

    Args:
        title: The line that is always visible.
        text: The text.
    """

    title: str
    text: str

    def html(self, anchor: str) -> str:
        """Return a section that is closed at first."""
        return (
            f'<section id="{anchor}"><details><summary>{html.escape(self.title)}</summary>'
            f'<pre class="scroll" tabindex="0">{html.escape(self.text)}</pre></details></section>'
        )


def write_report(
    path: str | Path, title: str, parts: Sequence[Part], lead: str = "", facts: Mapping[str, str] | None = None
) -> Path:
    """Write a page to a file, at once: a reader sees the old page or the new one.

    Args:
        path: The HTML file; missing folders are made.
        title: Title and first heading.
        parts: What the page holds, from top to bottom.
        lead: The result in a sentence, set apart at the top.
        facts: Short facts under the title, ``{name: value}``.

    Returns:
        The path.

    Raises:
        OSError: If the file cannot be written.
    """
    return replace_file(path, page(title, parts, lead, facts or {}))


def page(title: str, parts: Sequence[Part], lead: str, facts: Mapping[str, str]) -> str:
    """Return the page that `write_report` writes."""
    listed = "".join(f"<div><dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd></div>" for k, v in facts.items())
    body = "".join(part.html(f"part-{i}") for i, part in enumerate(parts, start=1))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>\n"
        f"<body><main><header><h1>{html.escape(title)}</h1>"
        + (f"<dl>{listed}</dl>" if listed else "")
        + _paragraph(lead, "lead")
        + f"</header>\n{body}</main></body></html>\n"
    )


def svg(figure: Figure, prefix: str, alt: str) -> str:
    """Return a figure as an SVG element for use inside a page.

    Letters stay letters, the colours `INK`, `MUTED` and `GRID` follow the page's theme, and every id starts with
    `prefix`, so that figures of one page do not refer to each other's parts.

    Args:
        figure: The figure.
        prefix: Start of all ids.
        alt: What the figure shows, for those who do not see it.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": prefix}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(\bid="|\bxlink:href="#|\bhref="#|url\(#)', rf"\g<1>{prefix}-", text)
    for color, variable in ((INK, "--ink"), (MUTED, "--muted"), (GRID, "--grid")):
        text = text.replace(color, f"var({variable})")
    # At least this wide (3/4 of its natural size): below it letters become too small, and the box around it scrolls.
    least = 72 * figure.get_figwidth()
    opening = f'<svg role="img" aria-label="{html.escape(alt)}" style="min-width:{least:.0f}px"'
    return text.replace("<svg", opening, 1).strip()


def _heading(title: str) -> str:
    return f"<h2>{html.escape(title)}</h2>" if title else ""


def _paragraph(text: str, kind: str = "") -> str:
    attribute = f' class="{kind}"' if kind else ""
    return f"<p{attribute}>{html.escape(text)}</p>" if text else ""


STYLE = """
:root{--ink:#1c2733;--muted:#5d6873;--grid:#d4dae0;--page:#ffffff;--box:#f4f6f8;--accent:#1d8fa3}
@media(prefers-color-scheme:dark){:root{--ink:#e6eaee;--muted:#9aa5b0;--grid:#3a444e;--page:#12171c;--box:#1b2229;
--accent:#43b3c6}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,sans-serif;-webkit-text-size-adjust:100%}
main{max-width:54rem;margin:0 auto;padding:2.2rem 1.1rem 4rem}
h1{font-size:1.75rem;line-height:1.2;margin:0 0 .8rem;text-wrap:balance}
h2{font-size:1.15rem;line-height:1.3;margin:2.6rem 0 .7rem}
p{margin:.6rem 0}
dl{display:flex;flex-wrap:wrap;gap:.2rem 1.6rem;margin:0 0 1.1rem;font-size:.875rem}
dl div{display:flex;gap:.4rem}dt{color:var(--muted)}dd{margin:0;font-variant-numeric:tabular-nums}
.lead{background:var(--box);border-left:4px solid var(--accent);border-radius:0 6px 6px 0;padding:.8rem 1rem;
font-size:1.06rem;text-wrap:pretty}
.note,figcaption{color:var(--muted);font-size:.875rem;line-height:1.5}
figure{margin:0}figcaption{margin-top:.5rem}
.scroll{overflow-x:auto;-webkit-overflow-scrolling:touch}
.scroll:focus-visible{outline:2px solid var(--accent);outline-offset:2px}
svg{display:block;width:auto;max-width:100%;height:auto;margin:0 auto}
svg text{font-family:system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif!important}
.narrow{display:none}
table{border-collapse:collapse;width:100%;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:.42rem .8rem;text-align:right;white-space:nowrap;border-bottom:1px solid var(--grid)}
thead th{color:var(--muted);font-weight:600;border-bottom:2px solid var(--grid);vertical-align:bottom}
th:first-child{text-align:left;padding-left:.2rem;position:sticky;left:0;background:var(--page)}
tbody th{font-weight:500}
details{margin-top:1rem}summary{cursor:pointer;color:var(--muted)}
pre{background:var(--box);border-radius:6px;padding:.8rem 1rem;font:.8rem/1.5 ui-monospace,SFMono-Regular,Menlo,
Consolas,monospace}
@media(max-width:40rem){.wide{display:none}.narrow{display:block}.narrow svg{width:100%;min-width:0!important}
main{padding-top:1.2rem}h1{font-size:1.45rem}th,td{padding:.42rem .5rem}
th:first-child{white-space:normal;min-width:6.5rem;max-width:8rem}}
@media print{:root{--ink:#000;--muted:#444;--grid:#bbb;--page:#fff;--box:#fff;--accent:#000}
main{max-width:none;padding:0}section{break-inside:avoid}.scroll{overflow:visible}h2{break-after:avoid}
table{font-size:9pt}th,td{padding:.3rem .4rem}th{white-space:normal}th:first-child{position:static}
svg{max-width:100%!important;min-width:0!important}}
"""
