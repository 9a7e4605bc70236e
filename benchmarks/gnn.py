"""Graph networks as the base: pretrained to count triangles, adapted to count 4-cycles from a few labelled graphs.

    python benchmarks/gnn.py --json benchmarks/results/gnn.json
    python benchmarks/gnn.py --table benchmarks/results/gnn.json docs/gnn.md

Every node of a random graph gets one of four classes by the number of triangles through it (source) or of cycles of
length 4 (target), cut at the quartiles. Source graphs have independent edges; target graphs grow by preferential
attachment or have communities, so that the task and the graphs both change. A node knows its degree and its
probabilities of return after 2, 3 and 4 random steps. Counts are exact, from powers of the adjacency matrix.

Every system chooses its learning rate from one grid on validation graphs (first seeds), then is tested once a seed. A
seed draws the labelled graphs, the head and the adapter; systems are paired by it.
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import shlex
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torch_geometric.nn as pyg_nn
import torch_geometric.transforms as T
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch_geometric.data import Batch, Data
from torch_geometric.utils import (
    barabasi_albert_graph,
    degree,
    erdos_renyi_graph,
    stochastic_blockmodel_graph,
    to_dense_adj,
)

from structlora_pyg import StructLoraConfig, get_structlora_model
from structlora_pyg.study.demo.models import STRONG_GATES
from structlora_pyg.study.stats import compare, format_p, holm, judge, mean_sd

WIDTH, LAYERS, HEADS, CLASSES, RANK, LABELLED = 32, 4, 4, 4, 4, 4
GRID = (0.001, 0.003, 0.01, 0.03)
BEGIN, END = "<!-- begin: benchmarks/gnn.py -->", "<!-- end: benchmarks/gnn.py -->"

OFF = {"filter": {"kind": "none"}, "coordinator": {"conv": "none"}, "graph": {"edges": "none"}}
TARGETS = {"GPS": ["conv.nn.0", "conv.nn.2", "mlp.0", "mlp.3"], "GAT": ["lin_l", "lin_r"]}
ATTENTION = {"target_modules": [*TARGETS["GPS"], "attn"]}
OURS: dict[str, dict[str, Any]] = {
    "LoRA": OFF,
    "StructLoRA": {},
    "StructLoRA without coordinator": {"coordinator": {"conv": "none"}},
    "StructLoRA without filter": {"filter": {"kind": "none"}},
    "LoRA, attention too": {**OFF, **ATTENTION},
    "StructLoRA, attention too": ATTENTION,
}
SYSTEMS = {
    "GPS": ["head alone", "full fine-tuning", "LoRA (stock PEFT)", *OURS],
    "GAT": ["head alone", "full fine-tuning", *list(OURS)[:4]],  # PEFT refuses torch_geometric.nn.Linear
}


class Net(nn.Module):
    """A stack of PyG layers with a classifier of nodes."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.embed = pyg_nn.Linear(4, WIDTH)
        self.convs = nn.ModuleList(_gps() if kind == "GPS" else _gat() for _ in range(LAYERS))
        self.kind, self.head = kind, pyg_nn.Linear(WIDTH, CLASSES)

    def forward(self, data: Data) -> Tensor:
        """Return logits (nodes, classes)."""
        h = self.embed(data.x)
        for conv in self.convs:
            h = conv(h, data.edge_index, data.batch) if self.kind == "GPS" else h + F.elu(conv(h, data.edge_index))
        return self.head(h)


def _gps() -> nn.Module:
    perceptron = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))
    return pyg_nn.GPSConv(WIDTH, pyg_nn.GINConv(perceptron), heads=HEADS, norm="layer_norm")


