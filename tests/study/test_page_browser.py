"""The page of a comparison in a browser: it sorts, filters, fits a phone, prints, and asks the network for nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.comparison_folder import write_folder
from helpers.html import contrast

from structlora_pyg.study.report.comparison_report import write_comparison
from structlora_pyg.study.report.tables import NONE

pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e '.[dev]'")
ROWS = 48


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = write_folder(tmp_path_factory.mktemp("comparison"))
    return write_comparison([folder], tmp_path_factory.mktemp("report"))["report.html"].as_uri()


def column(page, heading: str) -> list[str]:
    """Return the visible cells of a column of the long table."""
    return page.evaluate(
        """heading => {
            const section = document.querySelector(".sortable");
            const k = [...section.querySelectorAll("thead th")].findIndex(th => th.innerText.trim() === heading);
            return [...section.querySelectorAll("tbody tr")].filter(row => row.checkVisibility())
                .map(row => row.cells[k].innerText);
        }""",
        heading,
    )


def press(page, heading: str) -> None:
    page.locator(".sortable thead").get_by_role("button", name=heading, exact=True).click()


def chooser(page, label: str):
    return page.get_by_role("combobox", name=label, exact=True)


def order(page, heading: str) -> str | None:
    return page.locator(".sortable thead th").filter(has_text=heading).first.get_attribute("aria-sort")


def test_headings_sort_numbers_as_numbers_and_turn_around(opened):
    page = opened()
    assert order(page, "adapter parameters") == "none"
    press(page, "adapter parameters")
    assert order(page, "adapter parameters") == "ascending"
    cells = column(page, "adapter parameters")
    known = [int(cell.replace(",", "")) for cell in cells if cell != NONE]
    assert len(cells) == ROWS
    assert known == sorted(known)
    assert known[0] < known[-1]
    press(page, "adapter parameters")
    assert order(page, "adapter parameters") == "descending"
    known = [int(cell.replace(",", "")) for cell in column(page, "adapter parameters") if cell != NONE]
    assert known == sorted(known, reverse=True)


def test_empty_cells_come_last_in_both_directions(opened):
    page = opened()
    for _ in range(2):
        press(page, "difference")
        cells = column(page, "difference")
        known = [cell for cell in cells if cell != NONE]
        assert 0 < len(known) < len(cells)
        assert cells == known + [NONE] * (len(cells) - len(known))


def test_small_p_values_and_negative_differences_are_in_place(opened):
    page = opened()
    press(page, "p, Holm")
    assert column(page, "p, Holm")[0] == "< 0.001"
    press(page, "difference")
    values = [float(cell) for cell in column(page, "difference") if cell != NONE]
    assert values == sorted(values)
    assert values[0] < 0 < values[-1]
    assert order(page, "p, Holm") == "none"  # only one heading sorts


def test_texts_are_sorted_as_texts(opened):
    page = opened()
    press(page, "method")
    cells = column(page, "method")
    assert cells == sorted(cells, key=str.lower)


def test_headings_work_with_the_keyboard(opened):
    page = opened()
    button = page.locator(".sortable thead").get_by_role("button", name="mean", exact=True)
    button.focus()
    page.keyboard.press("Enter")
    assert order(page, "mean") == "ascending"
    page.keyboard.press("Space")
    assert order(page, "mean") == "descending"


def test_filters_combine_and_reset_brings_everything_back(opened):
    page = opened()
    before = column(page, "mean")
    count = page.locator(".controls output")
    assert count.inner_text() == f"{ROWS} of {ROWS} rows"
    chooser(page, "method").select_option("StructLoRA")
    assert count.inner_text() == f"12 of {ROWS} rows"
    assert set(column(page, "method")) == {"StructLoRA"}
    chooser(page, "task").select_option("CoLA")
    chooser(page, "rank").select_option("8")
    chooser(page, "data").select_option("10 %")
    assert count.inner_text() == f"1 of {ROWS} rows"
    assert column(page, "data") == ["10 %"]
    press(page, "mean")
    assert len(column(page, "mean")) == 1  # sorting does not bring rows back
    page.get_by_role("button", name="reset").click()
    assert column(page, "mean") == before
    assert count.inner_text() == f"{ROWS} of {ROWS} rows"
    assert order(page, "mean") == "none"
    assert chooser(page, "method").input_value() == ""


def test_every_choice_of_a_filter_leaves_rows(opened):
    page = opened()
    for label in ("method", "task", "rank", "data"):
        total = 0
        for option in chooser(page, label).locator("option").all_inner_texts()[1:]:
            chooser(page, label).select_option(option)
            total += len(column(page, label))
            assert set(column(page, label)) == {option}
        assert total == ROWS
        chooser(page, label).select_option("")


def test_without_a_script_the_table_is_all_there(opened):
    page = opened(java_script_enabled=False)
    assert page.locator(".sortable tbody tr").count() == ROWS
    assert page.locator(".sortable tbody tr").last.is_visible()
    assert not page.locator(".controls").is_visible()
    assert page.locator(".sortable thead button").count() == 0


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_page_does_not_scroll_sideways(opened, width: int):
    page = opened(viewport={"width": width, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    sticking_out = page.evaluate(
        """width => [...document.querySelectorAll("main *")].filter(e => !e.closest(".scroll") && e.checkVisibility()
            && e.getBoundingClientRect().right > width + 1).map(e => e.tagName)""",
        width,
    )
    assert sticking_out == []


def test_phone_shows_the_narrow_figures_and_controls_that_a_finger_meets(opened):
    page = opened(viewport={"width": 390, "height": 844})
    assert page.locator(".narrow").first.is_visible()
    assert not page.locator(".wide").first.is_visible()
    heights = page.locator(".controls select, .controls button").evaluate_all("all => all.map(e => e.offsetHeight)")
    assert min(heights) >= 30


def test_wide_tables_scroll_in_their_box_and_keep_the_first_column(opened):
    page = opened(viewport={"width": 390, "height": 844})
    box = page.locator(".sortable .scroll")
    assert box.evaluate("e => e.scrollWidth > e.clientWidth")
    box.evaluate("e => { e.scrollLeft = 300; }")
    first = page.locator(".sortable tbody th").first
    assert first.bounding_box()["x"] == pytest.approx(box.bounding_box()["x"], abs=1)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_both_themes(opened, scheme: str):
    page = opened(color_scheme=scheme)
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(18, 23, 28)"
    assert dark == (scheme == "dark")
    for selector in ("h1", "td", "thead th", ".note", "nav a", ".lead", "select", ".footnotes", "svg text"):
        assert contrast(page, selector) >= 4.5, selector


def test_contents_lead_where_they_say(opened):
    page = opened()
    page.get_by_role("navigation").get_by_role("link", name="All results").click()
    heading = page.get_by_role("heading", name="All results")
    assert 0 <= heading.bounding_box()["y"] < 200


def test_page_prints_all_rows_without_controls(opened, tmp_path: Path):
    page = opened()
    page.emulate_media(media="print")
    assert not page.locator(".controls").is_visible()
    assert not page.locator("nav").is_visible()
    page.pdf(path=tmp_path / "report.pdf", format="A4")
    printed = (tmp_path / "report.pdf").read_bytes()
    assert printed.startswith(b"%PDF")
    assert len(printed) > 50_000
    page.set_viewport_size({"width": 720, "height": 1000})  # about the width of a page
    cut = page.evaluate("[...document.querySelectorAll('table')].filter(t => t.offsetWidth > 730).length")
    assert cut == 0
