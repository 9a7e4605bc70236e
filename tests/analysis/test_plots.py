"""Figures show the numbers they are given, and nothing in them collides."""

import itertools

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from helpers.slow import slow_but
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from matplotlib.path import Path
from matplotlib.text import Text
from torch_geometric.data import Data

from structlora_pyg.analysis.graph_plot import draw_graph, draw_graphs, gate_means, undirected
from structlora_pyg.analysis.plots import attention_heatmaps, evenly, short_names, similarity_heatmaps, training_curves
from structlora_pyg.data.edges import build_edges

NAMES = [f"blocks.{i}.attn.qkv[{key}]" for key in "qv" for i in range(6)]
METHODS = ("LoRA", "StructLoRA")


def graph(depths: int, roles: str = "qv", kind: str = "hybrid", named: bool = True) -> Data:
    """Return a graph of `depths` times `roles` nodes, with gradient edges of different weights."""
    depth = torch.arange(depths).repeat(len(roles))
    role = torch.arange(len(roles)).repeat_interleave(depths)
    z = torch.randn(len(depth), 6, generator=torch.Generator().manual_seed(0)) + 0.5
    z = torch.nn.functional.normalize(z, dim=1)
    edge_index, edge_weight = build_edges(kind, depth, role, depth, z @ z.T)
    data = Data(edge_index=edge_index, edge_weight=edge_weight, depth=depth, role=role, num_nodes=len(depth))
    if named:
        data.name = [f"blocks.{int(d)}.attn.qkv[{roles[int(r)]}]" for d, r in zip(depth, role, strict=True)]
    return data


def row(weights: list[float] | None, pairs: list[tuple[int, int]]) -> Data:
    """Return a graph of three layers of one role."""
    data = Data(edge_index=torch.tensor(pairs).T, depth=torch.arange(3), role=torch.zeros(3).long())
    return data if weights is None else data.update({"edge_weight": torch.tensor(weights)})


