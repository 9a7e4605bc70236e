"""The page of a report in a browser: it fits a phone, prints, and follows the theme."""

import itertools
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers.html import contrast

from structlora_pyg.analysis.plots import similarity_heatmaps
from structlora_pyg.study.report.page import Section, save_report

pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e '.[dev]'")
pytestmark = pytest.mark.slow
NONE = "\u2013"
RUNS = pd.DataFrame(
    [
        [*cell, f"{(7 * k) % 11 - 5.5:+.2f}" if k % 5 else NONE, ["< 0.001", "0.04"][k % 2], 1024 * (k + 1)]
        for k, cell in enumerate(itertools.product(("LoRA", "StructLoRA", "DoRA"), ("RTE", "CoLA"), (2, 4, 8, 16)))
    ],
    columns=["method", "task", "rank", "difference", "p, Holm", "parameters, of all that are trained"],
)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    figure = similarity_heatmaps({"LoRA": np.eye(12)}, [f"l.{i}.q" for i in range(12)])
    drawn = Section(title="Gates", figure=figure, alt="gates", caption="All half open.")
    table = RUNS.assign(**{RUNS.columns[-1]: RUNS[RUNS.columns[-1]].map("{:,}".format)})
    text = {"title": "All runs", "notes": ["a note"], "caption": "Why."}
    runs = Section(**text, table=table)
    sections = [Section(title="Grid", text="Text.", sections=[drawn]), runs]
    folder = tmp_path_factory.mktemp("report")
    return save_report(folder, "report", "Title", sections, "Result.", {"runs": "24"})["report.html"].as_uri()


@pytest.mark.parametrize("width", [320, 1280])
def test_page_does_not_scroll_sideways_but_wide_things_in_it_do(opened, width: int):
    page = opened(viewport={"width": width, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    sticking_out = page.evaluate(
        """width => [...document.querySelectorAll("main *")].filter(e => !e.closest(".scroll") && e.checkVisibility()
            && e.getBoundingClientRect().right > width + 1).map(e => e.tagName)""",
        width,
    )
    assert sticking_out == []
    boxes = page.locator(".scroll").evaluate_all("all => all.map(e => e.scrollWidth - e.clientWidth)")
    assert width < 400 or max(boxes) <= 0  # nothing is cut off on a desk
    if width < 400:
        box, first = page.locator("#part-2 .scroll"), page.locator("#part-2 tbody th").first
        box.evaluate("e => { e.scrollLeft = 300; }")
        assert box.evaluate("e => e.scrollLeft") > 0
        assert first.bounding_box()["x"] == pytest.approx(box.bounding_box()["x"], abs=1)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_both_themes(opened, scheme: str):
    page = opened(color_scheme=scheme)
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(18, 23, 28)"
    assert dark == (scheme == "dark")
    for selector in ("h1", "h2", "td", "thead th", ".note", "nav a", ".lead", ".footnotes", "figcaption"):
        assert contrast(page, selector) >= 4.5, selector


def test_contents_lead_where_they_say(opened):
    page = opened()
    page.get_by_role("navigation").get_by_role("link", name="All runs").click()
    assert 0 <= page.get_by_role("heading", name="All runs").bounding_box()["y"] < 300


def test_page_prints_all_rows(opened, tmp_path: Path):
    page = opened()
    page.emulate_media(media="print")
    assert not page.locator("nav").first.is_visible()
    page.pdf(path=tmp_path / "report.pdf", format="A4")
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF")
    page.set_viewport_size({"width": 720, "height": 1000})  # about the width of a page
    assert page.evaluate("[...document.querySelectorAll('table')].every(t => t.offsetWidth <= 730)")
