"""A table says the same in every format, and nothing in its cells is taken for markup."""

from __future__ import annotations

import re

import pytest

from structlora_pyg.study.report.latex import escape, latex
from structlora_pyg.study.report.paper import NAMES, paper_table
from structlora_pyg.study.report.sortable import SortableTable
from structlora_pyg.study.report.tables import NONE, Table, marks

LEVELS = [["", "STS-B", "STS-B", "CoLA"], ["", "r = 2", "r = 8", "r = 2"]]


def table(**changes) -> Table:
    given = {
        "columns": ["", "STS-B, r = 2", "STS-B, r = 8", "CoLA, r = 2"],
        "levels": LEVELS,
        "rows": [["LoRA", "70.1 ± 0.2", "71.0", "-1.5"], ["A|B_c & <b> 10 %", f"{NONE} [a]", "[-0.1, +0.3]", "**2**"]],
        "strong": {(0, 1)},
        "footnotes": ["50 % of #1 failed"],
        "title": "Rank & data_1",
        "note": "p < 0.05",
    }
    return Table(**{**given, **changes})


def test_headings_of_several_levels_are_joined():
    assert table().spans() == [
        [("", 1, 2), ("STS-B", 2, 1), ("CoLA", 1, 1)],
        [("r = 2", 1, 1), ("r = 8", 1, 1), ("r = 2", 1, 1)],
    ]


def test_headings_join_only_below_the_same_heading():
    levels = [["", "a", "a", "b"], ["", "x", "x", "x"], ["", "1", "2", "1"]]
    assert table(levels=levels).spans()[1] == [("x", 2, 1), ("x", 1, 1)]


def test_equal_headings_of_the_last_level_stay_apart():
    assert table(levels=[["", "a", "a", "a"]]).spans() == [[("", 1, 1), *[("a", 1, 1)] * 3]]


def test_headings_of_another_length_are_refused():
    with pytest.raises(ValueError, match="has 2 cells for 4 columns"):
        table(levels=[["", "a"]])


def test_page_marks_footnotes_and_bold_and_spans_columns():
    text = table().html("t")
    assert '<th scope="col" rowspan="2"></th><th scope="colgroup" colspan="2">STS-B</th>' in text
    assert "<td><strong>70.1 ± 0.2</strong></td>" in text
    assert "<sup>[a]</sup></td>" in text
    assert "<li><sup>[a]</sup> 50 % of #1 failed</li>" in text
    assert "<td>[-0.1, +0.3]</td>" in text
    assert "A|B_c &amp; &lt;b&gt; 10 %" in text


def test_markdown_has_one_row_of_headings_and_escapes_its_signs():
    lines = table().markdown().splitlines()
    assert lines[0] == r"### Rank & data\_1"
    assert lines[2] == "|  | STS-B, r = 2 | STS-B, r = 8 | CoLA, r = 2 |"
    assert lines[3] == "| --- | ---: | ---: | ---: |"
    assert lines[4] == "| LoRA | **70.1 ± 0.2** | 71.0 | -1.5 |"
    assert lines[5] == rf"| A\|B\_c & \<b\> 10 % | {NONE} [a] | [-0.1, +0.3] | \*\*2\*\* |"
    assert lines[7:] == [r"[a] 50 % of \#1 failed", "", r"p \< 0.05"]


def test_latex_escapes_every_special_sign():
    assert escape(r"50 % & $x_1^2$ #{a}~\b") == (
        r"50 \% \& \$x\_1\textasciicircum{}2\$ \#\{a\}\textasciitilde{}\textbackslash{}b"
    )
    assert escape("70 ± 1, -0.5, t-test, r-2") == r"70 $\pm$ 1, $-$0.5, t-test, r-2"


def test_latex_table_is_one_environment_with_booktabs():
    text = latex(table(), "ranks-1")
    lines = [line.strip() for line in text.splitlines()]
    assert (lines[0], lines[-1]) == (r"\begin{table}[tp]", r"\end{table}")
    assert r"\caption{Rank \& data\_1}" in lines
    assert r"\label{tab:ranks-1}" in lines
    assert r"\begin{tabular}{lrrr}" in lines
    assert r"& \multicolumn{2}{c}{STS-B} & CoLA \\ \cmidrule(lr){2-3}" in lines
    assert r"& r = 2 & r = 8 & r = 2 \\" in lines
    assert r"LoRA & \textbf{70.1 $\pm$ 0.2} & 71.0 & $-$1.5 \\" in lines
    assert r"A$|$B\_c \& $<$b$>$ 10 \% & --\textsuperscript{a} & {[}$-$0.1, +0.3{]} & **2** \\" in lines
    assert "\\resizebox" not in text


def test_long_latex_table_is_continued_and_keeps_every_row():
    rows = [[f"row{i}", "1 [a]", "2", "3"] for i in range(100)]
    text = latex(table(rows=rows), "long")
    assert text.count(r"\begin{table}") == text.count(r"\end{table}") == 3
    assert re.findall(r"row\d+", text) == [f"row{i}" for i in range(100)]
    assert re.findall(r"\\label\{(.*?)\}", text) == ["tab:long", "tab:long-2", "tab:long-3"]
    assert "(3 of 3)" in text
    assert text.count("failed") == 3  # what a mark means stands below each part


def test_wide_latex_table_is_made_to_fit_the_line():
    assert r"\resizebox{\linewidth}{!}{%" in latex(table(rows=[["a" * 40, "b" * 40, "c" * 40, ""]]), "wide")


def test_marks_do_not_run_out():
    found = [mark for mark, _ in zip(marks(), range(28), strict=False)]
    assert found[:2] + found[25:] == ["a", "b", "z", "aa", "ab"]


def test_sortable_table_gives_numbers_to_sort_by_and_values_to_choose():
    rows = [["LoRA", ("10 %", 0.1), (NONE, float("nan"))], ["<b>", ("5 %", 0.05), ("1.5", 1.5)]]
    text = SortableTable(columns=["method", "data", "p"], rows=rows, filters=["method", "data"]).html("s")
    assert f'<td data-number="0.1">10 %</td><td data-number="">{NONE}</td>' in text
    assert "<option>LoRA</option><option>&lt;b&gt;</option>" in text
    assert "<option>5 %</option><option>10 %</option>" in text
    assert "2 of 2 rows" in text
    assert '<form class="controls" hidden>' in text  # without a script there is nothing to press


def test_filter_that_is_no_column_is_refused():
    with pytest.raises(ValueError, match="the filter 'rank' is no column; use some of method, p"):
        SortableTable(columns=["method", "p"], rows=[], filters=["rank"])


@pytest.mark.parametrize("name", NAMES)
def test_every_table_of_the_paper_says_that_it_is_not_ours(name: str):
    found = paper_table(name)
    assert found.title.startswith("As printed in the paper, not reproduced")
    number = name.removeprefix("table")
    assert (
        f"As printed in arXiv 2603.14228, Table {number}: other models, data and hardware; not reproduced" in found.note
    )


def test_tables_of_the_paper_disagree_and_say_so():
    cell = {row[0]: row for row in paper_table("table1").rows}["StructLoRA"][1]
    other = {row[0]: row for row in paper_table("table3").rows}["BoolQ, StructLoRA"][3]
    assert (cell, other) == ("82.1", "81.3")
    assert all("disagree" in paper_table(name).note for name in ("table1", "table3", "table4", "table5"))


def test_table_that_is_not_in_the_paper_is_refused():
    with pytest.raises(ValueError, match="paper='table9' is no table of the paper; use table1, table2"):
        paper_table("table9")
