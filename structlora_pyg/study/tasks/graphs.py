"""Classes of nodes by graph networks of PyG: pretrained to count triangles, adapted to count cycles of length 4.

Every node of a random graph gets one of four classes by the number of triangles through it (source) or of cycles of
length 4 (target), cut at the quartiles. Source graphs have independent edges; target graphs grow by preferential
attachment or have communities, so that the task and the graphs both change. A node knows its degree and its
probabilities of return after 2, 3 and 4 random steps. Counts are exact, from powers of the adjacency matrix.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
import torch_geometric.nn as pyg_nn
import torch_geometric.transforms as T
from torch import Tensor, nn
from torch_geometric.data import Batch as GraphBatch
from torch_geometric.data import Data
from torch_geometric.utils import barabasi_albert_graph, degree, erdos_renyi_graph, stochastic_blockmodel_graph
from torch_geometric.utils import to_dense_adj as dense

from structlora_pyg.study.config import DataConfig, ModelConfig
from structlora_pyg.study.tasks.base import Batch, Task, register
from structlora_pyg.study.tasks.digits import NetworkTask, pretrained
from structlora_pyg.study.tasks.limits import drawn
from structlora_pyg.study.tasks.loading import ModelError

CLASSES, FEATURES = 4, 4
SOURCE, POOL, HELD_OUT, TEST = 600, 60, 60, 150  # graphs
PRETRAINING: dict[str, Any] = {"steps": 500, "batch_size": 16, "lr": 3e-3, "weight_decay": 0.01}


class GraphNetwork(nn.Module):
    """A stack of PyG's layers with a classifier of nodes.

    Args:
        kind: ``gps``: GPS layers around ``GINConv``; ``gat``: residual ``GATv2Conv``.
        width: Channels, a multiple of `heads`.
        layers: Number of layers.
        heads: Attention heads.
    """

    def __init__(self, kind: Literal["gps", "gat"], width: int = 32, layers: int = 4, heads: int = 4) -> None:
        super().__init__()

        def gps() -> nn.Module:
            perceptron = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
            return pyg_nn.GPSConv(width, pyg_nn.GINConv(perceptron), heads=heads, norm="layer_norm")

        def gat() -> nn.Module:
            return pyg_nn.GATv2Conv(width, width // heads, heads=heads)

        self.kind = kind
        self.embed = pyg_nn.Linear(FEATURES, width)
        self.convs = nn.ModuleList({"gps": gps, "gat": gat}[kind]() for _ in range(layers))
        self.head = pyg_nn.Linear(width, CLASSES)

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor) -> Tensor:
        """Return logits (nodes, 4) of features (nodes, 4), edges (2, E) and the graph of each node (nodes,)."""
        h = self.embed(x)
        for conv in self.convs:
            h = conv(h, edge_index, batch) if self.kind == "gps" else h + F.elu(conv(h, edge_index))
        return self.head(h)


@dataclass(frozen=True, kw_only=True)
class GraphTask(NetworkTask):
    """Classification of the nodes of small graphs; an example is a graph."""

    def collate(self, examples: Sequence[Data]) -> Batch:
        """Return ``x`` (nodes, 4), ``edge_index`` (2, E), ``batch`` (nodes,) and ``labels`` (nodes,)."""
        data: Any = GraphBatch.from_data_list(list(examples))
        return {"x": data.x, "edge_index": data.edge_index, "batch": data.batch, "labels": data.y}


def cycle_counts(edge_index: Tensor, nodes: int) -> tuple[Tensor, Tensor]:
    """Return the numbers of triangles and of cycles of length 4 through every node (n,), exactly."""
    a = dense(edge_index, max_num_nodes=nodes)[0].double()
    d, square = a.sum(0), a @ a
    closed = (square @ square).diagonal()
    return (square @ a).diagonal() / 2, (closed - d.square() - a @ (d - 1)) / 2


def random_graph(family: Literal["independent", "growing", "communities"]) -> Data:
    """Return a graph of 20 to 36 nodes with features ``x`` (n, 4) and the counts ``triangles`` and ``squares`` (n,)."""
    n = int(torch.randint(20, 37, ()))
    if family == "independent":
        edge_index = erdos_renyi_graph(n, float(torch.empty(()).uniform_(3, 6)) / n)
    elif family == "growing":
        edge_index = barabasi_albert_graph(n, int(torch.randint(2, 4, ())))
    else:
        sizes = torch.tensor([n // 2, n - n // 2])
        inside, across = float(torch.empty(()).uniform_(0.2, 0.4)), 0.05
        edge_index = stochastic_blockmodel_graph(sizes, [[inside, across], [across, inside]])
    walk = T.AddRandomWalkPE(4, attr_name="walk")(Data(edge_index=edge_index, num_nodes=n)).walk
    triangles, squares = cycle_counts(edge_index, n)
    x = torch.cat([degree(edge_index[0], n).log1p().unsqueeze(1), walk[:, 1:]], dim=1)
    return Data(x=x, edge_index=edge_index, triangles=triangles, squares=squares)


def _labelled(graphs: list[Data], count: str, known: int) -> list[Data]:
    """Return the graphs with classes ``y``; the quartiles of a count are those of the first `known` graphs."""
    quartiles = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    cuts = torch.cat([g[count] for g in graphs[:known]]).quantile(quartiles)
    return [Data(x=g.x, edge_index=g.edge_index, y=torch.bucketize(g[count], cuts)) for g in graphs]


@functools.cache
def source_graphs() -> list[Data]:
    """Return the graphs to pretrain with, labelled by triangles."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _labelled([random_graph("independent") for _ in range(SOURCE)], "triangles", SOURCE)


