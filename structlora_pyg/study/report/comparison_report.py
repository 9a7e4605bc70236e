"""The report of a comparison: Markdown, LaTeX and one self-contained page, from the records of its runs."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from structlora_pyg.files import replace_file
from structlora_pyg.study.report.comparison_figures import coherence_figures, forest_figures, line_figures
from structlora_pyg.study.report.comparison_tables import (
    cost_table,
    difference_table,
    long_table,
    other_metrics_table,
    score_table,
    structure_table,
)
from structlora_pyg.study.report.contrasts import Summary, summarize
from structlora_pyg.study.report.latex import latex
from structlora_pyg.study.report.page import Details, FigureSection, Group, Part, Table, figure_file, page
from structlora_pyg.study.report.paper import paper_table
from structlora_pyg.study.report.records import Grid, read_comparison
from structlora_pyg.study.report.smoothing_figures import smoothing_figures
from structlora_pyg.study.report.tables import markdown

TITLE = "Comparison of fine-tuning methods"
LATEX_HEAD = r"""% Tables of a comparison, for \input; needs \usepackage{booktabs,graphicx}.
% Written by `structlora report`; changes will be lost.
"""


class Chapter(NamedTuple):
    """A grid in the report.

    Attributes:
        name: Its name, different from that of every other chapter.
        summary: Its numbers.
        parts: Its tables and figures, in order.
    """

    name: str
    summary: Summary
    parts: list[Table | FigureSection]


def write_comparison(folders: Sequence[str | Path], output_dir: str | Path) -> dict[str, Path]:
    """Write the report of one or several comparisons.

    Args:
        folders: What `structlora compare` wrote, one folder a comparison.
        output_dir: Where ``report.md``, ``report.tex``, ``report.html`` and the folder ``figures`` go.

    Returns:
        ``{name: path}`` of all files, by their names in the folder: ``report.html``, ``figures/ranks-data.svg``, ...

    Raises:
        RecordError: A folder cannot be read; nothing is written then.
        ValueError: No folder.
        OSError: The output cannot be written.
    """
    if not folders:
        raise ValueError("give at least one folder that `structlora compare` wrote")
    grids = [grid for folder in folders for grid in read_comparison(folder)]
    chapters = [_chapter(name, grid) for name, grid in zip(_names(grids), grids, strict=True)]
    facts, lead = _facts(grids), _lead(chapters)
    files: dict[str, str | bytes] = {
        "report.md": _markdown(chapters, facts, lead),
        "report.tex": _latex(chapters),
        "report.html": page(TITLE, _page_parts(chapters), lead, facts, contents=True),
    }
    for chapter in chapters:
        for part in chapter.parts:
            if isinstance(part, FigureSection):
                for kind in ("svg", "png"):
                    files[f"figures/{part.name}.{kind}"] = figure_file(part.figure, kind)
    return {name: replace_file(Path(output_dir) / name, content) for name, content in files.items()}


def _names(grids: Sequence[Grid]) -> list[str]:
    """Return names that make good file names; where folders share a name, the folder's stands before it."""
    count = Counter(grid.name for grid in grids)
    names: list[str] = []
    for grid in grids:
        name = grid.name if count[grid.name] == 1 else f"{grid.folder.resolve().name}-{grid.name}"
        name = re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-") or "grid"
        while name in names:
            name += "-again"
        names.append(name)
    return names


def _chapter(name: str, grid: Grid) -> Chapter:
    summary = summarize(grid)
    parts = [
        score_table(summary),
        *line_figures(summary, name),
        difference_table(summary),
        *forest_figures(summary, name),
        other_metrics_table(grid),
        cost_table(grid),
        structure_table(grid),
        *coherence_figures(grid, name),
        *smoothing_figures(grid, name),
        paper_table(grid.paper) if grid.paper else None,
    ]
    return Chapter(name, summary, [part for part in parts if part is not None])


