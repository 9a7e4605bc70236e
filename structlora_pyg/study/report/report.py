r"""The report of comparisons: one self-contained page, LaTeX and figures, from the records of their runs."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from structlora_pyg.checks import replace_file
from structlora_pyg.study.report.figures import forest_figures, line_figures, training_figure
from structlora_pyg.study.report.page import Section, count_of, save_report
from structlora_pyg.study.report.summary import TESTED, Grid, Setting, Summary, read_comparison, summarize
from structlora_pyg.study.report.tables import (
    MARKS,
    cost_table,
    difference_table,
    other_metrics_table,
    score_table,
    structure_table,
)

TITLE = "Comparison of fine-tuning methods"
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


def write_comparison(folders: Sequence[str | Path], output_dir: str | Path) -> dict[str, Path]:
    """Write the report of one or several comparisons.

    Args:
        folders: What `structlora compare` or `structlora_pyg.study.report.records.pack` wrote.
        output_dir: Where ``report.html``, ``report.tex``, ``report.csv`` (a row for every method in a setting: mean,
            difference from the baseline, p-values, verdict) and the folder ``figures`` go.

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
    summaries = [summarize(grid) for grid in grids]
    chapters = [_chapter(name, summary) for name, summary in zip(_names(grids), summaries, strict=True)]
    latex = [LATEX_HEAD]
    for name, chapter in zip(_names(grids), chapters, strict=True):
        tables = [section for section in chapter.sections if section.table is not None]
        latex += [latex_table(table, f"{name}-{k}", chapter.title) for k, table in enumerate(tables, start=1)]
    runs = pd.concat([grid.done() for grid in grids])
    columns = ["device", *(column for column in runs if column.startswith("versions."))]
    versions = runs[columns].drop_duplicates().rename(columns=lambda name: name.removeprefix("versions."))
    sections = [
        *chapters,
        Section(title="Devices and versions", code=versions.to_string(index=False) if len(runs) else "", fold=True),
    ]
    written = save_report(output_dir, "report", TITLE, sections, _lead(summaries), _facts(grids))
    texts = {"report.tex": "\n\n".join(latex) + "\n", "report.csv": _all_cells(summaries).to_csv(index=False)}
    return {**written, **{name: replace_file(Path(output_dir) / name, text) for name, text in texts.items()}}


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


def _names(grids: Sequence[Grid]) -> list[str]:
    """Return names that make good file names; where folders share a name, folder and number stand before it."""
    count = Counter(grid.name for grid in grids)
    names = [g.name if count[g.name] == 1 else f"{g.folder.resolve().name}-{k}-{g.name}" for k, g in enumerate(grids)]
    return [re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-") or "grid" for name in names]


def _chapter(name: str, summary: Summary) -> Section:
    grid = summary.grid
    sections = [
        score_table(summary),
        *line_figures(summary, name),
        difference_table(summary),
        *forest_figures(summary, name),
        other_metrics_table(grid),
        cost_table(grid),
        structure_table(grid),
        training_figure(grid, name),
    ]
    return Section(title=grid.title, text=grid.note, sections=[section for section in sections if section is not None])


def _all_cells(summaries: Sequence[Summary]) -> pd.DataFrame:
    """Return every method in every setting of all grids, with numbers as they are, for other programs."""
    frames = [summary.results.assign(comparison=summary.grid.name) for summary in summaries]
    columns = ("method", *Setting._fields, "state", "planned", "shared", "mean", "sd", *TESTED, "p", "verdict")
    return pd.concat(frames)[["comparison", *columns]]


def _facts(grids: Sequence[Grid]) -> dict[str, str]:
    cells = pd.concat([grid.cells.assign(folder=str(grid.folder)) for grid in grids])
    ran = cells[cells["device"].notna() | (cells["state"] == "failed") & cells["lr"].notna()]
    ran = ran.drop_duplicates(["folder", "key"])  # a run that grids share counts once
    done = int((ran["state"] == "done").sum())
    waiting = int((cells["state"] == "not run yet").sum())
    without = int(((cells["state"] == "failed") & cells["lr"].isna()).sum())
    failed = len(ran) - done
    left = "".join(f", {n} {what}" for n, what in ((failed, "failed"), (without, "cannot be made")) if n)
    facts = {
        "runs": f"{done} of {len(ran) + waiting + without} done{left}",
        "methods": str(len({method for grid in grids for method in grid.methods})),
        "tasks": str(len({setting.task for grid in grids for setting in grid.settings})),
        "device": "; ".join(ran["device"].dropna().unique()),
    }
    return {name: text for name, text in facts.items() if text}


def _lead(summaries: Sequence[Summary]) -> str:
    """Return what may be claimed, grid by grid."""
    sentences = []
    for summary in summaries:
        grid, compared = summary.grid, summary.results[summary.results["verdict"] != ""]
        if compared.empty:
            continue
        tested = compared[compared["paired"].notna()]
        if tested.empty:
            sentences.append(f"{grid.title}: no comparison has the two seeds yet that a test needs.")
            continue
        said = []
        for verdict, rows in tested.groupby("verdict"):
            named = ", ".join(f"{method} ({count})" for method, count in Counter(rows["method"]).items())
            shown = verdict in ("better", "worse")
            said.append(
                f"{verdict} than {grid.baseline} in {len(rows)}: {named}" if shown else f"{verdict} in {len(rows)}"
            )
        where = " (means over tasks among them)" if summary.averaged else ""
        where += " on validation data" if grid.validation else ""
        sentences.append(f"{grid.title}: of {count_of(len(tested), 'tested comparison')}{where}, {'; '.join(said)}.")
    return " ".join(sentences)
