"""Reports: one self-contained HTML page of tables, figures and text.

A page is a list of parts; `Table`, `FigureSection`, `Text`, `Details` and `Group` are parts, and so is anything with
their ``html`` method. The page needs no network: styles and SVG figures stand inside it. Only a
`structlora_pyg.study.report.sortable.SortableTable` brings a script, and can be read without it.
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

from structlora_pyg.analysis.plot_style import GRID, INK, MUTED, PAGE
from structlora_pyg.files import replace_file
from structlora_pyg.study.report.tables import Table, heading, paragraph

__all__ = [
    "Details", "FigureSection", "Group", "Part", "Table", "Text", "page", "page_file", "svg", "write_report",
]  # fmt: skip


class Part(Protocol):
    """A piece of a page."""

    def html(self, anchor: str) -> str:
        """Return the HTML of this part; every id in it starts with `anchor`, which no other part has."""


@dataclass(frozen=True, kw_only=True)
class FigureSection:
    """A figure with heading and caption.

    Args:
        title: Heading above it.
        figure: The figure.
        alt: What the figure shows, for those who do not see it.
        caption: Text below it.
        narrow: The same figure for narrow screens; default: `figure`, which then scrolls sideways.
        name: Name of the figure where it also stands in a file of its own, without ending.
    """

    title: str
    figure: Figure
    alt: str
    caption: str = ""
    narrow: Figure | None = None
    name: str = ""

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
        return f'<section id="{anchor}">{heading(self.title)}<figure>{drawing}{caption}</figure></section>'


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
        text = "".join(paragraph(p) for p in self.paragraphs)
        return f'<section id="{anchor}">{heading(self.title)}{text}</section>'


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


@dataclass(frozen=True, kw_only=True)
class Group:
    """Parts that belong together, under a heading of their own; their headings are one level lower.

    Args:
        title: Heading above them.
        parts: The parts.
        paragraphs: Plain text before the first part, one string a paragraph.
    """

    title: str
    parts: Sequence[Part]
    paragraphs: Sequence[str] = ()

    def html(self, anchor: str) -> str:
        """Return a section of sections."""
        text = "".join(paragraph(p) for p in self.paragraphs)
        inside = "".join(part.html(f"{anchor}-{i}") for i, part in enumerate(self.parts, start=1))
        for deeper in (2, 1):
            inside = inside.replace(f"<h{deeper + 1}>", f"<h{deeper + 2}>").replace(
                f"</h{deeper + 1}>", f"</h{deeper + 2}>"
            )
        return f'<section class="group" id="{anchor}">{heading(self.title)}{text}{inside}</section>'


def write_report(
    path: str | Path,
    title: str,
    parts: Sequence[Part],
    lead: str = "",
    facts: Mapping[str, str] | None = None,
    contents: bool = False,
) -> Path:
    """Write a page to a file, at once: a reader sees the old page or the new one.

    Args:
        path: The HTML file; missing folders are made.
        title: Title and first heading.
        parts: What the page holds, from top to bottom.
        lead: The result in a sentence, set apart at the top.
        facts: Short facts under the title, ``{name: value}``.
        contents: Whether the page starts with a list of its headings; such a page is also wider.

    Returns:
        The path.

    Raises:
        OSError: If the file cannot be written.
    """
    return replace_file(path, page(title, parts, lead, facts or {}, contents))


def page(title: str, parts: Sequence[Part], lead: str, facts: Mapping[str, str], contents: bool = False) -> str:
    """Return the page that `write_report` writes."""
    listed = "".join(f"<div><dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd></div>" for k, v in facts.items())
    body = "".join(part.html(f"part-{i}") for i, part in enumerate(parts, start=1))
    kind = ' class="broad"' if contents else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{html.escape(title)}</title><style>{page_file('report.css')}</style></head>\n"
        f"<body><main{kind}><header><h1>{html.escape(title)}</h1>"
        + (f"<dl>{listed}</dl>" if listed else "")
        + paragraph(lead, "lead")
        + f"</header>\n{_contents(body) if contents else ''}{body}</main></body></html>\n"
    )


def figure_file(figure: Figure, kind: str) -> bytes:
    """Return a figure on white as a file, the same every time.

    Args:
        figure: The figure.
        kind: ``svg`` or ``png``.
    """
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "figure"}):
        metadata = {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
        figure.savefig(buffer, format=kind, dpi=160, facecolor="white", metadata=metadata)
    return buffer.getvalue()


def page_file(name: str) -> str:
    """Return a file that is part of every page: the style sheet or a script."""
    return (Path(__file__).parent / "assets" / name).read_text(encoding="utf-8")


def _contents(body: str) -> str:
    """Return a list of links to the sections of a page and to the sections in its groups."""
    items = ""
    found = re.findall(r'<section[^>]* id="([^"]+)"><h([23])>(.*?)</h\2>', body)
    for k, (anchor, level, title) in enumerate(found):
        following = found[k + 1][1] if k + 1 < len(found) else "2"
        link = f'<li><a href="#{anchor}">{title}</a>'
        items += link + ("<ul>" if (level, following) == ("2", "3") else "</li>")
        items += "</ul></li>" if (level, following) == ("3", "2") else ""
    return f'<nav aria-label="Contents"><ul>{items}</ul></nav>\n'


def svg(figure: Figure, prefix: str, alt: str) -> str:
    """Return a figure as an SVG element for use inside a page.

    Letters stay letters, the colours `INK`, `MUTED`, `GRID` and `PAGE` follow the page's theme, and every id starts
    with `prefix`, so that figures of one page do not refer to each other's parts.

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
    for color, variable in ((INK, "--ink"), (MUTED, "--muted"), (GRID, "--grid"), (PAGE, "--page")):
        text = text.replace(color, f"var({variable})")
    # At least this wide (3/4 of its natural size): below it letters become too small, and the box around it scrolls.
    least = 72 * figure.get_figwidth()
    opening = f'<svg role="img" aria-label="{html.escape(alt)}" style="min-width:{least:.0f}px"'
    return text.replace("<svg", opening, 1).strip()
