"""The words and numbers in the cells of a comparison's tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np
import pandas as pd

from structlora_pyg.study.report.page import Section
from structlora_pyg.study.stats import Paired, mean_sd

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
    props = np.full(frame.shape, "", dtype=object)
    for i, j in bold:
        props[i, j] = "font-weight:bold"
    return Section(
        title=title,
        table=frame.style.apply(lambda _: props, axis=None),
        caption=" ".join(filter(None, sentences)),
        notes=notes.lines() if notes is not None else (),
    )


def count_of(count: int, what: str) -> str:
    """Return a number of things in words a reader would use."""
    return f"{count} {what}{'s' * (count != 1)}"
