"""Reports: one self-contained HTML page of text, tables and figures; the tables as text and LaTeX too.

A report is a title and a list of `Section`; `render_page` turns it into text, `save_report` into files. The page needs
no network: style and SVG figures stand inside it. The templates are in ``templates/``.
"""

from __future__ import annotations

import io
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import jinja2
import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from pandas import DataFrame

from structlora_pyg.analysis.plots import GRID, INK, MUTED, PAGE
from structlora_pyg.checks import replace_file

WHITE = "#ffffff"
MARKS = "ᵃᵇᶜᵈᵉᶠᵍʰⁱʲᵏˡᵐⁿᵒᵖʳˢᵗᵘᵛʷˣʸᶻ"  # of footnotes

_TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("structlora_pyg.study.report"),
    autoescape=jinja2.select_autoescape(["html"]),
    trim_blocks=True,
    undefined=jinja2.StrictUndefined,
)

LATEX_HEAD = r"""% Tables of a comparison, for \input; needs \usepackage{booktabs,longtable}.
% Written by `structlora report`; changes will be lost.
"""
LATEX_SIGNS = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"$<$", ">": r"$>$", "|": r"$|$", '"': "''",
    "±": r"$\pm$", "\u00d7": r"$\times$", "\u2013": "--", "\u2014": "---", "\u2212": r"$-$", "≤": r"$\leq$",
    "≥": r"$\geq$", "Δ": r"$\Delta$", "→": r"$\rightarrow$", "…": r"\ldots{}", "°": r"$^\circ$", "·": r"$\cdot$",
    "[": "{[}", "]": "{]}",  # a bare one at the start of a row would be an argument of the line break before it
    **{mark: rf"\textsuperscript{{{letter}}}" for mark, letter in zip(MARKS, "abcdefghijklmnoprstuvwxyz", strict=True)},
}  # fmt: skip


@dataclass(kw_only=True, eq=False)  # sections of one title are not one
class Section:
    """A heading and what stands below it, in this order: text, table, figure, code, and further sections.

    All text is plain: it is escaped. Headings get their level from the nesting: a section of
    the report is a second-level heading, a section inside it a third-level one.

    Args:
        title: The heading; empty for none.
        text: Paragraphs, separated by blank lines.
        table: A data frame of text. A column index of several levels becomes headings that span columns; the first
            column holds the headings of the rows.
        bold: Cells of it in bold, ``(row, column)``.
        notes: Notes below the table, one per line, for instance ``"ᵃ one seed failed"``.
        figure: A figure.
        alt: What the figure shows, for those who do not see it.
        caption: Text below the figure, or else below the table.
        name: File name of the figure without ending, for `save_report`; a figure without a name gets no file.
        code: Preformatted text: configurations, versions.
        fold: Whether the section is closed at first and opens on a click.
        sections: Sections inside this one.
    """

    title: str = ""
    text: str = ""
    table: DataFrame | None = None
    bold: Collection[tuple[int, int]] = ()
    notes: Sequence[str] = ()
    figure: Figure | None = None
    alt: str = ""
    caption: str = ""
    name: str = ""
    code: str = ""
    fold: bool = False
    sections: list[Section] = field(default_factory=list)

    @cached_property
    def drawing(self) -> str:
        """The figure as SVG on white, its letters as text, the same every time."""
        buffer = io.StringIO()
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "figure"}):
            assert self.figure is not None
            self.figure.savefig(buffer, format="svg", facecolor=WHITE, metadata={"Date": None, "Creator": None})
        return buffer.getvalue()

    @cached_property
    def cells(self) -> list[list[str]]:
        """The rows of the table."""
        assert self.table is not None
        return [[" ".join(str(cell).split()) for cell in row] for row in self.table.itertuples(index=False)]

    @property
    def headings(self) -> list[list[tuple[str, int]]]:
        """The headings of the table, a row for every level, each with the number of columns that it spans."""
        assert self.table is not None
        names, levels = self.table.columns.to_frame().to_numpy().tolist(), self.table.columns.nlevels
        tops = [[(n[-1], len(list(m))) for n, m in groupby(names, itemgetter(slice(k)))] for k in range(1, levels)]
        return [*tops, [(name[-1], 1) for name in names]]

    def walk(self) -> Iterator[Section]:
        """Yield this section and all inside it, in reading order."""
        yield self
        for section in self.sections:
            yield from section.walk()


def render_page(title: str, sections: Sequence[Section], lead: str = "", facts: Mapping[str, str] | None = None) -> str:
    """Return a self-contained HTML page, for light and dark themes, narrow screens and paper; see `save_report`.

    Where a section has others inside it, the page starts with links to all of them, and is wider.
    """
    values = {"title": title, "sections": sections, "lead": lead, "facts": facts or {}, "svg": svg}
    return _TEMPLATES.get_template("page.html").render(values)


