"""The page of ``structlora look`` in a browser: the slider moves the graph, and everything fits a phone."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from helpers.html import contrast

DRAWING = """() => [...document.querySelectorAll("svg.graph path, svg.graph circle.gate")].map(
    e => ["visibility", "stroke-width", "fill-opacity"].map(name => e.getAttribute(name)).join())"""


@pytest.fixture(scope="module")
def url(looked: Path) -> str:
    return (looked / "look.html").as_uri()


def test_the_slider_shows_the_graph_at_each_step(opened):
    page = opened()
    slider, said = page.get_by_role("slider", name="step"), page.locator("form.steps output")
    drawings, texts = [page.evaluate(DRAWING)], [said.inner_text()]
    slider.focus()
    for _ in range(3):  # by keyboard
        page.keyboard.press("ArrowLeft")
        drawings.append(page.evaluate(DRAWING))
        texts.append(said.inner_text())
    assert [text.partition(":")[0] for text in texts] == ["step 8", "step 6", "step 4", "step 2"]
    assert slider.get_attribute("aria-valuetext") == "step 2"
    assert all(before != after for before, after in pairwise(drawings))
    for drawing, text in zip(drawings, texts, strict=True):
        assert f"{sum(d.startswith('visible') for d in drawing)} edges" in text
    page.keyboard.press("End")
    assert page.evaluate(DRAWING) == drawings[0]  # what is drawn without a script, too


@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_overflows(opened, width: int):
    page = opened(viewport={"width": width, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    sticking_out = page.evaluate(
        """width => [...document.querySelectorAll("main *")].filter(e => !e.closest("details") && e.checkVisibility()
            && e.getBoundingClientRect().right > width + 1).map(e => e.tagName)""",
        width,
    )
    assert sticking_out == []
    assert page.locator("form.steps input").bounding_box()["height"] >= 30


def test_the_graph_stands_without_a_script_on_paper_and_in_the_dark(opened):
    plain, page = opened(java_script_enabled=False), opened(color_scheme="dark")
    assert not plain.locator("form.steps").is_visible()
    assert plain.locator("svg.graph").is_visible()
    for selector in ("h1", ".lead", "figcaption", "form.steps output", ".legend li"):
        assert contrast(page, selector) >= 4.5, selector
    page.emulate_media(media="print")
    assert not page.locator("form.steps").is_visible()
    assert page.locator("svg.graph").is_visible()
