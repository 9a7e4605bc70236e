"""What does it cost to close directions after training? The test loss without those that matter least.

    python benchmarks/closing.py passages.txt --output benchmarks/results/closing.json

A Llama of 260 thousand parameters learns 64 blocks of text for 120 steps, with and without noise on the rank codes, all
linear layers, rank 8. The rise of the loss of 16 further blocks when a direction is taken away orders the directions;
those of the least rise are closed, or as many drawn at random, and the loss of 160 other blocks is measured.
"""

import argparse
import copy
import json
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from structlora_pyg import StructLoraConfig, get_structlora_model
from structlora_pyg.analysis.stages import close_directions, direction_importance
from structlora_pyg.study.config import DataConfig, ModelConfig
from structlora_pyg.study.tasks import Task, load_task

ROWS = {"LoRA": (0.0, 0.001), "noise 1.0": (1.0, 0.01)}  # level of the noise, learning rate
SHARES = (0.0, 0.1, 0.25, 0.5)


def trained(task: Task, noise: float, lr: float, seed: int, steps: int, count: int) -> torch.nn.Module:
    """Return the task's model with adapters trained on its first `count` blocks."""
    torch.manual_seed(seed)
    stages = {"filter": {"noise": noise}, "coordinator": {"conv": "none", "levels": "fixed"}}
    if not noise:
        stages = {"filter": {"kind": "none"}, "coordinator": {"conv": "none"}}
    config = StructLoraConfig(
        r=8, lora_alpha=16, target_modules="all-linear", graph={"edges": "none"}, alarms="off", **stages,
    )  # fmt: skip
    model = get_structlora_model(task.model, config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for step in range(steps):
        if step % (count // 8) == 0:
            order = torch.randperm(count).tolist()
        at = step % (count // 8) * 8
        loss_of(task, model, order[at : at + 8]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model.eval()


def loss_of(task: Task, model: torch.nn.Module, blocks: list[int], test: bool = False) -> Tensor:
    """Return the loss of blocks of the training set, or of the test set."""
    chosen = task.eval_set if test else task.train_set
    return task.loss(model, task.collate([chosen[i] for i in blocks]))


@torch.no_grad()
def test_loss(task: Task, model: torch.nn.Module) -> float:
    """Return the loss in nats a token on the test set."""
    blocks = [*range(len(task.eval_set))]
    losses = [float(loss_of(task, model, blocks[k : k + 16], test=True)) for k in range(0, len(blocks), 16)]
    return sum(losses) / len(losses)


def measure(model: str, text: str, seeds: int, steps: int = 120, count: int = 64, held: int = 16) -> list[dict]:
    """Return a row for every system, seed and share of closed directions."""
    found = []
    for seed in range(seeds):
        for name, (noise, lr) in ROWS.items():
            data = DataConfig(task="text", path=text, max_length=96, train_limit=count + held, eval_limit=160)
            task = load_task(ModelConfig(path=model), data, seed)
            adapted = trained(task, noise, lr, seed, steps, count)
            rise = direction_importance(adapted, partial(loss_of, task, adapted, [*range(count, count + held)])).removal
            kept = copy.deepcopy(adapted.state_dict())
            rows = [{"system": name, "seed": seed, "share": share} for share in SHARES]
            for how, worth in {"least": rise, "random": torch.rand(len(rise))}.items():
                for row in rows:
                    close_directions(adapted, worth, row["share"])
                    row[how] = test_loss(task, adapted)
                adapted.load_state_dict(kept)
            found += rows
            print(*rows, sep="\n", flush=True)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text")
    parser.add_argument("--model", default="stories260k")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    rows = measure(options.model, options.text, options.seeds)
    if options.output:
        options.output.write_text(json.dumps(rows, indent=1) + "\n")
