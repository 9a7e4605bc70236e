"""The two models of the demo, stock PEFT's LoRA and StructLoRA from the same start, and the loop that trains either.

The baseline has no code of this package in it. timm holds q, k and v in one layer, so rank 4 on q and rank 4 on v is
one LoRA of rank 8 on ``qkv`` whose ``lora_B`` is zero outside two blocks; a gradient mask keeps it there. Both methods
therefore train the same numbers of the same matrices, and only filter and graph tell them apart. (A LoRA of rank 4 on
the whole ``qkv`` layer has as many numbers, but it adapts k as well and shares one ``lora_A``: another capacity, so
another comparison.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from structlora_pyg.config import StructLoraConfig
from structlora_pyg.stage_config import FilterConfig, GraphConfig, ScheduleConfig
from structlora_pyg.study.tasks.digits import Images, with_new_head
from structlora_pyg.tuner.model import StructLoraModel, get_structlora_model
from structlora_pyg.tuner.optim import parameter_groups

RANK, ALPHA, SLICES = 4, 8, ("q", "v")
STRONG_GATES: dict[str, Any] = {"beta": 1.0, "init_logit": 2.5}
BATCH, WEIGHT_DECAY, MAX_NORM, WARMUP_RATIO = 25, 0.01, 1.0, 0.06


def build(method: str, base: VisionTransformer, steps: int, seed: int) -> PeftModel:
    """Return the pretrained model with a new head and fresh adapters, the same start for both methods."""
    model = with_new_head(base, seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if method == "StructLoRA":
            return get_structlora_model(model, structlora_config(steps, seed))
        return stock_lora(model)


def structlora_config(steps: int, seed: int = 0) -> StructLoraConfig:
    """Return the library's defaults with strong gates, and the schedule's steps scaled to the length of the run.

    With ten examples a class the noise of the gates and their pull towards one half regularise.
    """
    return StructLoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=["qkv"],
        fused_slices=list(SLICES),
        modules_to_save=["head"],
        filter=FilterConfig(**STRONG_GATES),
        graph=GraphConfig(refresh_every=max(1, steps // 4)),
        schedule=ScheduleConfig(warmup_steps=steps // 10, ramp_steps=2 * steps // 5),
        seed=seed,
    )


def stock_lora(model: VisionTransformer) -> PeftModel:
    """Return stock PEFT's LoRA of rank 4 on q and rank 4 on v of timm's fused layer; see above."""
    k = len(SLICES)
    config = LoraConfig(r=k * RANK, lora_alpha=k * ALPHA, target_modules=["qkv"], modules_to_save=["head"])
    lora = get_peft_model(model, config)
    assert isinstance(lora, PeftModel)
    for name, parameter in lora.named_parameters():
        if ".lora_B." in name:
            mask = torch.zeros_like(parameter)
            part = len(parameter) // 3
            for i, key in enumerate(SLICES):
                rows = slice("qkv".index(key) * part, ("qkv".index(key) + 1) * part)
                mask[rows, i * RANK : (i + 1) * RANK] = 1.0
            parameter.register_hook(mask.mul)
    return lora


def train(
    model: PeftModel,
    examples: Images,
    lr: float,
    steps: int,
    seed: int,
    on_step: Callable[[], Any],
    every: int = 0,
    at: Callable[[int, float], None] | None = None,
) -> None:
    """Train a model; the loop any PyTorch user would write.

    Args:
        model: Stock PEFT model or StructLoRA model.
        examples: Training examples.
        lr: Peak learning rate: linear rise, then linear fall to 0.
        steps: Optimizer steps.
        seed: Seed of the order of the data.
        on_step: Called after every step.
        every: Call `at` after so many steps; 0: never.
        at: Called with the step and the mean task loss since the last call.
    """
    optimizer = torch.optim.AdamW(parameter_groups(model, lr, WEIGHT_DECAY))
    rise = max(1, round(WARMUP_RATIO * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: (i + 1) / rise if i < rise else (steps - i) / (steps - rise)
    )
    generator = torch.Generator().manual_seed(seed)
    order = torch.cat([torch.randperm(len(examples), generator=generator) for _ in range(steps)])
    trainable = [p for p in model.parameters() if p.requires_grad]
    losses: list[float] = []
    model.train()
    for step in range(steps):
        batch = examples[order[step * BATCH : (step + 1) * BATCH]]
        optimizer.zero_grad()
        task = F.cross_entropy(model(batch.x), batch.y)
        loss = task + model.auxiliary_loss(batch.y) if isinstance(model, StructLoraModel) else task
        loss.backward()
        nn.utils.clip_grad_norm_(trainable, MAX_NORM)
        optimizer.step()
        schedule.step()
        losses.append(float(task.detach()))
        on_step()
        if every and at is not None and ((step + 1) % every == 0 or step + 1 == steps):
            at(step + 1, sum(losses) / len(losses))
            losses = []
            model.train()
    model.eval()


@torch.no_grad()
def logits_of(model: nn.Module, images: Images) -> Tensor:
    """Return the logits (n, classes) in eval mode."""
    model.eval()
    return model(images.x)


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Return the share of right answers in percent."""
    return 100.0 * int((logits.argmax(1) == labels).sum()) / len(labels)