def _facts(grids: Sequence[Grid]) -> dict[str, str]:
    planned, done, failed, without = _counts(grids)
    left = "".join(f", {n} {what}" for n, what in ((failed, "failed"), (without, "cannot be made")) if n)
    devices = dict.fromkeys(str(run.data.get("device", "unknown")) for grid in grids for run in grid.all_done())
    facts = {
        "runs": f"{done} of {planned} done{left}",
        "methods": str(len({method for grid in grids for method in grid.methods})),
        "tasks": str(len({setting.task for grid in grids for setting in grid.settings})),
        "device": "; ".join(devices),
    }
    return {name: text for name, text in facts.items() if text}


def _counts(grids: Sequence[Grid]) -> tuple[int, int, int, int]:
    """Return how many runs are planned, done, failed, and cannot be made; a run that grids share counts once."""
    done = {(grid.folder, run.key) for grid in grids for run in grid.all_done()}
    every = {(grid.folder, run.key) for grid in grids for cell in grid.runs.values() for run in cell.values()}
    waiting = sum(len(grid.missing(*cell)) for grid in grids for cell in grid.planned)
    without = sum(len(seeds) for grid in grids for seeds in grid.without.values())
    return len(every) + waiting + without, len(done), len(every) - len(done), without


def _lead(chapters: Sequence[Chapter]) -> str:
    """Return what may be claimed, grid by grid."""
    sentences = []
    for _, summary, _ in chapters:
        grid = summary.grid
        if not summary.contrasts:
            continue
        verdicts = Counter(c.verdict for c in summary.contrasts)
        tested = sum(verdicts[v] for v in ("better", "worse", "no difference shown"))
        if not tested:
            sentences.append(f"{grid.title}: no comparison has the two seeds yet that a test needs.")
            continue
        said = []
        for verdict in ("better", "worse"):
            methods = Counter(c.method for c in summary.contrasts if c.verdict == verdict)
            if methods:
                named = ", ".join(f"{method} ({count})" for method, count in methods.items())
                said.append(f"{verdict} than {grid.baseline} in {verdicts[verdict]}: {named}")
        said.append(f"no difference shown in {verdicts['no difference shown']}")
        where = " (means over tasks among them)" if summary.averaged else ""
        where += " on validation data" if grid.validation else ""
        sentences.append(f"{grid.title}: of {tested} tested comparisons{where}, {'; '.join(said)}.")
    return " ".join(sentences)


def _page_parts(chapters: Sequence[Chapter]) -> list[Part]:
    groups: list[Part] = [
        Group(title=c.summary.grid.title, paragraphs=[c.summary.grid.note], parts=c.parts) for c in chapters
    ]
    versions = {
        json.dumps({"device": run.data.get("device"), **run.data.get("versions", {})}, indent=2): None
        for chapter in chapters
        for run in chapter.summary.grid.all_done()
    }
    return [
        *groups,
        long_table([chapter.summary for chapter in chapters]),
        Details(title="Devices and versions", text="\n".join(versions) or "no run is done yet"),
    ]


def _markdown(chapters: Sequence[Chapter], facts: dict[str, str], lead: str) -> str:
    blocks = [f"# {TITLE}", "  \n".join(f"{name}: {markdown(text)}" for name, text in facts.items()), markdown(lead)]
    for chapter in chapters:
        blocks += [f"## {markdown(chapter.summary.grid.title)}", markdown(chapter.summary.grid.note)]
        for part in chapter.parts:
            if isinstance(part, Table):
                blocks.append(part.markdown())
            else:
                blocks.append(f"### {markdown(part.title)}")
                alt = re.sub(r"[\[\]]", "", markdown(part.alt))
                blocks += [f"![{alt}](figures/{part.name}.svg)", markdown(part.caption)]
    blocks.append(long_table([chapter.summary for chapter in chapters]).table().markdown(level=2))
    return "\n\n".join(block for block in blocks if block) + "\n"


def _latex(chapters: Sequence[Chapter]) -> str:
    blocks = [LATEX_HEAD]
    for chapter in chapters:
        tables = [part for part in chapter.parts if isinstance(part, Table)]
        for k, table in enumerate(tables, start=1):
            titled = f"{chapter.summary.grid.title}: {table.title[:1].lower()}{table.title[1:]}"
            blocks.append(latex(table, f"{chapter.name}-{k}", titled))
    return "\n\n".join(blocks) + "\n"
