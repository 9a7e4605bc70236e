"""What makes the difference on the demo's digits? LoRA, StructLoRA, its parts, and ordinary dropout, 20 paired seeds.

    python benchmarks/digits.py --json benchmarks/results/digits.json

The task and protocol of ``structlora demo``: a small vision transformer pretrained on the digits 0-4 adapts to 5-9 from
ten examples a class. Every system chooses its learning rate from one grid on the validation pictures (first seeds),
then is tested once a seed. p-values are Holm-corrected over the comparisons of the table.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer

from structlora_pyg import StructLoraConfig, get_structlora_model
from structlora_pyg.study.demo.models import ALPHA, RANK, SLICES, STRONG_GATES, accuracy, logits_of, stock_lora, train
from structlora_pyg.study.demo.run import PER_CLASS
from structlora_pyg.study.stats import compare, format_p, holm, judge, mean_sd
from structlora_pyg.study.tasks.digits import Digits, pretrained_vit, with_new_head

OFF = {"filter": {"kind": "none"}, "coordinator": {"conv": "none"}, "graph": {"edges": "none"}}
SYSTEMS: dict[str, dict[str, Any] | None] = {
    "LoRA (stock PEFT)": None,
    "LoRA, dropout 0.2": {**OFF, "lora_dropout": 0.2},
    "LoRA, dropout 0.5": {**OFF, "lora_dropout": 0.5},
    "StructLoRA": {},
    "StructLoRA without coordinator": {"coordinator": {"conv": "none"}},
    "StructLoRA without filter": {"filter": {"kind": "none"}},
    "StructLoRA without edges": {"graph": {"edges": "none"}},
    "StructLoRA, dropout 0.5": {"lora_dropout": 0.5},
}
GRID = (0.005, 0.01, 0.02)
STEPS = 150


def run(name: str, base: VisionTransformer, digits: Digits, seed: int, lr: float) -> tuple[float, float]:
    """Return validation and test accuracy in percent of one run."""
    changes, model = SYSTEMS[name], with_new_head(base, seed)
    torch.manual_seed(seed)
    if changes is None:
        adapted = stock_lora(model)
    else:
        options: dict[str, Any] = {
            "r": RANK, "lora_alpha": ALPHA, "target_modules": ["qkv"], "fused_slices": list(SLICES),
            "modules_to_save": ["head"], "seed": seed,
            "filter": STRONG_GATES, "schedule": {"warmup_steps": STEPS // 10, "ramp_steps": 2 * STEPS // 5}, **changes,
        }  # fmt: skip
        options["graph"] = {"refresh_every": STEPS // 4, **changes.get("graph", {})}
        adapted = get_structlora_model(model, StructLoraConfig(**options))
    train(adapted, digits.draw(PER_CLASS, seed), lr, STEPS, seed, lambda: None)
    parts = (digits.validation, digits.test)
    return tuple(accuracy(logits_of(adapted, part), part.y) for part in parts)  # type: ignore[return-value]


def system(arguments: tuple[str, int, int]) -> tuple[str, dict[str, Any]]:
    """Return learning rate and test accuracies of one system."""
    name, seeds, tuned = arguments
    torch.set_num_threads(1)
    digits = Digits.load()
    base = pretrained_vit(digits)
    trials = {lr: [run(name, base, digits, seed, lr) for seed in range(tuned)] for lr in GRID}
    mean = {lr: sum(v for v, _ in found) / len(found) for lr, found in trials.items()}
    lr = max(mean, key=mean.__getitem__)
    found = trials[lr] + [run(name, base, digits, seed, lr) for seed in range(tuned, seeds)]
    return name, {"lr": lr, "validation": {str(k): round(v, 3) for k, v in mean.items()}, "test": [t for _, t in found]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--tuning-seeds", type=int, default=10, help="seeds that choose the learning rate")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--json", type=Path, help="file to write the result to")
    arguments = parser.parse_args()
    pretrained_vit(Digits.load())  # into the cache, once
    work = [(name, arguments.seeds, min(arguments.tuning_seeds, arguments.seeds)) for name in SYSTEMS]
    results = {}
    with multiprocessing.get_context("spawn").Pool(arguments.jobs) as pool:
        for name, found in pool.imap(system, work):
            print(f"{name}: lr {found['lr']}, validation {found['validation']}", flush=True)
            results[name] = found
    first, *others = results
    pairs = {name: compare(results[name]["test"], results[first]["test"]) for name in others}
    corrected = dict(zip(pairs, holm([p.p_t for p in pairs.values()]), strict=True))
    print("\n| system | learning rate | test accuracy, % | against LoRA [95 % CI] | p (Holm) | |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, found in results.items():
        mean, sd = mean_sd(found["test"])
        row = f"| {name} | {found['lr']} | {mean:.2f} ± {sd:.2f} |"
        if name in pairs:
            p = pairs[name]
            found["against_lora"] = {"difference": p.difference, "low": p.low, "high": p.high, "p": corrected[name]}
            row += f" {p.difference:+.2f} [{p.low:+.2f}, {p.high:+.2f}] | {format_p(corrected[name])} |"
            row += f" {judge(p, corrected[name])} |"
        else:
            row += " | | |"
        print(row)
    if arguments.json:
        packages = ("structlora-pyg", "torch", "torch-geometric", "peft", "timm", "scikit-learn")
        content = {"systems": results, "seeds": arguments.seeds, "steps": STEPS, "grid": GRID}
        content["versions"] = {name: metadata.version(name) for name in packages}
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
