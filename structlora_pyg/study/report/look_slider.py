"""The adapter graph of every recorded step as one inline drawing with a slider."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.path import Path
from torch_geometric.data import Data

from structlora_pyg.analysis.graph_layout import GraphLayout, places, union_of_edges
from structlora_pyg.analysis.graph_plots import (
    EMPTY,
    OPACITY,
    PALE,
    WIDTH,
    along,
    gate_means,
    node_numbers,
    role_color,
    role_titles,
)
from structlora_pyg.analysis.look import message_share, name_of, spread
from structlora_pyg.study.report.page import page_file
from structlora_pyg.study.report.tables import heading

MOST_STEPS = 100  # more are thinned: a finger cannot tell them apart


@dataclass(frozen=True, kw_only=True)
class GraphSlider:
    """A part of a page (see `structlora_pyg.study.report.page`) that shows the graph at the step a slider points at.

    Without a script, and on paper, the last step is shown.

    Args:
        title: Heading above it.
        graphs: Graphs of the same nodes with ``step``, in the order of the steps.
        names: N names of the nodes.
        caption: Text below it.
    """

    title: str
    graphs: Sequence[Data]
    names: Sequence[str] | None = None
    caption: str = ""

    def html(self, anchor: str) -> str:
        """Return a section with slider, drawing, legend and script."""
        graphs = [self.graphs[k] for k in spread(len(self.graphs), MOST_STEPS)]
        edges, weights = union_of_edges(graphs)
        depth, role = places(graphs[0])
        layout = GraphLayout(depth, role, edges, length=4.6, downwards=True)
        gates = np.stack([gate_means(graph) for graph in graphs])
        steps, last = [int(graph.step) for graph in graphs], len(graphs) - 1
        said = [
            f"step {step}: {int((row > 0).sum())} edges, mean gate {float(gate[role >= 0].mean()):.2f}, "
            f"messages {100 * message_share(graph):.1f} % of the updates"
            for step, row, gate, graph in zip(steps, weights, gates, graphs, strict=True)
        ]
        data = {
            "steps": steps,
            "weights": np.round(weights, 3).tolist(),
            "gates": np.round(gates, 2).tolist(),
            "said": said,
            "look": {"width": WIDTH, "opacity": OPACITY, "pale": PALE, "thin": layout.thin},
        }
        titles = role_titles(None if self.names is None else list(self.names), role)
        legend = "".join(
            f'<li><span style="background:{role_color(r)}"></span>{html.escape(title)}</li>'
            for r, title in enumerate(titles)
        )
        return (
            f'<section id="{anchor}">{heading(self.title)}'
            f'<form class="controls steps" hidden><label for="{anchor}-step">step</label>'
            f'<input type="range" id="{anchor}-step" min="0" max="{last}" value="{last}" step="1">'
            f'<output for="{anchor}-step">{said[last]}</output></form>'
            f'<figure><ul class="legend">{legend}</ul>'
            f"{self._svg(layout, role, depth, edges, weights[last], gates[last])}"
            f"<figcaption>{html.escape(self.caption)}</figcaption></figure>"
            f'<script type="application/json">{json.dumps(data)}</script>'
            f"<script>{page_file('slider.js')}</script></section>"
        )

    def _svg(self, layout, role, depth, edges, weight, gate) -> str:  # type: ignore[no-untyped-def]
        left, bottom, right, top = layout.box
        width, height, radius = 72 * (right - left), 72 * (top - bottom), 36 * layout.size

        def point(x: float, y: float) -> str:
            return f"{72 * (x - left):.1f} {72 * (top - y):.1f}"

        lines = "".join(
            f'<path d="{_line(path, point)}" fill="none" stroke-linecap="round" data-alpha="{alpha:.3f}" '
            f'stroke="{role_color(role[i]) if same else "var(--muted)"}" '
            f'stroke-width="{along(WIDTH, w) * layout.thin:.2f}" stroke-opacity="{along(OPACITY, w) * alpha:.3f}" '
            f'visibility="{"visible" if w > 0 else "hidden"}"/>'
            for path, (i, _), same, alpha, w in zip(
                layout.paths, edges, layout.within, layout.alpha, weight, strict=True
            )
        )
        numbers = node_numbers(None if self.names is None else list(self.names), depth)
        nodes = ""
        for k, (x, y) in enumerate(layout.at):
            cx, cy = point(x, y).split()
            circle = f'<circle cx="{cx}" cy="{cy}" r="{radius:.1f}"'
            text = f'<text x="{cx}" y="{cy}" dy=".35em" text-anchor="middle">{html.escape(numbers[k])}</text>'
            nodes += (
                f"<g><title>{html.escape(name_of(self.names, k))}</title>"
                f'{circle} fill="{EMPTY}"/>{circle} class="gate" fill="{role_color(role[k])}" '
                f'fill-opacity="{along(PALE, gate[k]):.3f}" stroke="{role_color(role[k])}"/>'
                + (text if layout.size >= 0.2 else "")
                + "</g>"
            )
        return (
            f'<svg class="graph" role="img" aria-label="{html.escape(self._alt(role))}" viewBox="0 0 {width:.0f} '
            f'{height:.0f}" width="{width * 4 / 3:.0f}">{lines}{nodes}</svg>'
        )

    def _alt(self, role: np.ndarray) -> str:
        count = int((role >= 0).sum())
        return f"Graph of {count} adapters, depth downwards, {role.max(initial=0) + 1} roles side by side."


def _line(path: Path, point) -> str:  # type: ignore[no-untyped-def]
    """Return the ``d`` of an SVG path: a straight line or one cubic."""
    points = [point(x, y) for x, y in np.asarray(path.vertices)]
    return f"M{points[0]}L{points[1]}" if len(points) == 2 else f"M{points[0]}C{' '.join(points[1:])}"
