"""Three other uses of the adapter graph, each against its controls, where examples are few.

    python benchmarks/tournament.py passages.txt --output benchmarks/results/tournament.json

**budget**: train at rank 16 with noise on the rank codes, close half of all directions at half of the steps by their
importance (the mean of ``|b . dL/db|``), go on; the importance as measured, averaged with that of neighbours in the
adapter graph, or of others. **generator**: all layers of a role share two sets of factors, mixed by a code a layer that
a graph convolution makes. **messages**: gradients of ``lora_A`` of the layers that read the residual stream, and of
``lora_B`` of those that write it, are averaged with those of neighbours, of readers in coordinates in which their
inputs are white. A Llama of 260 thousand parameters, text in blocks of 96 tokens, all linear layers. The learning rate
of a row is chosen on seeds that are not scored, from a grid that goes on until its best is not at an edge; rows that
differ in the graph alone share it.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from closing import loss_of, test_loss
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.func import functional_call

from structlora_pyg import StructLoraConfig, get_structlora_model
from structlora_pyg.study.config import DataConfig, ModelConfig
from structlora_pyg.study.tasks import Task, load_task

RATES = (0.0003, 0.001, 0.003)  # of the few blocks; of the many three times as much
TUNING = 1000  # the first seed of those that rates are chosen on
READERS, WRITERS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), ("o_proj", "down_proj")
Factors = dict[str, dict[int, Any]]  # by role and depth, modules that hold a weight


def neighbours(nodes: list[tuple[str, int]], how: str, seed: int) -> Tensor:
    """Return what averages a node (role, depth) with its neighbours in its role, with those of others, or nobody."""
    n = len(nodes)
    joined = torch.tensor([[a[0] == b[0] and abs(a[1] - b[1]) == 1 for b in nodes] for a in nodes]).float()
    if how == "shuffled":
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
        joined = joined[order][:, order]
    mean = joined / joined.sum(1, keepdim=True).clamp(min=1)
    return torch.eye(n) if how == "none" else 0.5 * torch.eye(n) + 0.5 * mean


def factors_of(model: nn.Module) -> tuple[Factors, Factors]:
    """Return lora_A and lora_B of every layer, by role and depth."""
    down, up = {}, {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            depth, role = int(name.split(".layers.")[1].split(".")[0]), name.rsplit(".", 1)[1]
            down.setdefault(role, {})[depth] = module.lora_A["default"]
            up.setdefault(role, {})[depth] = module.lora_B["default"]
    return down, up


def fit(
    task: Task, parameters: Iterable[Tensor], loss: Callable[[list[int]], Tensor], lr: float, steps: int, count: int,
    before: Callable[[], None] = lambda: None, after: Callable[[int], None] = lambda step: None,
) -> None:  # fmt: skip
    """Train; `before` sees the gradients of a step, `after` what it has made."""
    trained = list(parameters)
    optimizer = torch.optim.AdamW(trained, lr=lr)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    batch = min(8, count)
    for step in range(steps):
        if step % (count // batch) == 0:
            order = torch.randperm(count).tolist()
        at = step % (count // batch) * batch
        loss(order[at : at + batch]).backward()
        before()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        after(step)


def budget(task: Task, how: str, lr: float, seed: int, steps: int, count: int) -> float:
    """Return the test loss of rank 8 on average: from the start, or half of rank 16 kept `how`."""
    r = {"rank 8": 8}.get(how, 16)
    stages = {"filter": {"noise": 1.0}, "coordinator": {"conv": "none", "levels": "fixed"}, "graph": {"edges": "none"}}
    config = StructLoraConfig(r=r, lora_alpha=2 * r, target_modules="all-linear", alarms="off", **stages)  # type: ignore[arg-type]
    model = get_structlora_model(task.model, config).train()
    down, up = factors_of(model)
    nodes = [(role, depth) for role in up for depth in up[role]]
    worth, kept = torch.zeros(len(nodes), r), torch.ones(len(nodes), r)

    def before() -> None:
        weights = [up[role][depth].weight for role, depth in nodes]
        worth.add_(torch.stack([(w.detach() * w.grad).sum(0).abs() for w in weights]))

    def after(step: int) -> None:
        if step == steps // 2 and how not in ("rank 8", "rank 16"):
            score = worth
            if how == "random":
                score = torch.rand_like(worth)
            elif how.startswith("graph"):  # the mean of a node is taken with that of others; the order within it stays
                level = worth.mean(1, keepdim=True).log()
                mix = neighbours(nodes, "shuffled" if "shuffled" in how else "chain", seed)
                score = worth * (mix @ level - level).exp()
            if how == "alike in all layers":
                kept.copy_(score >= score.median(1, keepdim=True).values)
            else:
                kept.copy_(score > score.flatten().median())
        with torch.no_grad():
            for (role, depth), row in zip(nodes, kept, strict=True):
                down[role][depth].weight.mul_(row.unsqueeze(1))
                up[role][depth].weight.mul_(row)

    own = [p for p in model.parameters() if p.requires_grad]
    fit(task, own, partial(loss_of, task, model), lr, steps, count, before, after)
    return test_loss(task, model.eval())


def generator(task: Task, how: str, lr: float, seed: int, steps: int, count: int) -> float:
    """Return the test loss of LoRA of some rank, or of factors that all layers of a role share, mixed by codes."""
    r = int(how.split()[1]) if how.startswith("rank") else 8
    model = get_peft_model(
        task.model, LoraConfig(r=r, lora_alpha=2 * r, lora_dropout=0.2, target_modules="all-linear")
    ).train()
    if how.startswith("rank"):
        fit(task, [p for p in model.parameters() if p.requires_grad], partial(loss_of, task, model), lr, steps, count)
        return test_loss(task, model.eval())
    down, up = factors_of(model)
    names = {id(module): name for name, module in model.named_modules()}
    nodes = [(role, depth) for role in up for depth in up[role]]
    where = {node: i for i, node in enumerate(nodes)}
    mix = neighbours(nodes, "none" if how == "no edges" else how.split()[0], seed)
    codes = nn.Parameter(torch.randn(len(nodes), 4))
    weight = nn.Parameter(torch.randn(4, 4) / 2)
    shared = {
        role: [
            nn.Parameter(torch.randn(2, *down[role][0].weight.shape) * down[role][0].weight.std()),
            nn.Parameter(torch.zeros(2, *up[role][0].weight.shape)),
        ]
        for role in up
    }
    fixed = {node: down[node[0]][node[1]].weight.detach().clone() for node in nodes}

    def made() -> dict[str, Tensor]:
        code = codes if how == "random codes" else codes + torch.tanh(mix @ codes @ weight)
        found = {}
        for (role, depth), i in where.items():
            a, b = shared[role]
            moved = torch.einsum("k,kij->ij", code[i, :2], a)
            found[names[id(down[role][depth])] + ".weight"] = fixed[role, depth] + moved
            found[names[id(up[role][depth])] + ".weight"] = torch.einsum("k,kij->ij", code[i, 2:], b)
        return found

    def loss(blocks: list[int]) -> Tensor:
        batch = task.collate([task.train_set[i] for i in blocks])
        return functional_call(model, made(), (), dict(batch)).loss

    trained = [p for pair in shared.values() for p in pair] + ([] if how == "random codes" else [codes, weight])
    fit(task, trained, loss, lr, steps, count)
    with torch.no_grad():
        for name, value in made().items():
            model.get_parameter(name).copy_(value)
    return test_loss(task, model.eval())


def messages(task: Task, how: str, lr: float, seed: int, steps: int, count: int) -> float:
    """Return the test loss where gradients on the side of the residual stream are averaged over a graph."""
    config = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.2, target_modules="all-linear")
    model = get_peft_model(task.model, config).train()
    down, up = factors_of(model)
    white = "white" in how
    kind = "none" if "alone" in how or how == "LoRA" else "shuffled" if "shuffled" in how else "chain"
    groups = [[(role, depth) for role in roles for depth in down[role]] for roles in (READERS, WRITERS)]
    for role in down if how != "LoRA" else ():  # directions have to mean the same in all layers that are averaged
        for module in down[role].values():
            module.weight.data.copy_(down["q_proj" if role in READERS else role][0].weight.data)
    root: dict[tuple[str, int], Tensor] = {}
    if white:
        seen: dict[tuple[str, int], Tensor] = {}
        hooks = []
        for node in groups[0]:

            def look(module: nn.Module, args: tuple, node: tuple[str, int] = node) -> None:
                x = args[0].flatten(0, -2)
                seen[node] = x.T @ x / len(x)

            hooks.append(down[node[0]][node[1]].register_forward_pre_hook(look))
        with torch.no_grad():
            loss_of(task, model, [*range(min(count, 16))])
        for hook in hooks:
            hook.remove()
        for node, second in seen.items():
            value, vector = torch.linalg.eigh(second + 0.1 * second.diagonal().mean() * torch.eye(len(second)))
            root[node] = vector @ torch.diag(value.rsqrt()) @ vector.T * value.mean().sqrt()
    mixes = [neighbours(nodes, kind, seed) for nodes in groups]

    def before() -> None:
        for nodes, mix, side in zip(groups, mixes, (down, up), strict=True):
            grads = [side[role][depth].weight.grad for role, depth in nodes]
            moved = [g @ root[node] if node in root else g for node, g in zip(nodes, grads, strict=True)]
            shapes: dict[torch.Size, list[int]] = {}
            for i, g in enumerate(moved):
                shapes.setdefault(g.shape, []).append(i)
            for own in shapes.values():
                part = mix[own][:, own]
                stacked = torch.stack([moved[i] for i in own])
                mixed = torch.einsum("ij,jkl->ikl", part / part.sum(1, keepdim=True), stacked)
                for i, g in zip(own, mixed, strict=True):
                    grads[i].copy_(g @ root[nodes[i]] if nodes[i] in root else g)

    own = [p for p in model.parameters() if p.requires_grad]
    fit(task, own, partial(loss_of, task, model), lr, steps, count, before if how != "LoRA" else lambda: None)
    return test_loss(task, model.eval())


SHARED = ("chain edges", "no edges", "shuffled nodes", "random codes")
MIXED = ("white, alone", "white, chain", "white, shuffled", "chain", "shuffled")
KEPT = ("importance", "alike in all layers", "random", "graph", "graph, shuffled nodes")
# Controls share the rate of what they control, and differ from it in the graph alone.
ALIKE = {row: "white, alone" for row in MIXED[1:3]} | {"shuffled": "chain"} | {row: SHARED[0] for row in SHARED[1:3]}
ALIKE |= {row: KEPT[0] for row in KEPT[1:]}  # these from half of the steps on
# What is compared: rows, blocks of text, steps.
GAMES: dict[str, tuple[Callable[..., float], tuple[str, ...], int, int]] = {
    "generator": (generator, ("rank 1", "rank 2", "rank 8", *SHARED), 16, 48),
    "messages": (messages, ("LoRA", *MIXED), 16, 48),
    "budget": (budget, ("rank 8", "rank 16", *KEPT), 64, 120),
}


def wanted(first: Sequence[float], tuned: Mapping[float, float]) -> list[float]:
    """Return the rates to try: a grid, then one beyond the edge at which the best one lies."""
    if not tuned:
        return [*first]
    best = min(tuned, key=tuned.__getitem__)
    beyond = best / 3 if best == min(tuned) else best * 3 if best == max(tuned) else best
    return [float(f"{beyond:.1g}")]


def play(game: str, model: str, text: str, seeds: int, tuning: int, first: tuple[float, ...]) -> list[dict[str, Any]]:
    """Return a row of results for every competitor of a game, at the rate that was best on other seeds."""
    run, rows, count, steps = GAMES[game]
    found: list[dict[str, Any]] = []
    for how in rows:

        def score(lr: float, seed: int, how: str = how) -> float:
            scored = 160 if seed < TUNING else 48
            data = DataConfig(task="text", path=text, max_length=96, train_limit=count, eval_limit=scored)
            task = load_task(ModelConfig(path=model), data, seed)
            torch.manual_seed(seed)
            return run(task, how, lr, seed, steps, count)

        tuned: dict[float, float] = {}
        while how not in ALIKE and (rates := [lr for lr in wanted(first, tuned) if lr not in tuned]):
            tuned |= {lr: statistics.mean(score(lr, TUNING + s) for s in range(tuning)) for lr in rates}
        same = [row["lr"] for row in found if row["row"] == ALIKE.get(how)]
        best = same[0] if same else min(tuned, key=tuned.__getitem__)
        losses = [round(score(best, s), 4) for s in range(seeds)]
        found.append({"game": game, "row": how, "lr": best, "losses": losses})
        print(game, how, best, f"{statistics.mean(losses):.3f}", losses, flush=True)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text")
    parser.add_argument("--model", default="stories260k")
    parser.add_argument("--games", nargs="+", choices=GAMES, default=list(GAMES))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--tuning", type=int, default=2)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    results: list[dict[str, Any]] = []
    for game in options.games:
        rates = tuple(3 * lr for lr in RATES) if game == "budget" else RATES
        results += play(game, options.model, options.text, options.seeds, options.tuning, rates)
        if options.output:
            options.output.write_text(json.dumps(results, indent=1) + "\n")
