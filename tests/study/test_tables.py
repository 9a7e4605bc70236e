"""A table says the same in every format, and nothing in its cells is taken for markup."""

import pandas as pd

from structlora_pyg.study.report.page import Notes, Section, latex_table, latex_text, text_table
from structlora_pyg.study.report.tables import NONE

COLUMNS = pd.MultiIndex.from_arrays([["", "STS-B", "STS-B", "CoLA"], ["", "r = 2", "r = 8", "r = 2"]])
ROWS = [["LoRA", "70.1 ± 0.2", "71.0", "-1.5"], ["A|B_c & <b> 10 %", f"{NONE}ᵃ", "[-0.1, +0.3]", "**2**"]]


def table(rows=ROWS) -> Section:
    notes = Notes()
    notes.mark(["50 % of #1 failed"])
    frame = pd.DataFrame(rows, columns=COLUMNS)
    return text_table("Rank & data_1", frame, "p < 0.05", bold={(0, 1)}, notes=notes)


def test_latex_escapes_every_special_sign():
    assert latex_text(r"50 % & $x_1^2$ #{a}~\b") == (
        r"50 \% \& \$x\_1\textasciicircum{}2\$ \#\{a\}\textasciitilde{}\textbackslash{}b"
    )
    assert latex_text("70 ± 1, -0.5, t-test, r-2") == r"70 $\pm$ 1, $-$0.5, t-test, r-2"


def test_latex_table_is_a_longtable_with_booktabs():
    text = latex_table(table(), "ranks-1")
    lines = [line.strip() for line in text.splitlines()]
    assert text.count(r"\begin{longtable}{lrrr}") == text.count(r"\end{longtable}") == 1
    assert r"\caption{Rank \& data\_1} \label{tab:ranks-1} \\" in lines
    assert text.count("{") - text.count(r"\{") == text.count("}") - text.count(r"\}")
    assert r"& \multicolumn{2}{c}{STS-B} & CoLA \\" in lines
    assert r"& r = 2 & r = 8 & r = 2 \\" in lines
    assert r"LoRA & \bfseries 70.1 $\pm$ 0.2 & 71.0 & $-$1.5 \\" in lines
    assert r"A$|$B\_c \& $<$b$>$ 10 \% & --\textsuperscript{a} & {[}$-$0.1, +0.3{]} & **2** \\" in lines
    assert r"\textsuperscript{a} 50 \% of \#1 failed\par p $<$ 0.05" in text


def test_equal_footnotes_share_a_mark_and_marks_do_not_run_out():
    notes = Notes()
    assert [notes.mark(list(said)) for said in ("xyx", "", "z", "xy")] == ["ᵃ", "", "ᵇ", "ᵃ"]
    marks = {notes.mark([str(i)]) for i in range(60)}
    assert len(marks) == 60
    assert notes.lines()[0] == "ᵃ x; y"
