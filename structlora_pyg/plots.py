"""Figures: training curves, gates, likeness of layers, and the adapter graph.

Every function returns a `matplotlib.figure.Figure` that belongs to the caller: pyplot and its global state are not
used, so nothing has to be closed and any backend will do. Lines and letters are drawn in `INK`, `MUTED`, `GRID` and
`PAGE`, which `structlora_pyg.report` replaces by the colours of the reader's theme.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.colors import LinearSegmentedColormap, to_rgba
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.path import Path
from matplotlib.textpath import TextPath
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray
from torch_geometric.data import Data

INK, MUTED, GRID = "#1c2733", "#67727e", "#d4dae0"
PAGE = "#fefefe"  # what is empty
ON_CELLS = "#101820"  # what stands on coloured cells does not follow the theme
# Apart for colour-blind readers too, and of middle lightness: they stand on white and on black.
COLORS = ("#6b7a8c", "#e0592a", "#1d8fa3", "#b0559b", "#5b9a2f", "#c48a0a", "#4668c9", "#8a6a4f", "#cf4d6f", "#3f9e7c")
TITLE_FONT = FontProperties(weight="bold")
DIVERGING = LinearSegmentedColormap.from_list(
    "likeness", ["#153f73", "#3f7fba", "#a9cce6", "#f6f6f4", "#f5bfa0", "#d7603c", "#7d1a1f"]
)
SEQUENTIAL = LinearSegmentedColormap.from_list("gate", ["#edf1f3", "#a5d0d3", "#3f9aa6", "#155e75", "#0b3a53"])

Curve = tuple[ArrayLike, ArrayLike]


def training_curves(
    panels: Mapping[str, Mapping[str, Curve]],
    marks: Mapping[str, float] | None = None,
    xlabel: str = "optimizer step",
    stacked: bool = False,
) -> Figure:
    """Draw one panel a quantity: the mean over seeds of every method, with a band of one standard deviation.

    Args:
        panels: ``{quantity: {method: (x, y)}}`` with x (points,) and y (seeds, points).
        marks: ``{label: x}`` of vertical lines, for instance where the filter starts to act.
        xlabel: What x counts.
        stacked: Panels one below the other, for narrow pages, instead of side by side.

    Raises:
        ValueError: No panel; x and y that do not fit.
    """
    if not panels:
        raise ValueError("panels must hold at least one quantity")
    methods = list(dict.fromkeys(m for curves in panels.values() for m in curves))
    figure, grid = panel_grid(list(panels), xlabel, stacked)
    for ax, (quantity, curves) in zip(grid, panels.items(), strict=True):
        ax.margins(x=0.02, y=0.14 if marks else 0.05)  # room for the marks' labels above the curves
        for method, (x, y) in curves.items():
            x_points, y_seeds = np.asarray(x, dtype=float), np.atleast_2d(np.asarray(y, dtype=float))
            if y_seeds.shape[1:] != x_points.shape:
                raise ValueError(
                    f"{quantity} of {method}: y must be (seeds, {len(x_points)}), one column a point of x, got "
                    f"{y_seeds.shape}"
                )
            k, mean = methods.index(method), y_seeds.mean(0)
            color, line = COLORS[k % len(COLORS)], "-" if k < len(COLORS) else (0, (4, 2))
            ax.plot(x_points, mean, color=color, linewidth=2, linestyle=line, label=method, zorder=3)
            if len(y_seeds) > 1:
                sd = y_seeds.std(0, ddof=1)
                alpha = min(0.18, 0.6 / len(curves))  # many bands on one another stay lighter than the lines
                ax.fill_between(x_points, mean - sd, mean + sd, color=color, alpha=alpha, linewidth=0, zorder=2)
        for label, position in (marks or {}).items():
            ax.axvline(position, color=MUTED, linewidth=0.9, linestyle=(0, (3, 3)), zorder=1)
            ax.annotate(
                label,
                (position, 1),
                xycoords=("data", "axes fraction"),
                xytext=(4, -2),
                textcoords="offset points",
                va="top",
                fontsize=8,
                color=MUTED,
            )
    legend_above(figure, grid[0])
    return figure


def gate_heatmap(gate: ArrayLike, names: Sequence[str]) -> Figure:
    """Draw the gates: one row an adapter, one column a rank-one direction; closed gates show a plain 0.

    Args:
        gate: (N, D) gates in [0, 1].
        names: N names of the rows.

    Raises:
        ValueError: Shapes that do not fit.
    """
    values = np.asarray(gate, dtype=float)
    if values.ndim != 2 or len(values) != len(names):
        raise ValueError(f"gate must be ({len(names)}, directions), one row a name, got {values.shape}")
    n, d = values.shape
    row = min(0.27, 9.0 / n)
    width = max(2.4, min(0.5 * d, 7.0))
    figure = new_figure((width + 1.9, row * n + 0.95))
    ax = figure.subplots()
    style_axes(ax, spines=())
    image = ax.imshow(values, cmap=SEQUENTIAL, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    labels = short_names(names)
    rows = _thinned(n, int(row * n / 0.16))
    ax.set_yticks(rows, [labels[i] for i in rows])
    columns = _thinned(d, int(width / 0.26))
    ax.set_xticks(columns, [str(j + 1) for j in columns])
    ax.set_xlabel("direction", fontsize=9, color=MUTED)
    ax.tick_params(length=0)
    _separate(ax, names, vertical=False)
    annotated = row >= 0.2 and d <= 16
    if annotated:
        for i, j in itertools.product(range(n), range(d)):
            text = "0" if values[i, j] == 0 else f"{values[i, j]:.2f}".removeprefix("0")
            light = values[i, j] > 0.58
            ax.text(j, i, text, ha="center", va="center", fontsize=7.5, color="#ffffff" if light else ON_CELLS)
    closed = " (0: closed)" if annotated else ""
    _colorbar(figure, image, ax, f"gate{closed}", [0, 0.5, 1])
    return figure


def similarity_heatmaps(similarities: Mapping[str, ArrayLike], names: Sequence[str], stacked: bool = False) -> Figure:
    """Draw cosines between the updates of layers, one panel a method, on one scale from -1 to 1 centred at 0.

    Args:
        similarities: ``{method: cosines (N, N)}``.
        names: N names of the adapters; lines separate the roles where adapters of one role stand together.
        stacked: Panels one below the other, for narrow pages.

    Raises:
        ValueError: No panel; shapes that do not fit.
    """
    if not similarities:
        raise ValueError("similarities must hold at least one method")
    n, count = len(names), len(similarities)
    labels, shown = short_names(names), _thinned(n, 17)
    margin = 0.065 * max(map(len, labels))  # labels stand upright below a panel, and once to the left
    side = 3.0
    figure = new_figure(
        (side + margin + 0.85, (side + margin + 0.45) * count)
        if stacked
        else (side * count + margin + 0.95, side + margin + 0.4)
    )
    grid = figure.subplots(count, 1, squeeze=False) if stacked else figure.subplots(1, count, squeeze=False)
    for ax, (method, values) in zip(grid.flat, similarities.items(), strict=True):
        cosines = np.asarray(values, dtype=float)
        if cosines.shape != (n, n):
            raise ValueError(f"the cosines of {method} must be ({n}, {n}), got {cosines.shape}")
        style_axes(ax, spines=())
        ax.set_title(method, loc="left", fontsize=10, color=INK, fontweight="bold")
        image = ax.imshow(cosines, cmap=DIVERGING, vmin=-1, vmax=1, interpolation="nearest")
        ax.set_xticks(shown, [labels[i] for i in shown], rotation=90)
        if stacked or ax is grid.flat[0]:
            ax.set_yticks(shown, [labels[i] for i in shown])
        else:
            ax.set_yticks([])
        ax.tick_params(length=0, labelsize=7.5)
        _separate(ax, names, vertical=True)
    _colorbar(figure, image, list(grid.flat), "cosine of the updates", [-1, -0.5, 0, 0.5, 1])
    return figure


def draw_graph(data: Data) -> Figure:
    """Draw the adapter graph: depth from left to right, one row and one colour a role.

    The wider and darker an edge, the larger its weight. Edges within a role have the role's colour, edges across roles
    are grey. An edge bends where it would run through other nodes. Both directions of an edge are drawn as one.

    Args:
        data: A graph with ``edge_index`` (2, E), ``depth`` (N,) and ``role`` (N,); ``edge_weight`` (E,) in [0, 1] and
            ``name`` (N strings) are used where present. `StructLoraModel.adapter_graph` makes such graphs.

    Raises:
        ValueError: Missing attributes, or names that do not fit.
    """
    missing = [key for key in ("edge_index", "depth", "role") if key not in data]
    if missing:
        raise ValueError(f"the graph has no {', '.join(missing)}; model.adapter_graph() returns one that can be drawn")
    depth, role = _numpy(data.depth).astype(int), _numpy(data.role).astype(int)
    names = [str(name) for name in data.name] if "name" in data else None
    if names is not None and len(names) != len(depth):
        raise ValueError(f"data.name holds {len(names)} names for {len(depth)} nodes")
    columns, rows = depth.max(initial=0) + 1, role.max(initial=0) + 1
    # Everything is laid out in inches, so that sizes of nodes and bends of edges are known.
    dx = float(np.clip(5.6 / max(columns - 1, 1), 0.13, 0.75))
    dy, size = 1.0 if rows < 5 else 0.8, min(0.34, 0.66 * dx)
    at = np.stack([depth * dx, -role * dy], axis=1)
    edges, weight = _undirected(_numpy(data.edge_index), _numpy(data.edge_weight) if "edge_weight" in data else None)
    paths = _edge_paths(edges, at, role, rows, dy, size)

    titles = _role_titles(names, role, rows)
    points = np.concatenate([at, *(_extent(path) for path in paths)])
    left, right = points[:, 0].min() - size, points[:, 0].max() + size
    bottom, top = points[:, 1].min() - size, points[:, 1].max() + size
    spare = max(0.0, 1.6 - (right - left)) / 2  # the axis' own label needs room too
    left, right = left - spare, right + spare
    gutter = max(TextPath((0, 0), title, size=10, prop=TITLE_FONT).get_extents().width for title in titles) / 72 + 0.2
    weighted = bool(len(weight)) and float(np.ptp(weight)) > 1e-6
    foot = 0.85 if weighted else 0.55
    width, height = right - left + gutter + 0.1, top - bottom + foot
    figure = Figure(figsize=(width, height))
    ax = figure.add_axes((gutter / width, foot / height, (right - left) / width, (top - bottom) / height))
    style_axes(ax, spines=("bottom",))
    ax.set_xlim(left, right)
    ax.set_ylim(bottom, top)

    within = role[edges[:, 0]] == role[edges[:, 1]] if len(edges) else np.zeros(0, bool)
    # The more edges, the fainter: a crowd must not hide the nodes. Edges across roles cross each other most.
    inside = float(np.clip(3.0 * len(depth) / max(within.sum(), 1), 0.04, 1.0))
    across = float(np.clip(1.0 * len(depth) / max((~within).sum(), 1), 0.02, 1.0))
    colors = [
        to_rgba(COLORS[(role[i] + 1) % len(COLORS)], (0.15 + 0.75 * w) * inside)
        if same
        else to_rgba(MUTED, (0.15 + 0.75 * w) * across)
        for (i, _), same, w in zip(edges, within, weight, strict=True)
    ]
    thin = 1.0 if size > 0.2 else 0.5
    order = np.argsort(within, kind="stable")  # edges of a role lie above the grey ones
    lines = PathCollection(
        [paths[i] for i in order],
        facecolors="none",
        edgecolors=[colors[i] for i in order],
        linewidths=[(0.5 + 2.3 * weight[i]) * thin for i in order],
        capstyle="round",
        zorder=1,
    )
    lines.set_rasterized(len(edges) > 3000)
    ax.add_collection(lines)
    fills = [COLORS[(r + 1) % len(COLORS)] for r in role]
    ax.scatter(at[:, 0], at[:, 1], s=(72 * size) ** 2, c=fills, linewidths=0, zorder=3)
    if size >= 0.2:
        for (x, y), text in zip(at, _numbers(names, depth), strict=True):
            ax.text(x, y, text, ha="center", va="center_baseline", fontsize=8, color="#ffffff", zorder=4)

    ax.set_yticks([-r * dy for r in range(rows)], titles)
    for r, label in enumerate(ax.get_yticklabels()):
        label.set(color=COLORS[(r + 1) % len(COLORS)], fontproperties=TITLE_FONT, fontsize=10)
    step = max(1, int(np.ceil(0.22 / dx)))
    ticks = [k for k in range(columns) if k % step == 0]
    ax.set_xticks([k * dx for k in ticks], [str(k) for k in ticks])
    ax.set_xlabel("depth within the role", fontsize=9, color=MUTED)
    ax.tick_params(axis="y", length=0, pad=2)
    if weighted:
        _weight_legend(figure, float(weight.min()), float(weight.max()))
    return figure


def short_names(names: Sequence[str]) -> list[str]:
    """Return names without the parts that all of them share: ``blocks.0.attn.qkv[q]`` becomes ``0 q``."""
    parts = [re.findall(r"[^.\[\]]+", name) for name in names]
    if len(set(map(tuple, parts))) < 2:
        return list(names)
    if len({len(p) for p in parts}) == 1:
        differing = [k for k in range(len(parts[0])) if len({p[k] for p in parts}) > 1]
        return [" ".join(p[k] for k in differing) for p in parts]
    same = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*parts, strict=False))
    start = min(sum(1 for _ in same), min(map(len, parts)) - 1)
    return [".".join(p[start:]) for p in parts]


def new_figure(size: tuple[float, float]) -> Figure:
    """Return an empty figure of a size in inches whose parts make room for each other."""
    return Figure(figsize=size, layout="constrained")


def panel_grid(titles: Sequence[str], xlabel: str, stacked: bool) -> tuple[Figure, list[Axes]]:
    """Return a figure and one panel a title: up to three in a row, four as two by two, or one below the other."""
    n = len(titles)
    columns = 1 if stacked else 2 if n == 4 else min(n, 3)
    rows = -(-n // columns)
    figure = new_figure((4.1, 2.7 * n + 0.5) if stacked else (3.7 * columns + 0.3, 2.8 * rows + 0.3))
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for ax, title in zip(grid, titles, strict=False):
        style_axes(ax)
        ax.set_title(title, loc="left", fontsize=10, color=INK, fontweight="bold")
        ax.set_xlabel(xlabel, fontsize=9, color=MUTED)
        ax.grid(axis="y", color=GRID, linewidth=0.7)
    for ax in grid[n:]:
        ax.set_visible(False)
    return figure, grid[:n]


def legend_above(figure: Figure, ax: Axes) -> None:
    """Name the methods of a panel above all panels, in as many rows as the width asks for."""
    lines, labels = ax.get_legend_handles_labels()
    room = figure.get_figwidth() - 0.2
    widest = 0.075 * max(map(len, labels)) + 0.45  # inches
    legend = figure.legend(
        lines,
        labels,
        loc="outside upper left",
        ncols=max(1, min(len(labels), int(room / widest))),
        frameon=False,
        fontsize=9,
        handlelength=1.6,
    )
    _ink(legend.get_texts())


def style_axes(ax: Axes, spines: Sequence[str] = ("bottom", "left")) -> None:
    """Give a panel the look of all figures: thin lines, small numbers, few ticks."""
    for side, spine in ax.spines.items():
        spine.set(visible=side in spines, color=GRID)
    ax.tick_params(colors=MUTED, labelcolor=INK, labelsize=8, width=0.7, length=3)
    ax.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))


def _ink(texts: Sequence) -> None:
    for text in texts:
        text.set_color(INK)


def _colorbar(figure: Figure, image: object, axes: Axes | list[Axes], label: str, ticks: list[float]) -> None:
    shrink = min(0.75, 2.6 / figure.get_figheight())  # as long on a tall figure as on a flat one
    bar = figure.colorbar(image, ax=axes, ticks=ticks, shrink=shrink, aspect=20, pad=0.02)  # type: ignore[arg-type]
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.ax.tick_params(colors=MUTED, labelcolor=INK, labelsize=8, length=2)
    bar.set_label(label, fontsize=9, color=MUTED)


def _thinned(n: int, most: int) -> list[int]:
    """Return at most `most` evenly spaced positions of n, the first among them."""
    return list(range(0, n, max(1, -(-n // max(most, 1)))))


def _separate(ax: Axes, names: Sequence[str], vertical: bool) -> None:
    """Draw thin lines between neighbouring adapters of different roles, unless they alternate all the time."""
    roles = [re.sub(r"\d+", "*", name) for name in names]
    borders = [i + 0.5 for i in range(len(roles) - 1) if roles[i] != roles[i + 1]]
    if len(borders) >= len(roles) / 2:
        return
    for border in borders:
        ax.axhline(border, color=ON_CELLS, linewidth=0.9)
        if vertical:
            ax.axvline(border, color=ON_CELLS, linewidth=0.9)


def _numpy(tensor: object) -> NDArray:
    return np.asarray(tensor.detach().cpu())  # type: ignore[attr-defined]


def _undirected(edge_index: NDArray, weight: NDArray | None) -> tuple[NDArray, NDArray]:
    """Return every pair of joined nodes once (E', 2) with its largest weight (E',); loops are left out."""
    values = np.ones(edge_index.shape[1]) if weight is None else weight.astype(float).reshape(-1)
    largest: dict[tuple[int, int], float] = {}
    for i, j, w in zip(*edge_index.tolist(), values.tolist(), strict=True):
        if i != j:
            pair = (min(i, j), max(i, j))
            largest[pair] = max(largest.get(pair, 0.0), w)
    pairs = np.array(sorted(largest), dtype=int).reshape(-1, 2)
    return pairs, np.clip([largest[i, j] for i, j in pairs], 0.0, 1.0)


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


def _role_titles(names: list[str] | None, role: NDArray, rows: int) -> list[str]:
    """Return a title a row: the name that its nodes share, with ``*`` for the number that differs."""
    if names is None:
        return [f"role {r}" for r in range(rows)]
    patterns = [""] * rows
    for name, r in zip(names, role, strict=True):
        patterns[r] = re.sub(r"(?<![^.])\d+(?=\.|\[|$)", "*", name)
    return short_names(patterns)


def _numbers(names: list[str] | None, depth: NDArray) -> list[str]:
    """Return the text inside each node: the first number of its name, or its depth."""
    if names is None:
        return [str(d) for d in depth]
    found = [re.search(r"(?<![^.])\d+(?=\.|\[|$)", name) for name in names]
    return [match.group() if match else str(d) for match, d in zip(found, depth, strict=True)]


def _weight_legend(figure: Figure, low: float, high: float) -> None:
    samples = [low, (low + high) / 2, high]
    handles = [Line2D([], [], color=to_rgba(MUTED, 0.15 + 0.75 * w), linewidth=0.5 + 2.3 * w) for w in samples]
    legend = figure.legend(
        handles,
        [f"{w:.2f}" for w in samples],
        loc="lower right",
        ncols=3,
        frameon=False,
        fontsize=8,
        title="edge weight",
        title_fontsize=8,
        alignment="right",
        handlelength=1.8,
        columnspacing=1.0,
    )
    _ink(legend.get_texts())
    legend.get_title().set_color(MUTED)