def over_training(depths: int, roles: str = "qv", steps: int = 4) -> list[Data]:
    """Return graphs whose edges change, whose gates close one by one, and whose nodes have 3 directions, one only 2."""
    found = []
    for k in range(steps):
        data = graph(depths, roles, "hybrid" if k else "depth_chain")
        n = data.num_nodes
        gate, scaling = torch.ones(n, 3), torch.full((n, 3), 2.0)
        gate.view(-1)[: k * n // 2] = 0.0
        scaling[0, 2] = 0.0
        found.append(data.update({"gate": gate, "scaling": scaling, "step": torch.tensor([10 * (k + 1)])}))
    return found


def drawn_over_training(depths: int, roles: str = "qv", count: int = 4) -> Figure:
    graphs = over_training(depths, roles, count)
    return draw_graphs(graphs, [f"step {int(g.step)}" for g in graphs], graphs[0].name)


def attending() -> Figure:
    data = graph(6)
    alpha = torch.rand(data.num_edges, 2, generator=torch.Generator().manual_seed(0))
    return attention_heatmaps([(data.edge_index, alpha)] * 2, data, data.name)


def long_names() -> Data:
    data = graph(3, "qvko", "same_block")
    roles = ["encoder.block.{}.layer.0.SelfAttention.q", "decoder.block.{}.layer.1.EncDecAttention.o"]
    roles += ["decoder.block.{}.layer.2.DenseReluDense.wi", "encoder.block.{}.layer.1.DenseReluDense.wo"]
    data.name = [roles[int(r)].format(int(d)) for d, r in zip(data.depth, data.role, strict=True)]
    return data


def curves(panels: int) -> dict:
    x, noise = np.arange(0, 200, 20), np.random.default_rng(0)
    return {
        f"quantity {k}": {m: (x, 50 + 10 * noise.standard_normal((5, len(x)))) for m in METHODS} for k in range(panels)
    }


def cosines(n: int) -> dict:
    noise = np.random.default_rng(0)
    return {m: np.corrcoef(noise.standard_normal((n, 8))) for m in METHODS}


def edges_of(figure: Figure, panel: int = 0) -> PathCollection:
    return next(c for c in figure.axes[panel].collections if not len(c.get_sizes()))


def nodes_of(figure: Figure, panel: int = 0) -> PathCollection:
    return [c for c in figure.axes[panel].collections if len(c.get_sizes())][-1]  # the white below comes first


FIGURES = {
    "five curves": lambda: training_curves(curves(5), "epoch"),
    "similarity of 128 adapters": lambda: similarity_heatmaps(
        cosines(128), [f"model.layers.{i}.self_attn.{k}_proj" for k in "qkvo" for i in range(32)]
    ),
    "graph without names": lambda: draw_graph(graph(6, named=False)),
    "graph of 128": lambda: draw_graph(graph(32, "qkvo")),
    "graph of one": lambda: draw_graph(graph(1, "q", "none")),
    "graph with long names": lambda: draw_graph(long_names()),
    "graphs over training": lambda: drawn_over_training(6),
    "graphs over training of 7 roles": lambda: drawn_over_training(3, "qkvogud", 2),
    "attention": attending,
}
LARGE = ("similarity of 128 adapters", "gates over training of 128", "attention")


@pytest.mark.parametrize("name", slow_but(FIGURES.keys() - LARGE, FIGURES))
def test_no_text_overlaps_another_or_leaves_the_figure(name: str):
    figure = FIGURES[name]()
    assert plt.get_fignums() == []  # pyplot's global state is not used
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    box = figure.bbox.padded(1)
    texts = [t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip()]
    extents = [(t.get_text(), t.get_window_extent(renderer)) for t in texts]
    # A tick outside the limits of its axis is not drawn, though matplotlib keeps its label.
    drawn = [(text, e) for text, e in extents if e.width > 1 and not outside_its_axis(text, e, figure)]
    for text, extent in drawn:
        assert box.x0 <= extent.x0 <= extent.x1 <= box.x1, f"{text!r} is cut off"
        assert box.y0 <= extent.y0 <= extent.y1 <= box.y1, f"{text!r} is cut off"
    for (a, first), (b, second) in itertools.combinations(drawn, 2):
        assert not first.padded(-1).overlaps(second.padded(-1)), f"{a!r} overlaps {b!r}"


def outside_its_axis(text: str, extent, figure: Figure) -> bool:
    for ax in figure.axes:
        for axis, low, high, start, end in (
            (ax.xaxis, extent.x0, extent.x1, ax.bbox.x0, ax.bbox.x1),
            (ax.yaxis, extent.y0, extent.y1, ax.bbox.y0, ax.bbox.y1),
        ):
            shown = {t.label1.get_text() for t in axis.get_major_ticks()}
            if text in shown and not start - 2 <= (low + high) / 2 <= end + 2:
                return True
    return False


def test_curves_show_the_mean_and_one_standard_deviation_of_several_seeds():
    y = np.array([[1.0, 2.0], [3.0, 6.0]])
    ax = training_curves({"loss": {"LoRA": ([0, 10], y)}}).axes[0]
    assert ax.get_title(loc="left") == "loss"
    np.testing.assert_allclose(ax.lines[0].get_xydata(), [[0, 2], [10, 4]])
    band = ax.collections[0].get_paths()[0].vertices
    for point in ([0, 2 - 2**0.5], [0, 2 + 2**0.5], [10, 4 - 8**0.5], [10, 4 + 8**0.5]):
        assert np.isclose(band, point).all(1).any(), point
    assert not training_curves({"loss": {"LoRA": ([0, 10], y[0])}}).axes[0].collections


@pytest.mark.parametrize(("panels", "geometry"), [(1, (1, 1)), (3, (1, 3)), (4, (2, 2)), (5, (2, 3))])
def test_panels_are_wrapped(panels: int, geometry: tuple[int, int]):
    axes = training_curves(curves(panels)).axes
    assert axes[0].get_subplotspec().get_gridspec().get_geometry() == geometry
    assert sum(ax.get_visible() for ax in axes) == panels


def test_heatmaps_show_cosines_on_one_scale():
    figure = similarity_heatmaps({"LoRA": np.eye(12), "StructLoRA": np.full((12, 12), 0.2)}, NAMES)
    assert [ax.images[0].get_clim() for ax in figure.axes[:2]] == [(-1, 1), (-1, 1)]
    assert [ax.get_title(loc="left") for ax in figure.axes[:2]] == ["LoRA", "StructLoRA"]


@pytest.mark.parametrize(
    ("draw", "said"),
    [
        (lambda: draw_graph(Data(edge_index=torch.zeros(2, 0))), r"no depth, role; model\.adapter_graph\(\)"),
        (lambda: draw_graphs([graph(6), graph(5)], ["", ""]), "different nodes"),
    ],
)
def test_what_cannot_be_drawn_is_an_error(draw, said: str):
    with pytest.raises(ValueError, match=said):
        draw()


def test_graph_lies_by_depth_and_role_with_names_and_numbers():
    data = graph(6)
    figure = draw_graph(data)
    at = nodes_of(figure).get_offsets()
    assert np.corrcoef(at[:, 0], data.depth)[0, 1] == pytest.approx(1)
    assert np.corrcoef(at[:, 1], data.role)[0, 1] == pytest.approx(-1)
    assert len({tuple(color) for color in nodes_of(figure).get_facecolors().tolist()}) == 2
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["q", "v"]
    assert [t.get_text() for t in figure.axes[0].texts] == [str(i) for i in range(6)] * 2
    unnamed = draw_graph(graph(6, named=False, kind="none")).axes[0]
    assert [t.get_text() for t in unnamed.get_yticklabels()] == ["role 0", "role 1"]


def test_heavier_edges_are_wider_and_darker_and_without_weights_all_are_alike():
    pairs = [(0, 1), (1, 0), (1, 2), (2, 1)]
    edges = edges_of(draw_graph(row([0.3, 0.3, 0.9, 0.9], pairs)))
    light, heavy = edges.get_linewidths()
    assert light < heavy
    assert edges.get_edgecolors()[0, 3] < edges.get_edgecolors()[1, 3]
    assert len(set(edges_of(draw_graph(row(None, pairs))).get_linewidths())) == 1


def test_an_edge_bends_only_around_nodes_in_its_way():
    paths = edges_of(draw_graph(row(None, [(0, 1), (1, 2), (0, 2)]))).get_paths()
    bent = {tuple(np.round(p.vertices[[0, -1], 0], 6)): p.codes is not None and Path.CURVE3 in p.codes for p in paths}
    assert [bent[ends] for ends in sorted(bent)] == [False, True, False]


@pytest.mark.parametrize("kind", ["hybrid", "depth_chain", "same_block", "random"])
def test_no_edge_of_a_small_graph_runs_through_a_third_node(kind: str):
    figure = draw_graph(graph(6, kind=kind))
    nodes = nodes_of(figure)
    at, radius = np.asarray(nodes.get_offsets()), np.sqrt(nodes.get_sizes()[0]) / 72 / 2
    for path in edges_of(figure).get_paths():
        line = path.interpolated(30).vertices if path.codes is None else path.to_polygons(closed_only=False)[0]
        ends = path.vertices[[0, -1]]
        others = at[~(np.isclose(at[:, None], ends).all(-1).any(1))]
        nearest = np.linalg.norm(others[:, None] - line, axis=-1).min()
        assert nearest > radius, f"an edge from {ends[0]} to {ends[1]} touches another node"


def test_an_edge_is_counted_once_with_its_larger_weight():
    edges, weight = undirected(row([0.3, 0.5, 0.9, 1.5, 1.0], [(0, 1), (1, 0), (1, 2), (2, 1), (2, 2)]))
    assert edges.tolist() == [[0, 1], [1, 2]]
    assert weight.tolist() == pytest.approx([0.5, 1.0])


def test_an_edge_keeps_its_place_in_every_panel_and_a_node_is_the_paler_the_more_gates_are_closed():
    graphs = over_training(6)
    figure = draw_graphs(graphs, list("abcd"), NAMES)
    drawn = [edges_of(figure, k).get_paths() for k in range(4)]
    assert [len(paths) for paths in drawn] == [g.num_edges // 2 for g in graphs]
    ends = [{tuple(np.round(p.vertices[[0, -1]].ravel(), 6)) for p in paths} for paths in drawn]
    assert ends[0] < ends[1] == ends[3]
    np.testing.assert_allclose(nodes_of(figure, 3).get_facecolors()[:, 3], 0.12 + 0.88 * gate_means(graphs[3]))
    assert gate_means(graphs[0])[0] == 1.0  # a direction that is not there is not a closed one


def test_attention_stands_at_the_row_that_receives_it():
    data = graph(6)
    index, alpha = torch.tensor([[1, 7], [0, 11]]), torch.tensor([[0.2, 0.4], [1.0, 1.0]])
    table = attention_heatmaps([(index, alpha)], data, data.name).axes[0].images[0].get_array()
    assert table[0, 1] == pytest.approx(0.3)
    assert table[11, 7] == 1.0
    assert (table != 0).sum() == 2


def test_a_choice_of_steps_keeps_the_first_and_the_last():
    assert [evenly(n, 4) for n in (1, 2, 4, 10)] == [[0], [0, 1], [0, 1, 2, 3], [0, 3, 6, 9]]


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (NAMES[:2] + NAMES[6:7], ["0 q", "1 q", "0 v"]),
        (["model.layers.3.mlp.up_proj", "model.layers.3.self_attn.q_proj"], ["mlp up_proj", "self_attn q_proj"]),
        (["encoder.0.q", "encoder.0.mlp.fc"], ["q", "mlp.fc"]),
        (["a.b", "a.b.c"], ["b", "b.c"]),
        (["only"], ["only"]),
    ],
)
def test_short_names_keep_what_differs(names, short):
    assert short_names(names) == short
