"""The words and numbers in the cells of a comparison's tables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from structlora_pyg.study.report.contrasts import Contrast, Score, Unit, seeds_text, task_name
from structlora_pyg.study.report.records import Grid, Setting
from structlora_pyg.study.report.tables import NONE, marks
from structlora_pyg.study.stats import compare, mean_sd


class Footnotes:
    """Footnotes of a table: equal texts share a mark."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def mark(self, texts: Iterable[str]) -> str:
        """Return the mark of a text, with a space before it; nothing without a text."""
        text = "; ".join(dict.fromkeys(texts))
        if not text:
            return ""
        if text not in self.texts:
            self.texts.append(text)
        found = dict(zip(self.texts, marks(), strict=False))
        return f" [{found[text]}]"


def percent(share: float) -> str:
    """Return a share of the data: ``10 %``."""
    return f"{100 * share:g} %"


def decimals(value: float, digits: int, sign: str = "") -> str:
    """Return a number, or a dash for NaN."""
    return f"{value:{sign}.{digits}f}" if math.isfinite(value) else NONE


def times(ratio: float) -> str:
    """Return a ratio as ``1.24 x``."""
    return f"{ratio:.2f} x" if math.isfinite(ratio) else NONE


def p_text(p: float) -> str:
    """Return a p-value with three digits, or a dash where there is none."""
    return NONE if math.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


def mean_text(values: Sequence[float], digits: int) -> str:
    """Return ``71.2 ± 0.4``, the mean alone for a single value, a dash for none."""
    if not values:
        return NONE
    mean, sd = mean_sd(values)
    return f"{mean:.{digits}f} ± {sd:.{digits}f}" if len(values) > 1 else f"{mean:.{digits}f}"


def score_text(score: Score, unit: Unit | None) -> str:
    """Return mean ± standard deviation of a cell, or why there is none."""
    if score.values:
        return mean_text(list(score.values.values()), unit.digits if unit else 2)
    return {"not run yet": "not run yet", "failed": NONE}.get(score.state, "")


def difference_text(method: Sequence[float], baseline: Sequence[float], digits: int) -> str:
    """Return mean difference and confidence interval of paired values; a dash for fewer than two pairs."""
    if len(method) < 2:
        return NONE
    c = compare(method, baseline)
    return f"{c.difference:+.{digits}f} [{c.low:+.{digits}f}, {c.high:+.{digits}f}]"


def contrast_texts(contrast: Contrast) -> list[str]:
    """Return seeds, difference with interval, three p-values and effect size of a comparison."""
    c = contrast.paired
    if c is None:
        return [str(contrast.n), *[NONE] * 5]
    return [
        str(c.n),
        f"{c.difference:+.2f} [{c.low:+.2f}, {c.high:+.2f}]",
        p_text(c.p_t),
        p_text(c.p_wilcoxon),
        p_text(contrast.p),
        decimals(contrast.effect, 2, "+"),
    ]


def heads(grid: Grid, setting: Setting, data: bool = True) -> list[str]:
    """Return the headings of a setting: of task, rank and data those that vary in the grid.

    Args:
        grid: The grid.
        setting: One of its settings, or of its means.
        data: Whether the share of the data is among them.
    """
    texts = {"task": task_name(setting.task), "rank": f"r = {setting.rank}", "data": percent(setting.fraction)}
    return [texts[name] for name in dimensions(grid, data)]


def dimensions(grid: Grid, data: bool = True) -> list[str]:
    """Return which of task, rank and data vary in a grid; the task if none does."""
    varying = [name for k, name in enumerate(("task", "rank", "data")) if len({s[k] for s in grid.settings}) > 1]
    return [name for name in varying or ["task"] if data or name != "data"]


def constants(grid: Grid) -> str:
    """Return a sentence of what `heads` leaves out as it is the same in every column."""
    first, varying = grid.settings[0], dimensions(grid)
    texts = {
        "task": task_name(first.task),
        "rank": f"rank {first.rank}",
        "data": "all training data" if first.fraction == 1 else f"{percent(first.fraction)} of the training data",
    }
    found = [text for name, text in texts.items() if name not in varying]
    return f"All columns: {', '.join(found)}." if found else ""


def seeds_planned(grid: Grid) -> str:
    """Return ``5 seeds (0, 1, 2, 3, 4)``."""
    count = len(grid.seeds)
    return f"{count} seed{'s' if count != 1 else ''} ({seeds_text(grid.seeds).partition(' ')[2]})"


def validation_note(grid: Grid) -> str:
    """Return the warning that scores served to choose settings, or nothing."""
    if not grid.validation:
        return ""
    return (
        "Every score was measured on a part cut from the training data, to choose settings: this is no result on the "
        "test data."
    )