@functools.cache
def target_graphs() -> tuple[list[Data], list[Data], list[Data]]:
    """Return the graphs to draw training examples from, to choose settings by and to test on."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        kinds: tuple[Literal["growing", "communities"], ...] = ("growing", "communities")
        graphs = [random_graph(kinds[i % 2]) for i in range(POOL + HELD_OUT + TEST)]
    graphs = _labelled(graphs, "squares", POOL)
    return graphs[:POOL], graphs[POOL : POOL + HELD_OUT], graphs[POOL + HELD_OUT :]


@register(
    "graphs",
    "how many cycles of length 4 run through a node? By networks of PyG, no download; accuracy",
    libraries=("pyg",),
)
def graphs_task(model: ModelConfig, data: DataConfig, seed: int) -> Task:
    """Return the target graphs and a network that has learned to count triangles.

    With ``data.validation_share`` above 0 the graphs held out for that, which are never trained on, are evaluated
    instead of the test graphs.

    Raises:
        DataError: If there are fewer examples than asked for.
        ModelError: If ``model.architecture`` is none of ``gps`` and ``gat``, or the overrides do not fit it.
    """
    pool, held_out, test = target_graphs()
    train, evaluated = drawn((pool, held_out if data.validation_share else test), data, seed)

    def build() -> nn.Module:
        try:
            return GraphNetwork(model.architecture, **model.overrides)  # type: ignore[arg-type]
        except (KeyError, TypeError, ValueError, RuntimeError, AssertionError) as error:
            raise ModelError(
                f"model.architecture={model.architecture} with model.overrides={model.overrides}: give gps or gat, and "
                f"of width, layers and heads what fits ({error})"
            ) from error

    def batch() -> tuple[dict[str, Tensor], Tensor]:
        graphs = source_graphs()
        chosen = torch.randint(len(graphs), (PRETRAINING["batch_size"],)).tolist()
        data: Any = GraphBatch.from_data_list([graphs[i] for i in chosen])
        return {"x": data.x, "edge_index": data.edge_index, "batch": data.batch}, data.y

    recipe = {"architecture": model.architecture, **model.overrides, **PRETRAINING, "graphs": SOURCE}
    network: Any = pretrained(Path(model.path), "graphs", recipe, build, batch)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network.head = pyg_nn.Linear(network.head.in_channels, CLASSES)
    return GraphTask(
        model=network.to(getattr(torch, model.dtype)),
        train_set=train,
        eval_set=evaluated,
        metric="accuracy",
        num_labels=CLASSES,
        head=("head",),
    )
