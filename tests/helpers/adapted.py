"""Tiny models with adapters, trained for a few steps."""

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from helpers.tiny import ARCHITECTURES, Tiny, loss
from peft import LoraConfig, get_peft_model
from torch import nn

from structlora_pyg import StructLoraConfig, StructLoraModel, get_structlora_model

TINY = ARCHITECTURES["llama"]


# Every stage at work: gates that close, messages that change the updates, edges that gradients make.
ALL_STAGES = {
    "graph": {"edges": "hybrid"},
    "filter": {"kind": "hard_concrete", "noise": 0.0},
    "coordinator": {"lift": "tangent"},
}


def with_all_stages(options: dict, stages: dict = ALL_STAGES) -> dict:
    """Return options of a configuration over those of `stages`, section by section."""
    return {**options, **{name: {**section, **options.get(name, {})} for name, section in stages.items()}}


def full_config(**options) -> StructLoraConfig:
    """Return a configuration in which every stage is at work."""
    return StructLoraConfig(**with_all_stages(options))


CONVS = {"GCNConv": "hybrid", "GATConv": "hybrid", "SAGEConv": "depth_chain"}


def adapt(tiny: Tiny, conv: str = "GCNConv", dtype: torch.dtype = torch.float32, **changes) -> StructLoraModel:
    options = {
        "r": 2, "lora_alpha": 4, "target_modules": tiny.targets, "fused_slices": tiny.slices,
        "schedule": {"warmup_steps": 1, "ramp_steps": 2},
        "graph": {"refresh_every": 2, "edges": CONVS.get(conv, "hybrid")},
        "coordinator": {"conv": conv, "hidden_channels": 8}, **changes,
    }  # fmt: skip
    return get_structlora_model(tiny.model().to(dtype), full_config(**options))


def floats(batch: dict, dtype: torch.dtype) -> dict:
    return {k: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for k, v in batch.items()}


def descend(
    parameters: Iterable[nn.Parameter],
    value: Callable[[], torch.Tensor],
    steps: int = 3,
    lr: float = 1e-2,
    kind: type[torch.optim.Optimizer] = torch.optim.AdamW,
) -> None:
    """Take optimizer steps on a value."""
    optimizer = kind([p for p in parameters if p.requires_grad], lr=lr)
    for _ in range(steps):
        value().backward()
        optimizer.step()
        optimizer.zero_grad()


def train(model: StructLoraModel, batch: dict, steps: int = 3, lr: float = 1e-2) -> StructLoraModel:
    descend(model.train().parameters(), lambda: loss(model, batch), steps, lr)
    return model.eval()


PLAIN = {"filter": {"kind": "none"}, "coordinator": {"conv": "none"}, "graph": {"edges": "none"}}


def randomise(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.1)


def stock(folder: Path, **options):
    torch.manual_seed(0)
    options = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, **options}
    model = get_peft_model(TINY.model(), LoraConfig(**options))
    model.save_pretrained(str(folder))
    return model
