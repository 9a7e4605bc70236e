"""Tasks that need no download: handwritten digits, and nodes of random graphs.

A small vision transformer of timm that was pretrained on the digits 0-4 learns 5-9 from a few examples of each. The
pictures come with scikit-learn, and every base is pretrained the first time (a few seconds).

Graph networks of PyG that were pretrained to count triangles learn to count cycles of length 4: every node of a random
graph gets one of four classes by the number of them through it, cut at the quartiles. Source graphs have independent
edges; target graphs grow by preferential attachment or have communities, so that the task and the graphs both change. A
node knows its degree and its probabilities of return after 2, 3 and 4 random steps. Counts are exact, from powers of
the adjacency matrix.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
import torch_geometric.nn as pyg_nn
import torch_geometric.transforms as T
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.utils.data import default_collate
from torch_geometric.data import Batch as GraphBatch
from torch_geometric.data import Data
from torch_geometric.utils import barabasi_albert_graph, degree, erdos_renyi_graph, stochastic_blockmodel_graph
from torch_geometric.utils import to_dense_adj as dense
from tqdm.auto import tqdm

from structlora_pyg.checks import ConfigError, replace_file, require, short
from structlora_pyg.study.config import DataConfig, ModelConfig
from structlora_pyg.study.tasks import Batch, ScoringTask, Task, inputs_of, register
from structlora_pyg.study.tasks.loading import ModelError
from structlora_pyg.study.tasks.splits import drawn, subsample

logger = logging.getLogger(__name__)

DIGITS = 5  # 0-4 before, 5-9 after
PICTURES_HELD_OUT = 30  # pictures per class to choose settings by
DIGITS_RECIPE: dict[str, Any] = {"steps": 300, "batch_size": 64, "lr": 2e-3, "noise": 0.6, "weight_decay": 0.05}
Pictures = tuple[Tensor, Tensor]  # (n, 1, 8, 8) in [-1, 1]; (n,) classes from 0


@dataclass(frozen=True, kw_only=True)
class NetworkTask(ScoringTask):
    """Classification by a network that takes the tensors of a batch by name and returns logits (B, classes)."""

    metric: str = "accuracy"
    head: tuple[str, ...] = ("head",)

    def collate(self, examples: Sequence[Any]) -> Batch:
        """Return ``x`` (B, ...) and ``labels`` (B,) of pairs of a tensor and its class."""
        return dict(zip(("x", "labels"), default_collate(list(examples)), strict=True))

    def scores(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return logits (B, classes)."""
        dtype = next(self.model.parameters()).dtype
        return model(**{**inputs_of(batch), "x": batch["x"].to(dtype)}).float()


