"""Reports: one self-contained HTML page, and the same as Markdown, of text, tables and figures.

A report is a title and a list of `Section`; `render_page` and `render_markdown` turn it into text, `save_report` into
files. The page needs no network: style, script and SVG figures stand inside it. The templates are in ``templates/``.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import jinja2
import matplotlib
import pandas as pd
from markupsafe import Markup
from matplotlib.figure import Figure
from pandas import DataFrame

from structlora_pyg.analysis.plots import GRID, INK, MUTED, PAGE
from structlora_pyg.checks import replace_file
from structlora_pyg.study.stats import Paired, mean_sd

WHITE = "#ffffff"
_TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("structlora_pyg.study.report"),
    autoescape=jinja2.select_autoescape(["html"]),
    trim_blocks=True,
    undefined=jinja2.StrictUndefined,
)


@dataclass(kw_only=True)
class Section:
    """A heading and what stands below it, in this order: text, table, figure, code, and further sections.

    All text is plain: it is escaped for HTML and Markdown. Headings get their level from the nesting: a section of
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


def render_page(
    title: str,
    sections: Sequence[Section],
    lead: str = "",
    facts: Mapping[str, str] | None = None,
) -> str:
    """Return a self-contained HTML page, for light and dark themes, narrow screens and paper; see `save_report`.

    Where a section has others inside it, the page starts with links to all of them, and is wider.
    """
    return _TEMPLATES.get_template("page.html").render(
        title=title,
        sections=sections,
        lead=lead,
        facts=facts or {},
        svg=svg,
    )


def render_markdown(
    title: str, sections: Sequence[Section], lead: str = "", facts: Mapping[str, str] | None = None
) -> str:
    """Return a report as Markdown beside the folder ``figures``; see `save_report`.

    Figures without a name, and sections that are folded on the page, are left out.
    """
    blocks = [f"# {_plain(title)}", "  \n".join(f"{k}: {_plain(v)}" for k, v in (facts or {}).items()), _plain(lead)]
    for section in sections:
        blocks += _markdown_blocks(section, 2)
    return "\n\n".join(block for block in blocks if block) + "\n"


def save_report(
    folder: str | Path,
    stem: str,
    title: str,
    sections: Sequence[Section],
    lead: str = "",
    facts: Mapping[str, str] | None = None,
    markdown: bool = True,
) -> dict[str, Path]:
    """Write ``<stem>.html``, ``<stem>.md`` and the named figures; each file is replaced at once.

    Args:
        folder: Where the files go; made if it is missing. Figures go to ``figures/`` in it.
        stem: Name of page and document without ending.
        title: Title and first heading.
        sections: What the report holds, from top to bottom.
        lead: The result in a sentence, set apart at the top.
        facts: Short facts under the title, ``{name: value}``.
        markdown: Whether the Markdown file is written too.

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
    if markdown:
        files[f"{stem}.md"] = render_markdown(title, sections, lead, facts)
    for section in (inner for outer in sections for inner in outer.walk()):
        if section.figure is not None and section.name:
            files[f"figures/{section.name}.svg"] = section.drawing
    return {name: replace_file(folder / name, content) for name, content in files.items()}


def table_text(section: Section, markdown: bool = False) -> str:
    """Return a table with aligned columns, as Markdown or for a terminal; headings of several levels become one row.

    Args:
        section: Has the table.
        markdown: Whether to escape what Markdown would read as markup, and set bold cells in bold.
    """
    assert section.table is not None
    names = section.table.columns.to_frame().to_numpy().tolist()
    head, body = [" ".join(dict.fromkeys(filter(None, map(str, name)))) for name in names], section.cells
    if markdown:
        head, body = [_plain(name) for name in head], [[_plain(cell) for cell in row] for row in body]
        for i, j in section.bold:
            body[i][j] = f"**{body[i][j]}**"
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


def _markdown_blocks(section: Section, level: int) -> Iterator[str]:
    if section.fold:
        return
    yield f"{'#' * min(level, 6)} {_plain(section.title)}" if section.title else ""
    yield from map(_plain, section.text.split("\n\n"))
    if section.table is not None:
        yield table_text(section, markdown=True)
        yield "  \n".join(map(_plain, section.notes))
    if section.figure is not None and section.name:
        alt = re.sub(r"[\[\]]", "", _plain(section.alt))
        yield f"![{alt}](figures/{section.name}.svg)"
    if section.table is not None or section.name:
        yield _plain(section.caption)
    yield f"```\n{section.code}\n```" if section.code else ""
    for inner in section.sections:
        yield from _markdown_blocks(inner, level + 1)


def _plain(text: str) -> str:
    """Return text in which nothing is Markdown."""
    return re.sub(r"([\\`*_|<>#])", r"\\\1", " ".join(text.split()))


NONE = "\u2013"  # an empty cell
MARKS = "ᵃᵇᶜᵈᵉᶠᵍʰⁱʲᵏˡᵐⁿᵒᵖʳˢᵗᵘᵛʷˣʸᶻ"  # of footnotes


def percent(share: float) -> str:
    """Return a share of the data: ``10 %``."""
    return f"{100 * share:g} %"


def number(form: str) -> Callable[[float], str]:
    """Return a function that writes a number in a form such as ``{:+.2f}``, and NaN as a dash."""
    return lambda value: form.format(value) if math.isfinite(value) else NONE


def p_text(p: float) -> str:
    """Return a p-value with three digits, or a dash where there is none."""
    return NONE if math.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


def mean_text(values: Iterable[float], digits: int) -> str:
    """Return ``71.2 ± 0.4`` for finite values, the mean alone for a single one, a dash for none."""
    values = list(values)
    if not values:
        return NONE
    mean, sd = mean_sd(values)
    return f"{mean:.{digits}f} ± {sd:.{digits}f}" if len(values) > 1 else f"{mean:.{digits}f}"


def interval_text(paired: Paired, digits: int) -> str:
    """Return a mean difference with its confidence interval: ``+1.20 [+0.40, +2.00]``."""
    return f"{paired.difference:+.{digits}f} [{paired.low:+.{digits}f}, {paired.high:+.{digits}f}]"


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
    title: str, frame: pd.DataFrame, *sentences: str, bold: Iterable[tuple[int, int]] = (), notes: Notes | None = None
) -> Section:
    """Return a section with a table of text: sentences below it, cells ``(row, column)`` in bold, footnotes."""
    return Section(
        title=title,
        table=frame,
        bold=set(bold),
        caption=" ".join(filter(None, sentences)),
        notes=notes.lines() if notes is not None else (),
    )


def count_of(count: int, what: str) -> str:
    """Return a number of things in words a reader would use."""
    return f"{count} {what}{'s' * (count != 1)}"
