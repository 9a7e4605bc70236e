"""Training steps of StructLoRA against stock PEFT, measured side by side in one process.

    python benchmarks/speed.py
    python benchmarks/speed.py --targets all-linear --tokens 1024 --json benchmarks/results/speed.json

Systems take turns on equal work, step by step; a figure is the median over rounds of the ratio to PEFT's LoRA in the
same round, with the quartiles beside it. On a CPU only ratios mean anything; the device's name is in the output.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

from structlora_pyg import StructLoraConfig, get_structlora_model

PLAIN = {"filter": {"kind": "none"}, "coordinator": {"conv": "none"}, "graph": {"edges": "none"}}
CONVS = ("GCNConv", "GATv2Conv", "TransformerConv")


def systems(arguments: argparse.Namespace) -> dict[str, nn.Module]:
    """Return the models to compare, all from one seed."""
    targets = arguments.targets if arguments.targets == "all-linear" else arguments.targets.split(",")
    adapter = {"r": arguments.r, "lora_alpha": 2 * arguments.r, "target_modules": targets}
    active = {"schedule": {"warmup_steps": 0}}

    def base() -> LlamaModel:
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=arguments.width,
            intermediate_size=arguments.width * 8 // 3,
            num_hidden_layers=arguments.layers,
            num_attention_heads=max(arguments.width // 64, 1),
            vocab_size=256,
            max_position_embeddings=arguments.tokens,
        )
        return LlamaModel(config).to(arguments.device, getattr(torch, arguments.dtype))

    def frozen() -> nn.Module:
        model = base().requires_grad_(False)
        model.embed_tokens.weight.requires_grad_(True)  # so that a gradient runs through all layers, as with adapters
        return model

    made = {
        "frozen base": frozen(),
        "PEFT LoRA": get_peft_model(base(), LoraConfig(**adapter)),
        "PEFT DoRA": get_peft_model(base(), LoraConfig(use_dora=True, **adapter)),
        "fused LoRA": get_structlora_model(base(), StructLoraConfig(**adapter, **PLAIN)),
    }
    for conv in CONVS:
        config = StructLoraConfig(**adapter, **active, coordinator={"conv": conv})
        made[f"StructLoRA {conv}"] = get_structlora_model(base(), config)
    return made


def stepper(model: nn.Module, tokens: Tensor, extra: bool) -> Callable[[], float]:
    """Return a function that takes one optimizer step and returns its seconds."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    cuda = tokens.is_cuda

    def step() -> float:
        if cuda:
            torch.cuda.synchronize()
        began = time.perf_counter()
        loss = model(input_ids=tokens).last_hidden_state.float().square().mean()
        loss = loss + model.auxiliary_loss() if extra else loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - began

    return step


def measure(arguments: argparse.Namespace) -> dict:
    """Return ratios to PEFT's LoRA and the share of the graph pass."""
    models = systems(arguments)
    tokens = torch.randint(0, 256, (arguments.batch, arguments.tokens), device=arguments.device)
    steps = {name: stepper(m, tokens, hasattr(m, "coordination")) for name, m in models.items()}
    rounds: list[dict[str, float]] = []
    for k in range(arguments.rounds + 2):
        taken = {name: step() for name, step in steps.items()}
        rounds += [taken] if k > 1 else []
    reference = statistics.median(r["PEFT LoRA"] for r in rounds)
    result = {}
    for name in models:
        ratios = sorted(r[name] / r["PEFT LoRA"] for r in rounds)
        low, middle, high = statistics.quantiles(ratios, n=4)
        result[name] = {"ratio": round(middle, 4), "quartiles": [round(low, 4), round(high, 4)]}
        if hasattr(models[name], "coordination"):
            began = time.perf_counter()
            for _ in range(10):
                models[name].coordination.coordinate()
            share = (time.perf_counter() - began) / 10 / reference
            result[name]["graph_pass_forward_share"] = round(share, 5)
    cuda = arguments.device.startswith("cuda")
    return {
        "settings": vars(arguments),
        "device": torch.cuda.get_device_name()
        if cuda
        else f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "systems": result,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=512, help="tokens a sequence")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--targets", default="q_proj,v_proj", help="comma-separated names, or all-linear")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="file to write the result to")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    result = measure(arguments)
    result["settings"]["json"] = None if arguments.json is None else str(arguments.json)
    width = max(len(name) for name in result["systems"])
    print(f"{result['device']}; training step, ratio to PEFT LoRA: median [quartiles]")
    for name, row in result["systems"].items():
        share = row.get("graph_pass_forward_share")
        note = "" if share is None else f"   graph pass (forward) {100 * share:.2f} % of a step"
        print(f"{name:<{width}}  {row['ratio']:.3f} [{row['quartiles'][0]:.3f}, {row['quartiles'][1]:.3f}]{note}")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
