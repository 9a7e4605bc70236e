"""Where the nodes and edges of a drawing of the adapter graph lie."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.path import Path
from numpy.typing import NDArray
from torch_geometric.data import Data


class GraphLayout:
    """Where the nodes and edges of an adapter graph lie, in inches, so that sizes of nodes and bends are known.

    Args:
        depth: (N,) position among the nodes of the same role.
        role: (N,) role index; -1 for virtual nodes.
        edges: (E', 2) pairs of nodes.
        length: Inches from the first depth to the last, as far as nodes stay neither crowded nor lost.
        spacing: Inches between neighbouring roles; default: by the number of roles.
        downwards: Depth from top to bottom and roles side by side, instead of depth from left to right.

    Attributes:
        at: (N, 2) places of the nodes.
        paths: E' paths of the edges: straight where no other node is in the way.
        size: Diameter of a node.
        box: Left, bottom, right and top of everything.
        within: (E',) whether an edge stays within a role.
        alpha: (E',) how opaque an edge may be. The more edges, the fainter: a crowd must not hide the nodes. Edges
            across roles cross each other most.
    """

    def __init__(
        self,
        depth: NDArray,
        role: NDArray,
        edges: NDArray,
        length: float = 5.6,
        spacing: float | None = None,
        downwards: bool = False,
    ) -> None:
        columns, rows = depth.max(initial=0) + 1, role.max(initial=0) + 1
        self.step = float(np.clip(length / max(columns - 1, 1), 0.13, 0.75))
        self.spacing = spacing or (1.0 if rows < 5 else 0.8)
        self.size = min(0.34, 0.66 * self.step)
        self.thin = 1.0 if self.size > 0.2 else 0.5
        self.at = np.stack([depth * self.step, -role * self.spacing], axis=1)
        self.paths = _edge_paths(edges, self.at, role, rows, self.spacing, self.size)
        if downwards:
            self.at = -self.at[:, ::-1]
            self.paths = [Path(-np.asarray(path.vertices)[:, ::-1], path.codes) for path in self.paths]
        points = np.concatenate([self.at, *(_extent(path) for path in self.paths)])
        low, high = points.min(0) - self.size, points.max(0) + self.size
        self.box = float(low[0]), float(low[1]), float(high[0]), float(high[1])
        self.within = role[edges[:, 0]] == role[edges[:, 1]] if len(edges) else np.zeros(0, bool)
        inside = float(np.clip(3.0 * len(depth) / max(self.within.sum(), 1), 0.04, 1.0))
        across = float(np.clip(1.0 * len(depth) / max((~self.within).sum(), 1), 0.02, 1.0))
        self.alpha = np.where(self.within, inside, across)


def places(data: Data) -> tuple[NDArray, NDArray]:
    """Return depth and role (N,) of the nodes of a graph.

    Raises:
        ValueError: If the graph lacks what a drawing needs.
    """
    missing = [key for key in ("edge_index", "depth", "role") if key not in data]
    if missing:
        raise ValueError(f"the graph has no {', '.join(missing)}; model.adapter_graph() returns one that can be drawn")
    return _numpy(data.depth).astype(int), _numpy(data.role).astype(int)


def undirected(data: Data) -> tuple[NDArray, NDArray]:
    """Return every pair of joined nodes once (E', 2) with its largest weight (E',); loops are left out."""
    index = _numpy(data.edge_index)
    weight = data.get("edge_weight")
    values = np.ones(index.shape[1]) if weight is None else _numpy(weight).astype(float).reshape(-1)
    largest: dict[tuple[int, int], float] = {}
    for i, j, w in zip(*index.tolist(), values.tolist(), strict=True):
        if i != j:
            pair = (min(i, j), max(i, j))
            largest[pair] = max(largest.get(pair, 0.0), w)
    pairs = np.array(sorted(largest), dtype=int).reshape(-1, 2)
    return pairs, np.clip([largest[i, j] for i, j in pairs], 0.0, 1.0)


def union_of_edges(graphs: Sequence[Data]) -> tuple[NDArray, NDArray]:
    """Return the pairs (E', 2) joined in any of T graphs, and their weights (T, E'), 0 where a graph lacks the edge."""
    each = [undirected(graph) for graph in graphs]
    edges = np.unique(np.concatenate([pairs for pairs, _ in each]), axis=0)
    place = {tuple(pair): k for k, pair in enumerate(edges.tolist())}
    weights = np.zeros((len(graphs), len(edges)))
    for row, (pairs, values) in zip(weights, each, strict=True):
        row[[place[tuple(pair)] for pair in pairs.tolist()]] = np.maximum(values, 1e-3)  # there, though it weighs 0
    return edges, weights


def _numpy(tensor: object) -> NDArray:
    return np.asarray(tensor.detach().cpu())  # type: ignore[attr-defined]


def _edge_paths(edges: NDArray, at: NDArray, role: NDArray, rows: int, dy: float, size: float) -> list[Path]:
    """Return a path an edge: straight where no other node is in the way, else the bend that keeps most distance."""
    longest = max((abs(at[i, 0] - at[j, 0]) for i, j in edges if role[i] == role[j]), default=1.0)
    paths = []
    for i, j in edges:
        a, b = at[i], at[j]
        others = np.delete(at, [i, j], axis=0)
        straight = Path([a, b])
        if _distance(straight, others) >= 0.75 * size:
            paths.append(straight)
        elif role[i] == role[j]:
            up = _side(int(role[i]), rows, round(min(a[0], b[0]) / size))
            room = 0.7 * dy if role[i] in (0, rows - 1) else 0.42 * dy
            height = up * (size + (room - size) * abs(b[0] - a[0]) / longest) / 0.75  # a cubic reaches 3/4 of it
            lean = 0.22 * (b[0] - a[0])
            paths.append(_curve(a, np.add(a, (lean, height)), np.add(b, (-lean, height)), b))
        else:
            paths.append(max([straight, *_bends(a, b, size)], key=lambda path: _distance(path, others)))
    return paths


def _bends(a: NDArray, b: NDArray, size: float) -> list[Path]:
    """Return bends for an edge across roles: leaving and arriving steeply, or swinging to one side."""
    drop = b[1] - a[1]
    steep = [_curve(a, np.add(a, (0, share * drop)), np.add(b, (0, -share * drop)), b) for share in (0.35, 0.6)]
    swings = []
    for side in (-1, 1):
        out = (side * 1.6 * size, drop / 3)
        swings.append(_curve(a, np.add(a, out), np.add(b, (out[0], -out[1])), b))
    return steep + swings


def _curve(a: NDArray, first: NDArray, second: NDArray, b: NDArray) -> Path:
    return Path([a, first, second, b], [Path.MOVETO, Path.CURVE4, Path.CURVE4, Path.CURVE4])


def _extent(path: Path) -> NDArray:
    """Return the corners of the box that a path really fills."""
    box = path.get_extents()
    return np.array([[box.x0, box.y0], [box.x1, box.y1]])


def _side(row: int, rows: int, start: int) -> int:
    """Return 1 for bows above a row, -1 for bows below: outwards at the rim, taking turns in the middle."""
    if rows > 1 and row in (0, rows - 1):
        return 1 if row == 0 else -1
    return 1 if start % 2 == 0 else -1


def _distance(path: Path, others: NDArray) -> float:
    """Return how close a path comes to any of the points `others` (n, 2)."""
    if not len(others):
        return np.inf
    t = np.linspace(0.0, 1.0, 65)[:, None]
    v = np.asarray(path.vertices, dtype=float)
    if len(v) == 2:
        line = v[0] * (1 - t) + v[1] * t
    else:
        line = v[0] * (1 - t) ** 3 + 3 * v[1] * t * (1 - t) ** 2 + 3 * v[2] * t**2 * (1 - t) + v[3] * t**3
    return float(np.sqrt(((others[:, None] - line) ** 2).sum(-1)).min())
