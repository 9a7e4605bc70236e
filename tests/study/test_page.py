"""A report is whole, stands alone, and can be read by everybody; the terminal says the same."""

import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers.html import Reader
from matplotlib.figure import Figure

from structlora_pyg.analysis.plots import GRID, INK, MUTED, similarity_heatmaps
from structlora_pyg.checks import replace_file
from structlora_pyg.study.report.page import Section, render_page, save_report, svg, table_text

SCORES = pd.DataFrame(
    [["LoRA <b>", "71.2", "60.5"], ["StructLoRA", "72.1", "61.2"]],
    columns=pd.MultiIndex.from_tuples([("", "method"), ("RTE", "r = 4"), ("RTE", "r = 8")]),
)


def figure() -> Figure:
    return similarity_heatmaps({"LoRA": np.eye(4)}, [f"l.{i}.q" for i in range(4)])


def sections() -> list[Section]:
    runs = pd.DataFrame({"rank": [16, 4], "p": ["< 0.001", "\u2013"]})
    return [
        Section(
            title="Grid",
            text="one\n\ntwo & more",
            sections=[
                Section(title="Scores", table=SCORES, bold={(1, 1), (1, 2)}, notes=["ᵃ one failed"], caption="a < b"),
                Section(title="Gates", figure=figure(), alt='gates, "all" half open', caption="caption", name="gates"),
                Section(title="Gates again", figure=figure(), alt="the same"),
            ],
        ),
        Section(title="All runs", table=runs),
        Section(title="Settings", code='{"a": "<script>"}', fold=True),
    ]


@pytest.fixture(scope="module")
def text() -> str:
    return render_page("Title <1>", sections(), "no difference shown", {"seeds": "5"})


@pytest.fixture(scope="module")
def page(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    reader.close()
    return reader


def test_every_element_is_closed_and_nothing_comes_from_outside(text: str, page: Reader):
    assert page.open == []
    for tag in ("link", "iframe", "object"):
        assert not page.all(tag)
    assert not re.search(r"@import|url\((?!#)", text)
    for _, attributes in page.elements:
        for name in ("src", "href", "xlink:href"):
            assert attributes.get(name, "#").startswith(("#", "data:")), attributes


def test_ids_are_unique_and_references_meet_them(text: str, page: Reader):
    ids = Counter(attributes["id"] for _, attributes in page.elements if "id" in attributes)
    assert [name for name, count in ids.items() if count > 1] == []
    used = set(re.findall(r"url\(#([^)]+)\)", text)) | set(re.findall(r'href="#([^"]+)"', text))
    assert used
    assert used <= set(ids)


def test_text_is_escaped(page: Reader):
    text = "".join(page.text)
    for expected in ("Title <1>", "LoRA <b>", "two & more", "a < b", '{"a": "<script>"}', "< 0.001"):
        assert expected in text
    assert not page.all("b")


def test_headings_follow_the_nesting_and_contents_list_them(text: str):
    assert re.findall(r"<(h\d)>(.*?)</h\d>", text) == [
        ("h1", "Title &lt;1&gt;"), ("h2", "Grid"), ("h3", "Scores"), ("h3", "Gates"), ("h3", "Gates again"),
        ("h2", "All runs"),
    ]  # fmt: skip
    (nav,) = re.findall(r"<nav.*?</nav>", text)
    assert re.findall(r'<a href="#(.*?)">(.*?)</a>', nav) == [
        ("part-1", "Grid"), ("part-1-1", "Scores"), ("part-1-2", "Gates"), ("part-1-3", "Gates again"),
        ("part-2", "All runs"), ("part-3", "Settings"),
    ]  # fmt: skip
    plain = render_page("T", [Section(title="Words")])
    assert "<nav" not in plain


def test_wide_things_scroll_and_figures_say_what_they_show(page: Reader):
    boxes = [d for d in page.all("div") if d.get("class") == "scroll"]
    assert [b["aria-label"] for b in boxes] == ["Scores", "Gates", "Gates again", "All runs"]
    assert all(b["tabindex"] == "0" and b["role"] == "region" for b in boxes)
    assert [(d["role"], d["aria-label"]) for d in page.all("svg")] == [
        ("img", 'gates, "all" half open'), ("img", "the same"),
    ]  # fmt: skip


def test_table_names_its_rows_and_columns_once(text: str):
    (table,) = re.findall(r"<table>(?:(?!</table>).)*LoRA.*?</table>", text, re.DOTALL)
    heads = re.findall(r'<th scope="(\w+)"([^>]*)>(.*?)</th>', table)
    assert heads == [
        ("col", "", ""), ("colgroup", ' colspan="2"', "RTE"), ("col", "", "method"),
        ("col", "", "r = 4"), ("col", "", "r = 8"), ("row", "", "LoRA &lt;b&gt;"), ("row", "", "StructLoRA"),
    ]  # fmt: skip
    assert re.findall(r'<td style="font-weight:bold;">(.*?)</td>', table) == ["72.1", "61.2"]


def test_table_for_the_terminal_is_aligned_and_joins_its_headings():
    assert table_text(Section(table=SCORES)).splitlines() == [
        "| method     | RTE r = 4 | RTE r = 8 |",
        "| ---------- | --------: | --------: |",
        "| LoRA <b>   |      71.2 |      60.5 |",
        "| StructLoRA |      72.1 |      61.2 |",
    ]


def test_svg_is_well_formed_keeps_its_letters_and_follows_the_theme():
    text = svg(Section(figure=figure(), alt="alt & more"), "one")
    root = ElementTree.fromstring(text)
    assert root.attrib["aria-label"] == "alt & more"
    assert "LoRA" in [e.text for e in root.iter("{http://www.w3.org/2000/svg}text")]
    for color in (INK, MUTED, GRID):
        assert color not in text
    assert "var(--ink)" in text
    assert "fill: none" in text.partition("</g>")[0]  # the page's own colour lies behind it
    assert text == svg(Section(figure=figure(), alt="alt & more"), "one")


def test_report_writes_page_and_named_figures_the_same_every_time(tmp_path: Path):
    written = save_report(tmp_path / "new" / "a", "report", "T", sections())
    assert sorted(written) == ["figures/gates.svg", "report.html"]
    again = save_report(tmp_path / "b", "report", "T", sections())
    assert all(path.read_bytes() == again[name].read_bytes() for name, path in written.items())
    assert "fill: #ffffff" in written["figures/gates.svg"].read_text().partition("</g>")[0]


def test_a_section_that_fails_leaves_the_old_page_alone(tmp_path: Path):
    path = save_report(tmp_path, "report", "Old", [])["report.html"]
    before = path.read_bytes()
    with pytest.raises(AttributeError):
        save_report(tmp_path, "report", "New", [Section(figure="no figure")])
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    with pytest.raises(FileExistsError, match="is a file; give a folder"):
        save_report(path, "report", "New", [])


def test_replaced_files_are_whole_readable_by_others_and_leave_nothing_behind(tmp_path: Path):
    replace_file(tmp_path / "a" / "x.bin", b"one")
    path = replace_file(tmp_path / "a" / "x.bin", b"two")
    plain = tmp_path / "a" / "plain"
    plain.touch()
    assert path.read_bytes() == b"two"
    assert path.stat().st_mode == plain.stat().st_mode
    (tmp_path / "folder" / "inside").mkdir(parents=True)
    with pytest.raises(OSError, match="folder"):
        replace_file(tmp_path / "folder", "a folder is in the way")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a", "folder", "inside", "plain", "x.bin"]
