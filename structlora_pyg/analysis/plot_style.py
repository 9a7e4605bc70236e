"""The former place of what `structlora_pyg.analysis.plots` holds."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from structlora_pyg.analysis import plots
from structlora_pyg.analysis.plots import COLORS, GRID, INK, MUTED, PAGE, legend_above, style_axes

__all__ = ["COLORS", "GRID", "INK", "MUTED", "PAGE", "legend_above", "new_figure", "panel_grid", "style_axes"]


def new_figure(size: tuple[float, float]) -> Figure:
    """Return an empty figure."""
    return Figure(figsize=size, layout="constrained")


def panel_grid(titles: list[str], xlabel: str, stacked: bool = False) -> tuple[Figure, list[Axes]]:
    """Return a figure and its panels."""
    return plots.panel_grid(titles, xlabel)