def _gat() -> nn.Module:
    return pyg_nn.GATv2Conv(WIDTH, WIDTH // HEADS, heads=HEADS)


def counts(edge_index: Tensor, nodes: int) -> tuple[Tensor, Tensor]:
    """Return the numbers of triangles and of 4-cycles through every node (n,), exactly."""
    a = to_dense_adj(edge_index, max_num_nodes=nodes)[0].double()
    d, square = a.sum(0), a @ a
    closed = (square @ square).diagonal()
    return (square @ a).diagonal() / 2, (closed - d.square() - a @ (d - 1)) / 2


def random_graph(family: str) -> Data:
    """Return one graph of 20 to 36 nodes with features and both counts."""
    n = int(torch.randint(20, 37, ()))
    if family == "independent":
        edge_index = erdos_renyi_graph(n, float(torch.empty(()).uniform_(3, 6)) / n)
    elif family == "growing":
        edge_index = barabasi_albert_graph(n, int(torch.randint(2, 4, ())))
    else:
        sizes = torch.tensor([n // 2, n - n // 2])
        inside, across = float(torch.empty(()).uniform_(0.2, 0.4)), 0.05
        edge_index = stochastic_blockmodel_graph(sizes, [[inside, across], [across, inside]])
    data = T.AddRandomWalkPE(4, attr_name="walk")(Data(edge_index=edge_index, num_nodes=n))
    d = degree(edge_index[0], n)
    triangles, squares = counts(edge_index, n)
    x = torch.cat([d.log1p().unsqueeze(1), data.walk[:, 1:]], dim=1)
    return Data(x=x, edge_index=edge_index, triangles=triangles, squares=squares)


def labelled(graphs: list[Data], count: str, cuts: Tensor) -> list[Data]:
    """Return the graphs with classes ``y`` by a count."""
    return [Data(x=g.x, edge_index=g.edge_index, y=torch.bucketize(g[count], cuts)) for g in graphs]


class World:
    """All graphs: ``source`` to pretrain with, ``unseen``; ``pool``, ``validation``, ``test`` of the target.

    Args:
        sizes: Numbers of source, pool, validation and test graphs; as many unseen as test graphs.
    """

    def __init__(self, sizes: tuple[int, int, int, int]) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            source = [random_graph("independent") for _ in range(sizes[0] + sizes[3])]
            target = [random_graph(("growing", "communities")[i % 2]) for i in range(sum(sizes[1:]))]
        quartiles = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
        seen = torch.cat([g.triangles for g in source[: sizes[0]]])
        known = labelled(source, "triangles", seen.quantile(quartiles))
        self.source, self.unseen = known[: sizes[0]], Batch.from_data_list(known[sizes[0] :])
        # The cuts are part of the task, as the names of classes are; they come from the pool alone.
        cuts = torch.cat([g.squares for g in target[: sizes[1]]]).quantile(quartiles)
        parts = labelled(target, "squares", cuts)
        self.pool = parts[: sizes[1]]
        self.validation = Batch.from_data_list(parts[sizes[1] : sizes[1] + sizes[2]])
        self.test = Batch.from_data_list(parts[sizes[1] + sizes[2] :])

    def draw(self, seed: int) -> Data:
        """Return the labelled graphs of a seed: as many growing ones as with communities."""
        order = torch.randperm(len(self.pool) // 2, generator=torch.Generator().manual_seed(seed))[: LABELLED // 2]
        return Batch.from_data_list([self.pool[2 * i + k] for i in order.tolist() for k in (0, 1)])


@torch.no_grad()
def accuracy(model: nn.Module, data: Data) -> float:
    """Return the accuracy over nodes in percent."""
    return 100 * float((model.eval()(data).argmax(1) == data.y).float().mean())


def fit(model: nn.Module, batch: Callable[[], Data], lr: float, steps: int) -> None:
    """Train the parameters that are trainable; the loss of a StructLoRA model has its auxiliary part."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    auxiliary = getattr(model, "auxiliary_loss", None)
    model.train()
    for _ in range(steps):
        data = batch()
        loss = F.cross_entropy(model(data), data.y)
        if auxiliary is not None:
            loss = loss + auxiliary()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


def pretrained(kind: str, world: World, steps: int) -> Net:
    """Return a network that has learned to count triangles."""
    torch.manual_seed(0)
    model, generator = Net(kind), torch.Generator().manual_seed(0)

    def batch() -> Data:
        chosen = torch.randint(len(world.source), (16,), generator=generator).tolist()
        return Batch.from_data_list([world.source[i] for i in chosen])

    fit(model, batch, 3e-3, steps)
    return model.eval()


def adapted(name: str, base: Net, seed: int, steps: int) -> nn.Module:
    """Return a copy of the base with a new head, made ready for a system."""
    torch.manual_seed(seed)
    model = copy.deepcopy(base)
    model.head = pyg_nn.Linear(WIDTH, CLASSES)
    lora = {"r": RANK, "lora_alpha": 2 * RANK, "target_modules": TARGETS[base.kind], "modules_to_save": ["head"]}
    if name == "LoRA (stock PEFT)":
        return get_peft_model(model, LoraConfig(**lora))
    if name in OURS:
        own = {
            "seed": seed,
            "filter": STRONG_GATES,
            "schedule": {"warmup_steps": steps // 10, "ramp_steps": 2 * steps // 5},
        }
        options = {**lora, **own, **OURS[name]}
        options["graph"] = {"refresh_every": max(1, steps // 4), **options.get("graph", {})}
        return get_structlora_model(model, StructLoraConfig(**options))
    if name == "head alone":
        model.requires_grad_(False).head.requires_grad_(True)
    return model


def run(name: str, base: Net, world: World, seed: int, lr: float, steps: int) -> dict[str, float]:
    """Return validation and test accuracy, trainable numbers that are kept, and seconds of one run."""
    model, data = adapted(name, base, seed, steps), world.draw(seed)
    begin = time.perf_counter()
    fit(model, lambda: data, lr, steps)
    seconds = time.perf_counter() - begin
    kept = sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and "graph_pass." not in n)
    parts = {"validation": accuracy(model, world.validation), "test": accuracy(model, world.test)}
    return {**parts, "trained": kept, "seconds": seconds}


def system(
    name: str, base: Net, world: World, seeds: int, tuned: int, steps: int, rates: tuple[float, ...] = GRID
) -> dict[str, Any]:
    """Return learning rate and test accuracies of one system."""
    trials = {lr: [run(name, base, world, seed, lr, steps) for seed in range(tuned)] for lr in rates}
    validation = {lr: mean_sd([r["validation"] for r in found])[0] for lr, found in trials.items()}
    lr = max(validation, key=validation.__getitem__)
    found = trials[lr] + [run(name, base, world, seed, lr, steps) for seed in range(tuned, seeds)]
    return {
        "lr": lr,
        "validation": {str(k): round(v, 3) for k, v in validation.items()},
        "test": [round(r["test"], 4) for r in found],
        "trained": found[0]["trained"],
        "seconds": round(sum(r["seconds"] for r in found) / len(found), 2),
    }


def table(content: dict[str, Any]) -> str:
    """Return the result as Markdown; p-values are Holm-corrected over the comparisons of all tables."""
    pairs = {
        (kind, name): compare(found["test"], systems["LoRA"]["test"])
        for kind, systems in content["systems"].items()
        for name, found in systems.items()
        if name != "LoRA" and found["test"] != systems["LoRA"]["test"]
    }
    corrected = dict(zip(pairs, holm([p.p_t for p in pairs.values()]), strict=True))
    lines = [f"`{content['command']}`: {content['seeds']} paired seeds, {content['steps']} steps."]
    for kind, systems in content["systems"].items():
        lines += [
            "",
            f"| {kind} | trained numbers | learning rate | test accuracy, % | against LoRA [95 % CI] | p (Holm) | |",
            "| --- | --- | --- | --- | --- | --- | --- |",
        ]
        for name, found in systems.items():
            mean, sd = mean_sd(found["test"])
            row = f"| {name} | {found['trained']:,} | {found['lr']:g} | {mean:.1f} ± {sd:.1f} |"
            p = pairs.get((kind, name))
            if p is None:
                row += " | | |" if name == "LoRA" else " the same numbers | | |"
            else:
                row += f" {p.difference:+.2f} [{p.low:+.2f}, {p.high:+.2f}] | {format_p(corrected[kind, name])} |"
                row += f" {judge(p, corrected[kind, name])} |"
            lines.append(row)
        if stock := systems.get("LoRA (stock PEFT)"):
            p = compare(systems["StructLoRA"]["test"], stock["test"])
            difference = f"{p.difference:+.2f} [{p.low:+.2f}, {p.high:+.2f}]"
            lines += ["", f"StructLoRA against stock PEFT: {difference}, {format_p(p.p_t)} without correction."]
        lines += ["", f"Before adaptation {kind} has {content['source'][kind]:.1f} % on new graphs of its own task."]
    return "\n".join(lines)


def write_table(result: Path, page: Path) -> None:
    """Put the table of a result between the two marks of a page."""
    text = page.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise SystemExit(f"{page} lacks the lines {BEGIN} and {END}; put them where the table belongs")
    inner = f"{BEGIN}\n{table(json.loads(result.read_text(encoding='utf-8')))}\n{END}"
    page.write_text(re.sub(f"{BEGIN}.*?{END}", lambda _: inner, text, flags=re.S), encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--tuning-seeds", type=int, default=3, help="seeds that choose the learning rate")
    parser.add_argument("--quick", action="store_true", help="two seeds, a few steps, a few graphs: does it run?")
    parser.add_argument("--json", type=Path, help="file to write the result to")
    parser.add_argument("--table", type=Path, nargs=2, metavar=("RESULT", "PAGE"), help="only write a table to a page")
    argv = sys.argv[1:] if argv is None else argv
    arguments = parser.parse_args(argv)
    if arguments.table:
        return write_table(*arguments.table)
    if not 1 <= arguments.tuning_seeds <= arguments.seeds or arguments.seeds < 2:
        parser.error("differences need --seeds >= 2, and --tuning-seeds between 1 and --seeds")
    torch.set_num_threads(1)
    seeds, tuned, rates = arguments.seeds, arguments.tuning_seeds, GRID
    sizes, before, steps = (600, 60, 60, 150), 500, 100
    if arguments.quick:
        seeds, tuned, rates, sizes, before, steps = 2, 1, GRID[-1:], (16, 8, 2, 2), 2, 3
    world = World(sizes)
    results: dict[str, dict[str, Any]] = {}
    source: dict[str, float] = {}
    for kind, names in SYSTEMS.items():
        base = pretrained(kind, world, before)
        source[kind] = accuracy(base, world.unseen)
        print(f"{kind}: {source[kind]:.1f} % of the source task", flush=True)
        results[kind] = {}
        for name in names:
            found = system(name, base, world, seeds, tuned, steps, rates)
            results[kind][name] = found
            print(f"  {name}: {mean_sd(found['test'])[0]:.2f} lr {found['lr']}, {found['validation']}", flush=True)
    packages = ("structlora-pyg", "torch", "torch-geometric", "peft")
    content = {
        "command": shlex.join(["python", "benchmarks/gnn.py", *argv]),
        "seeds": seeds,
        "tuning_seeds": tuned,
        "steps": steps,
        "grid": rates,
        "source": source,
        "systems": results,
        "versions": {name: metadata.version(name) for name in packages},
    }
    print("\n" + table(content))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
