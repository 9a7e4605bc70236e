"""The page is whole, stands alone, and can be read by everybody."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from helpers.html import Reader
from matplotlib.figure import Figure

from structlora_pyg.analysis.plot_style import GRID, INK, MUTED
from structlora_pyg.analysis.plots import gate_heatmap, training_curves
from structlora_pyg.files import replace_file
from structlora_pyg.study.report.page import Details, FigureSection, Group, Table, Text, figure_file, svg, write_report


def figure() -> Figure:
    return gate_heatmap(np.full((4, 3), 0.5), [f"l.{i}.q" for i in range(4)])


def curves(stacked: bool = False) -> Figure:
    y = np.ones((2, 3))
    return training_curves({"a": {"LoRA": ([0, 1, 2], y)}, "b": {"LoRA": ([0, 1, 2], y)}}, stacked=stacked)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    parts = [
        Table(columns=["", "LoRA <b>", "p"], rows=[["x & y", "1", "2"]], title="Result", note="a < b"),
        FigureSection(title="Gates", figure=figure(), alt='gates, "all" half open', caption="caption"),
        FigureSection(title="Gates again", figure=figure(), alt="the same"),
        FigureSection(title="Curves", figure=curves(), narrow=curves(stacked=True), alt="two curves"),
        Text(title="Words", paragraphs=["one", "two"]),
        Details(title="Settings", text='{"a": "<script>"}'),
    ]
    folder = tmp_path_factory.mktemp("report") / "new" / "folder"
    return write_report(folder / "report.html", "Title <1>", parts, lead="no difference shown", facts={"seeds": "5"})


@pytest.fixture(scope="module")
def page(path: Path) -> Reader:
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    reader.close()
    return reader


def test_every_element_is_closed(page: Reader):
    assert page.open == []


def test_page_needs_nothing_from_outside(path: Path, page: Reader):
    text = path.read_text(encoding="utf-8")
    for tag in ("script", "link", "iframe", "object"):
        assert not page.all(tag)
    assert not re.search(r"@import|url\((?!#)", text)
    for _, attributes in page.elements:
        for name in ("src", "href", "xlink:href"):
            assert attributes.get(name, "#").startswith(("#", "data:")), attributes


def test_ids_are_unique_and_references_meet_them(path: Path, page: Reader):
    ids = Counter(attributes["id"] for _, attributes in page.elements if "id" in attributes)
    assert [name for name, count in ids.items() if count > 1] == []
    text = path.read_text(encoding="utf-8")
    used = set(re.findall(r"url\(#([^)]+)\)", text)) | set(re.findall(r'href="#([^"]+)"', text))
    assert used
    assert used <= set(ids)


def test_text_is_escaped(page: Reader):
    text = "".join(page.text)
    for expected in ("Title <1>", "LoRA <b>", "x & y", "a < b", '{"a": "<script>"}'):
        assert expected in text
    assert not page.all("b")


def test_every_figure_says_what_it_shows(page: Reader):
    drawings = page.all("svg")
    assert len(drawings) == 4
    assert [d["role"] for d in drawings] == ["img"] * 4
    assert [d["aria-label"] for d in drawings] == ['gates, "all" half open', "the same", "two curves", "two curves"]


def test_wide_things_scroll_and_are_reached_by_keyboard(page: Reader):
    boxes = [d for d in page.all("div") if d.get("class") == "scroll"]
    assert [b["aria-label"] for b in boxes] == ["Result", "Gates", "Gates again"]
    assert all(b["tabindex"] == "0" and b["role"] == "region" for b in boxes)


def test_table_names_its_rows_and_columns(page: Reader):
    assert [t["scope"] for t in page.all("th")] == ["col", "col", "col", "row"]


def test_page_serves_phones_themes_and_printers(path: Path, page: Reader):
    text = path.read_text(encoding="utf-8")
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all("meta")
    for rule in ("prefers-color-scheme:dark", "@media print", "overflow-x:auto", "max-width:40rem"):
        assert rule in text
    assert page.all("html") == [{"lang": "en"}]


def test_svg_is_well_formed_keeps_its_letters_and_follows_the_theme():
    text = svg(figure(), "one", "alt & more")
    root = ElementTree.fromstring(text)
    assert root.attrib["aria-label"] == "alt & more"
    letters = [e.text for e in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "direction" in letters
    for color in (INK, MUTED, GRID):
        assert color not in text
    assert "var(--ink)" in text


def test_svg_of_a_figure_is_the_same_every_time():
    assert svg(figure(), "one", "alt") == svg(figure(), "one", "alt")


def test_table_for_the_terminal_is_aligned():
    table = Table(columns=["", "LoRA", "p"], rows=[["accuracy", "80.1", ""], ["n", "5", "0.2"]])
    assert table.text().splitlines() == [
        "          LoRA    p",
        "--------  ----  ---",
        "accuracy  80.1",
        "n            5  0.2",
    ]


def test_rows_of_another_length_are_refused():
    with pytest.raises(ValueError, match="has 1 cells for 2 columns"):
        Table(columns=["", "LoRA"], rows=[["accuracy"]])


def test_a_part_that_fails_leaves_the_old_page_alone(tmp_path: Path):
    class Broken:
        def html(self, anchor: str) -> str:
            raise RuntimeError("no figure")

    path = write_report(tmp_path / "report.html", "Old", [])
    before = path.read_bytes()
    with pytest.raises(RuntimeError, match="no figure"):
        write_report(path, "New", [Broken()])
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_parts_of_other_makers_fit_in(tmp_path: Path):
    class Mine:
        def html(self, anchor: str) -> str:
            return f'<section id="{anchor}">mine</section>'

    assert '<section id="part-1">mine</section>' in write_report(tmp_path / "r.html", "T", [Mine()]).read_text()


def test_groups_lower_the_headings_of_their_parts_and_keep_ids_apart(tmp_path: Path):
    words = Text(title="Words <h2>", paragraphs=["one"])
    inner = Group(title="Inner", parts=[words, words])
    path = write_report(tmp_path / "r.html", "T", [Group(title="Outer", parts=[inner], paragraphs=["first"]), words])
    text = path.read_text()
    assert re.findall(r"<(h\d)>(.*?)</h\d>", text) == [
        ("h1", "T"),
        ("h2", "Outer"),
        ("h3", "Inner"),
        *[("h4", "Words &lt;h2&gt;")] * 2,
        ("h2", "Words &lt;h2&gt;"),
    ]
    assert re.findall(r'id="(.*?)"', text) == ["part-1", "part-1-1", "part-1-1-1", "part-1-1-2", "part-2"]


def test_contents_name_the_sections_and_those_in_groups(tmp_path: Path):
    words = Text(title="Words", paragraphs=["one"])
    group = Group(title="Group", parts=[words, Details(title="not listed", text="")])
    text = write_report(tmp_path / "r.html", "T", [words, group, words], contents=True).read_text()
    assert (
        '<nav aria-label="Contents"><ul><li><a href="#part-1">Words</a></li>'
        '<li><a href="#part-2">Group</a><ul><li><a href="#part-2-1">Words</a></li></ul></li>'
        '<li><a href="#part-3">Words</a></li></ul></nav>'
    ) in text
    assert "<nav" not in write_report(tmp_path / "r.html", "T", [words]).read_text()


def test_figure_files_are_the_same_every_time_and_on_white():
    assert figure_file(figure(), "svg") == figure_file(figure(), "svg")
    assert b"fill: #ffffff" in figure_file(figure(), "svg")
    assert figure_file(figure(), "png") == figure_file(figure(), "png")


def test_replaced_files_are_whole_readable_by_others_and_leave_nothing_behind(tmp_path: Path):
    replace_file(tmp_path / "a" / "x.bin", b"one")
    path = replace_file(tmp_path / "a" / "x.bin", b"two")
    assert path.read_bytes() == b"two"
    plain = tmp_path / "a" / "plain"
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode
    assert sorted(p.name for p in path.parent.iterdir()) == ["plain", "x.bin"]


def test_a_file_that_cannot_be_written_leaves_no_rest(tmp_path: Path):
    target = tmp_path / "folder"
    (target / "inside").mkdir(parents=True)
    with pytest.raises(OSError, match="folder"):
        replace_file(target, "a folder is in the way")
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]
