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
from structlora_pyg.study.tasks import Batch, Task, register
from structlora_pyg.study.tasks.digits import NetworkTask, pretrained
from structlora_pyg.study.tasks.splits import drawn

CLASSES, FEATURES = 4, 4
SOURCE, POOL, HELD_OUT, TEST = 600, 60, 60, 150  # graphs
PRETRAINING: dict[str, Any] = {"steps": 500, "batch_size": 16, "lr": 3e-3, "weight_decay": 0.01}
Family = Literal["independent", "growing", "communities"]


class GraphNetwork(nn.Module):
    """A stack of PyG's layers with a classifier of nodes.

    Args:
        kind: ``gps``: GPS layers around ``GINConv``; ``gat``: residual ``GATv2Conv``.
        width: Channels, a multiple of `heads`.
        layers: Number of layers.
        heads: Attention heads.

    Raises:
        ValueError: If `kind` is none of the two.
    """

    def __init__(self, kind: Literal["gps", "gat"], width: int = 32, layers: int = 4, heads: int = 4) -> None:
        super().__init__()

        def gps() -> nn.Module:
            perceptron = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
            return pyg_nn.GPSConv(width, pyg_nn.GINConv(perceptron), heads=heads, norm="layer_norm")

        def gat() -> nn.Module:
            return pyg_nn.GATv2Conv(width, width // heads, heads=heads)

        if kind not in ("gps", "gat"):
            raise ValueError(f"kind={kind!r}; give gps or gat")
        self.kind = kind
        self.embed = pyg_nn.Linear(FEATURES, width)
        self.convs = nn.ModuleList(gps() if kind == "gps" else gat() for _ in range(layers))
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

    @staticmethod
    def collate(examples: Sequence[Data]) -> Batch:
        """Return ``x`` (nodes, 4), ``edge_index`` (2, E), ``batch`` (nodes,) and ``labels`` (nodes,)."""
        data: Any = GraphBatch.from_data_list(list(examples))
        return {"x": data.x, "edge_index": data.edge_index, "batch": data.batch, "labels": data.y}


def cycle_counts(edge_index: Tensor, nodes: int) -> tuple[Tensor, Tensor]:
    """Return the numbers of triangles and of cycles of length 4 through every node (n,), exactly."""
    a = dense(edge_index, max_num_nodes=nodes)[0].double()
    d, square = a.sum(0), a @ a
    closed = (square @ square).diagonal()
    return (square @ a).diagonal() / 2, (closed - d.square() - a @ (d - 1)) / 2


def random_edges(family: Family, n: int) -> Tensor:
    """Return the edges (2, E) of a random graph of `n` nodes."""
    if family == "independent":
        return erdos_renyi_graph(n, float(torch.empty(()).uniform_(3, 6)) / n)
    if family == "growing":
        return barabasi_albert_graph(n, int(torch.randint(2, 4, ())))
    sizes = torch.tensor([n // 2, n - n // 2])
    inside, across = float(torch.empty(()).uniform_(0.2, 0.4)), 0.05
    return stochastic_blockmodel_graph(sizes, [[inside, across], [across, inside]])


@functools.cache
def random_graphs(families: tuple[Family, ...], squares: bool, count: int, known: int) -> list[Data]:
    """Return graphs of 20 to 36 nodes with features ``x`` (n, 4) and classes ``y`` (n,), the same for everybody.

    Args:
        families: Kinds of graphs, in turns.
        squares: Whether cycles of length 4 are counted, instead of triangles.
        count: Number of graphs.
        known: The first so many give the quartiles at which counts become classes.
    """
    graphs, counts = [], []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(squares))
        for i in range(count):
            n = int(torch.randint(20, 37, ()))
            edge_index = random_edges(families[i % len(families)], n)
            walk = T.AddRandomWalkPE(4, attr_name="walk")(Data(edge_index=edge_index, num_nodes=n)).walk
            x = torch.cat([degree(edge_index[0], n).log1p().unsqueeze(1), walk[:, 1:]], dim=1)
            graphs.append(Data(x=x, edge_index=edge_index))
            counts.append(cycle_counts(edge_index, n)[int(squares)])
    cuts = torch.cat(counts[:known]).quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
    for graph, counted in zip(graphs, counts, strict=True):
        graph.y = torch.bucketize(counted, cuts)
    return graphs


@register(
    "graphs",
    "how many cycles of length 4 run through a node? By networks of PyG, no download; accuracy",
    libraries=("pyg",),
    brings_data=True,
)
def graphs_task(model: ModelConfig, data: DataConfig, seed: int) -> Task:
    """Return the target graphs and a network that has learned to count triangles.

    With ``data.validation_share`` above 0 the graphs held out for that, which are never trained on, are evaluated
    instead of the test graphs.

    Raises:
        DataError: If there are fewer examples than asked for.
        ModelError: If ``model.architecture`` is none of ``gps`` and ``gat``, or the overrides do not fit it.
    """
    target = random_graphs(("growing", "communities"), True, POOL + HELD_OUT + TEST, POOL)
    evaluated = target[POOL : POOL + HELD_OUT] if data.validation_share else target[POOL + HELD_OUT :]
    train_set, eval_set = drawn((target[:POOL], evaluated), data, seed)

    def batch() -> Batch:
        source = random_graphs(("independent",), False, SOURCE, SOURCE)
        return GraphTask.collate([source[i] for i in torch.randint(len(source), (PRETRAINING["batch_size"],)).tolist()])

    kind: Any = model.architecture
    network = pretrained(model, {**PRETRAINING, "graphs": SOURCE}, lambda: GraphNetwork(kind, **model.overrides), batch)
    torch.manual_seed(seed)
    network.head = pyg_nn.Linear(network.head.in_channels, CLASSES)
    return GraphTask(
        model=network.to(getattr(torch, model.dtype)), train_set=train_set, eval_set=eval_set, num_labels=CLASSES
    )
