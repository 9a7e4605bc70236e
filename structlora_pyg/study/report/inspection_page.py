"""``structlora inspect --html ...``: what `structlora_pyg.analysis.inspect` finds, as one page."""

from __future__ import annotations

from pathlib import Path

from structlora_pyg.analysis.graph_plots import draw_graph
from structlora_pyg.analysis.inspect import Inspection
from structlora_pyg.analysis.plots import similarity_heatmaps
from structlora_pyg.study.report.page import FigureSection, Part, Table, write_report


def write_inspection(path: str | Path, found: Inspection, title: str) -> Path:
    """Write a self-contained page with the table, the graph and the likeness of the layers.

    Args:
        path: The HTML file; missing folders are made.
        found: From `structlora_pyg.inspect_adapter`.
        title: Title of the page.

    Raises:
        OSError: If the file cannot be written.
    """
    s, names = found.structure, found.structure.names
    values = zip(found.adapters, found.norm, found.effective_rank, found.redundancy, strict=True)
    table = Table(
        title="Adapters",
        columns=["adapter", "r", "norm", "effective rank", "redundancy"],
        rows=[[a.name, str(a.r), f"{norm:.4g}", f"{rank:.2f}", f"{unused:.3f}"] for a, norm, rank, unused in values],
        note=(
            "Norm: Frobenius norm of the update. Effective rank: exponential of the entropy of the normalised singular "
            "values. Redundancy: the share of the rank that is not used."
        ),
    )
    alike = Table(
        title="Most alike",
        columns=["adapter", "adapter", "cosine"],
        rows=[[one, two, f"{cosine:+.4f}"] for one, two, cosine in found.most_alike()],
    )
    likeness = [similarity_heatmaps({"updates": s.similarity}, names, stacked) for stacked in (False, True)]
    parts: list[Part] = [
        FigureSection(
            title="The adapter graph",
            figure=draw_graph(found.graph),
            alt=f"Graph of {len(names)} adapters, one row a role.",
            caption="Neighbouring layers of a role are joined; the number in a node is its layer.",
        ),
        FigureSection(
            title="How alike the updates are",
            figure=likeness[0],
            narrow=likeness[1],
            alt=f"Heat map of {len(names)} by {len(names)} cosines.",
            caption="Cosines between the updates; 0 between updates of different shape.",
        ),
        table,
        alike,
    ]
    facts = {
        "adapters": str(len(names)),
        "roles": str(len(found.adapters.roles)),
        "blocks": str(len(found.adapters.blocks)),
        "drift energy": f"{s.drift_energy:.4g}",
    }
    lead = (
        f"{100 * float(found.redundancy.mean()):.0f} % of the rank is not used on average; neighbouring layers of a "
        f"role have a mean cosine of {s.adjacent_cosine:+.3f}."
    )
    return write_report(path, title, parts, lead, facts)