def save_report(
    folder: str | Path,
    stem: str,
    title: str,
    sections: Sequence[Section],
    lead: str = "",
    facts: Mapping[str, str] | None = None,
) -> dict[str, Path]:
    """Write ``<stem>.html`` and the named figures; each file is replaced at once.

    Args:
        folder: Where the files go; made if it is missing. Figures go to ``figures/`` in it.
        stem: Name of the page without ending.
        title: Title and first heading.
        sections: What the report holds, from top to bottom.
        lead: The result in a sentence, set apart at the top.
        facts: Short facts under the title, ``{name: value}``.

    Returns:
        ``{name: path}`` of all files, by their names in the folder: ``report.html``, ``figures/ranks.svg``, ...

    Raises:
        FileExistsError: `folder` is a file.
        OSError: A file cannot be written.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"output_dir={str(folder)!r} is a file; give a folder")
    files: dict[str, str | bytes] = {f"{stem}.html": render_page(title, sections, lead, facts)}
    for section in (inner for outer in sections for inner in outer.walk()):
        if section.figure is not None and section.name:
            files[f"figures/{section.name}.svg"] = section.drawing
    return {name: replace_file(folder / name, content) for name, content in files.items()}


def table_text(section: Section) -> str:
    """Return a table with aligned columns, in the form of Markdown; headings of several levels become one row."""
    assert section.table is not None
    names = section.table.columns.to_frame().to_numpy().tolist()
    head, body = [" ".join(dict.fromkeys(filter(None, map(str, name)))) for name in names], section.cells
    widths = [max(3, *map(len, column)) for column in zip(head, *body, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    aligned = [
        [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        for row in [head, rule, *body]
    ]
    return "\n".join("| " + " | ".join(row) + " |" for row in aligned)


def svg(section: Section, prefix: str) -> Markup:
    """Return the figure of a section as an SVG element for use inside a page.

    The colours `INK`, `MUTED`, `GRID` and `PAGE` follow the page's theme, and every id starts with `prefix`, so that
    figures of one page do not refer to each other's parts.
    """
    text = re.sub(r"^.*?(?=<svg)|<metadata>.*?</metadata>", "", section.drawing, flags=re.DOTALL)
    text = text.replace(f"fill: {WHITE}", "fill: none", 1)  # what lies behind the figure
    text = re.sub(r'(\bid="|\bxlink:href="#|\bhref="#|url\(#)', rf"\g<1>{prefix}-", text)
    for color, variable in ((INK, "--ink"), (MUTED, "--muted"), (GRID, "--grid"), (PAGE, "--page")):
        text = text.replace(color, f"var({variable})")
    # At least this wide (3/4 of its natural size): below it letters become too small, and the box around it scrolls.
    least = 72 * section.figure.get_figwidth() if section.figure else 0
    opening = Markup('<svg role="img" aria-label="{}" style="min-width:{:.0f}px"').format(section.alt, least)
    return Markup(text.replace("<svg", opening, 1).strip())


def percent(share: float) -> str:
    """Return a share of the data: ``10 %``."""
    return f"{100 * share:g} %"


def count_of(count: int, what: str) -> str:
    """Return a number of things in words a reader would use."""
    return f"{count} {what}{'s' * (count != 1)}"


class Notes(list[str]):
    """Footnotes of a table: equal texts share a mark."""

    def mark(self, remarks: Iterable[str]) -> str:
        """Return the mark of some remarks; nothing without a remark."""
        text = "; ".join(dict.fromkeys(remarks))
        if text and text not in self:
            self.append(text)
        return self._mark(self.index(text)) if text else ""

    def lines(self) -> list[str]:
        """Return the texts behind their marks."""
        return [f"{self._mark(k)} {text}" for k, text in enumerate(self)]

    def _mark(self, k: int) -> str:
        return (MARKS[k // len(MARKS) - 1] if k >= len(MARKS) else "") + MARKS[k % len(MARKS)]


def text_table(
    title: str, frame: DataFrame, *sentences: str, bold: Iterable[tuple[int, int]] = (), notes: Notes | None = None
) -> Section:
    """Return a section with a table of text: sentences below it, cells ``(row, column)`` in bold, footnotes."""
    caption, lines = " ".join(filter(None, sentences)), notes.lines() if notes is not None else ()
    return Section(title=title, table=frame, bold=set(bold), caption=caption, notes=lines)


def latex_table(section: Section, label: str, title: str = "") -> str:
    """Return a table as LaTeX with booktabs, in a ``longtable``, which goes on over pages.

    Args:
        section: A section with a table of text.
        label: What ``tab:`` labels it by, without special characters.
        title: What stands before the title in the caption.
    """
    assert section.table is not None
    bold = np.full(section.table.shape, "", dtype=object)
    for cell in section.bold:
        bold[cell] = "bfseries:;"
    style = section.table.style.hide(axis="index").apply(lambda _: bold, axis=None)
    text = style.format(latex_text).format_index(latex_text, axis="columns").to_latex(
        environment="longtable", hrules=True, multicol_align="c", label=f"tab:{label}",
        column_format="l" + "r" * (section.table.shape[1] - 1),
        caption=latex_text(f"{title}: {section.title[:1].lower()}{section.title[1:]}" if title else section.title),
    )  # fmt: skip
    notes = r"\par ".join(map(latex_text, filter(None, [*section.notes, section.caption])))
    return f"{{\\footnotesize\\setlength{{\\tabcolsep}}{{3pt}}\n{text}\\noindent {notes}\\par}}"


def latex_text(text: str) -> str:
    r"""Return text in which nothing is a command: ``50 %`` becomes ``50 \%``."""
    text = "".join(LATEX_SIGNS.get(letter, letter) for letter in " ".join(str(text).split()))
    return re.sub(r"(?<![\w.)])-(?=\d)", "$-$", text)
