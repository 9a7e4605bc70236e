"""How far does a message reach? The change of an update by a message as long as the update itself, by lift.

    python benchmarks/reach.py

A BERT of 6 layers and the given width with random weights, LoRA of rank 8 on query and value with a random lora_B, and
an untrained coordinator whose gain is 1. Printed: the norm of the change relative to that of the update, mean over the
12 adapters.
"""

import argparse

import torch
from transformers import BertConfig, BertModel

from structlora_pyg import StructLoraConfig, get_structlora_model

LIFTS = ("tangent", "project")


@torch.no_grad()
def reach(width: int, lift: str) -> float:
    """Return the mean relative change of an update."""
    torch.manual_seed(0)
    bert = BertConfig(
        hidden_size=width, num_hidden_layers=6, num_attention_heads=6, intermediate_size=64, vocab_size=50
    )
    config = StructLoraConfig(
        r=8, lora_alpha=16, target_modules=["query", "value"], filter={"kind": "none"},
        coordinator={"lift": lift}, schedule={"warmup_steps": 0},
    )  # fmt: skip
    graph_pass = get_structlora_model(BertModel(bert), config).graph_pass
    adapters = graph_pass.adapters
    pairs = [adapters.pair(adapter) for adapter in adapters]
    for _, b in pairs:
        b.normal_(0, 0.02)
    graph_pass.stages[-1].gain.fill_(10.0)
    _, lifted = graph_pass()
    changes = []
    for group, A, B in lifted:
        for i, a, b in zip(group, A, B, strict=True):
            before = pairs[i][1] @ pairs[i][0]
            changes.append(float((b @ a - before).norm() / before.norm()))
    return sum(changes) / len(changes)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=384)
    width = parser.parse_args().width
    print("| lift | change |\n| --- | --- |")
    for lift in LIFTS:
        print(f"| {lift} | {reach(width, lift):.1%} |")