def read_digits() -> dict[str, Pictures]:
    """Return scikit-learn's handwritten digits in four parts, the same for everybody.

    ``known``: the digits 0-4, to pretrain with. Of the digits 5-9 ``test``, half of them; ``validation``, 30 others of
    each class; ``pool``, the rest, from which training examples are drawn.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    raw = load_digits()
    x = torch.tensor(raw.images, dtype=torch.float32).unsqueeze(1) / 8.0 - 1.0
    y = torch.tensor(raw.target, dtype=torch.long)
    new = torch.nonzero(y >= DIGITS).flatten()
    train, test = train_test_split(new.numpy(), test_size=0.5, random_state=0, stratify=y[new].numpy())
    held_out = first_of_each(y[train], PICTURES_HELD_OUT).numpy()
    chosen = {"validation": train[held_out], "pool": train[~held_out], "test": test}
    parts = {name: (x[index], y[index] - DIGITS) for name, index in chosen.items()}
    return {"known": (x[y < DIGITS], y[y < DIGITS]), **parts}


def first_of_each(labels: Tensor, count: int) -> Tensor:
    """Return a mask (n,) of the first `count` examples of every class, given classes (n,)."""
    return (labels.unsqueeze(1) == labels).tril(-1).sum(1) < count


def draw(pool: Pictures, data: DataConfig, seed: int) -> Pictures:
    """Return the training examples of a seed, equally many of every class unless all are wanted.

    Raises:
        ConfigError: If ``data.train_limit`` cannot be met.
    """
    least = int(torch.bincount(pool[1]).min())
    if data.train_limit is None and data.train_fraction == 1.0:
        return pool
    count = data.train_limit or DIGITS * max(1, round(data.train_fraction * least))
    if count % DIGITS or count > DIGITS * least:
        wanted = f"give a multiple of {DIGITS} up to {DIGITS * least}"
        raise ConfigError(
            f"data.train_limit={count}: data.task=digits draws equally many of {DIGITS} classes; {wanted}"
        )
    order = torch.randperm(len(pool[1]), generator=torch.Generator().manual_seed(seed))
    chosen = order[first_of_each(pool[1][order], count // DIGITS)]
    return pool[0][chosen], pool[1][chosen]


@register(
    "digits",
    "which of the digits 5-9, by a model that knows 0-4? For trying things out, no download; accuracy",
    libraries=("timm",),
    brings_data=True,
)
def digits_task(model: ModelConfig, data: DataConfig, seed: int) -> Task:
    """Return the digits 5-9 and a vision transformer of timm that knows 0-4.

    With ``data.validation_share`` above 0 pictures are evaluated that are neither trained on nor tested.

    Raises:
        ConfigError: If there are fewer training examples than asked for.
        ModelError: If timm cannot build the model, or it does not fit pictures of 8 x 8 pixels in one channel.
    """
    timm, parts = require("timm", "study"), read_digits()

    def build() -> nn.Module:
        network = timm.create_model(model.architecture, num_classes=DIGITS, **model.overrides)
        network(parts["test"][0][:1])  # does it take such pictures?
        return network

    def batch() -> Batch:
        x, y = parts["known"]
        chosen = torch.randint(len(y), (DIGITS_RECIPE["batch_size"],))
        noise = DIGITS_RECIPE["noise"] * torch.randn_like(x[chosen])  # without it the features fit 0-4 and little else
        return {"x": x[chosen] + noise, "labels": y[chosen]}

    network = pretrained(model, {**DIGITS_RECIPE, "timm": timm.__version__}, build, batch)
    torch.manual_seed(seed)
    network.reset_classifier(DIGITS)
    held_out = list(zip(*parts["validation" if data.validation_share else "test"], strict=True))
    return NetworkTask(
        model=network.to(getattr(torch, model.dtype)),
        train_set=list(zip(*draw(parts["pool"], data, seed), strict=True)),
        eval_set=[held_out[i] for i in subsample(len(held_out), data.eval_limit, seed)],
        num_labels=DIGITS,
    )


def pretrained(
    model: ModelConfig, recipe: dict[str, Any], build: Callable[[], nn.Module], batch: Callable[[], Batch]
) -> Any:
    """Return a pretrained base, in evaluation mode, from its file in the folder ``model.path``, or make that file.

    Args:
        model: Its ``architecture`` and ``overrides`` are part of the recipe.
        recipe: What else the weights depend on; ``steps``, ``lr`` and ``weight_decay`` of the pretraining among it.
        build: Returns the network with new weights.
        batch: Draws inputs of the network by name, and ``labels``.

    Raises:
        ModelError: If the network cannot be built.
    """
    text = json.dumps({"model": [model.architecture, model.overrides], **recipe, "torch": torch.__version__})
    file = Path(model.path) / f"{model.architecture}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.safetensors"
    torch.manual_seed(0)
    try:
        network = build()
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        said = f"model.architecture={model.architecture} with model.overrides={model.overrides}"
        raise ModelError(f"{said} cannot be built for this task: {short(error)}") from error
    try:
        network.load_state_dict(load_file(file))
        return network.eval()
    except (OSError, SafetensorError, RuntimeError) as error:
        if file.exists():
            logger.warning("%s is damaged (%s); the base is pretrained again", file, short(error))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the same base on every machine; more threads would not be faster
    torch.manual_seed(0)
    network, steps, lr = build().train(), recipe["steps"], recipe["lr"]
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=recipe["weight_decay"])
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    for _ in tqdm(range(steps), desc="pretraining the base", unit="step", disable=None):
        drawn = batch()
        F.cross_entropy(network(**inputs_of(drawn)), drawn["labels"]).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()  # at the end, too: later clipping would count what is left
    torch.set_num_threads(threads)
    replace_file(file, save({key: value.contiguous() for key, value in network.state_dict().items()}))
    return network.eval()


CLASSES, FEATURES = 4, 4
SOURCE, POOL, HELD_OUT, TEST = 600, 60, 60, 150  # graphs
GRAPHS_RECIPE: dict[str, Any] = {"steps": 500, "batch_size": 16, "lr": 3e-3, "weight_decay": 0.01}
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

    With ``data.validation_share`` above 0 graphs are evaluated that are neither trained on nor tested.

    Raises:
        ModelError: If ``model.architecture`` is none of ``gps`` and ``gat``, or the overrides do not fit it.
    """
    target = random_graphs(("growing", "communities"), True, POOL + HELD_OUT + TEST, POOL)
    evaluated = target[POOL : POOL + HELD_OUT] if data.validation_share else target[POOL + HELD_OUT :]
    train_set, eval_set = drawn((target[:POOL], evaluated), data, seed)

    def batch() -> Batch:
        source = random_graphs(("independent",), False, SOURCE, SOURCE)
        chosen = torch.randint(len(source), (GRAPHS_RECIPE["batch_size"],)).tolist()
        return GraphTask.collate([source[i] for i in chosen])

    kind: Any = model.architecture
    build = functools.partial(GraphNetwork, kind, **model.overrides)
    network = pretrained(model, {**GRAPHS_RECIPE, "graphs": SOURCE}, build, batch)
    torch.manual_seed(seed)
    network.head = pyg_nn.Linear(network.head.in_channels, CLASSES)
    return GraphTask(
        model=network.to(getattr(torch, model.dtype)), train_set=train_set, eval_set=eval_set, num_labels=CLASSES
    )
