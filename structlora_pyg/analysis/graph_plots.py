"""The former place of `structlora_pyg.analysis.graph_plot`."""

from structlora_pyg.analysis.graph_plot import draw_graph

__all__ = ["draw_graph"]
