"""Comparison methods that PEFT has: they do what their papers say, alone and under StructLoRA."""

from __future__ import annotations

import pytest
import torch
from helpers.adapted import adapt
from helpers.tiny import ARCHITECTURES, logits
from peft import LoraConfig, PeftModel, get_peft_model
from peft.optimizers import create_lorafa_optimizer
from peft.tuners.lora import LoraLayer

TINY = ARCHITECTURES["llama"]


def stock(**options) -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(TINY.model(), LoraConfig(r=2, lora_alpha=4, target_modules=TINY.targets, **options))


def train(model, optimizer, steps: int = 15) -> list[float]:
    model.train()
    losses = []
    for _ in range(steps):
        loss = model(**TINY.batch()).loss
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return losses


def state(model, *kinds: str) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if any(kind in n for kind in kinds)}


def adamw(model) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)


@pytest.mark.parametrize("coordinated", [False, True], ids=["stock", "structlora"])
def test_dora_moves_the_magnitude_and_merged_rows_have_that_norm(coordinated: bool) -> None:
    model = adapt(TINY, use_dora=True) if coordinated else stock(use_dora=True)
    before = state(model, "magnitude")
    train(model, adamw(model))
    after = state(model, "magnitude")
    assert before
    assert all(not torch.allclose(after[n], before[n], atol=1e-4) for n in before)
    layer = next(m for m in model.modules() if isinstance(m, LoraLayer))
    magnitude = layer.lora_magnitude_vector["default"].weight.detach().clone()
    with torch.no_grad():
        merged = model.merge_and_unload()
    norms = merged.model.layers[0].self_attn.q_proj.weight.norm(dim=1)
    torch.testing.assert_close(norms, magnitude.abs())  # every output row has the norm that was learned


@pytest.mark.parametrize("coordinated", [False, True], ids=["stock", "structlora"])
def test_lora_fa_trains_b_and_leaves_a_where_it_was(coordinated: bool, tmp_path) -> None:
    model = adapt(TINY) if coordinated else stock()
    optimizer = create_lorafa_optimizer(model, r=2, lora_alpha=4, lr=5e-2)
    a, b = state(model, "lora_A"), state(model, "lora_B")
    own = state(model, "graph_passes.")
    losses = train(model, optimizer)
    assert losses[-1] < losses[0] - 0.05
    assert all(torch.equal(p, a[n]) for n, p in state(model, "lora_A").items())
    assert all(not torch.equal(p, b[n]) for n, p in state(model, "lora_B").items())
    assert not any(p.requires_grad for n, p in model.named_parameters() if "lora_A" in n)
    if coordinated:
        assert model.graph_pass.step == 14  # 15 steps, the last not yet followed by a forward
        moved = [n for n, p in state(model, "graph_passes.").items() if not torch.equal(p, own[n])]
        assert any("gate" in n for n in moved), "the filter is not trained"
        model.export(tmp_path)
    else:
        model.save_pretrained(tmp_path)
    with torch.no_grad():
        loaded = PeftModel.from_pretrained(TINY.model(), str(tmp_path)).eval()
        torch.testing.assert_close(logits(loaded, TINY.batch()), logits(model, TINY.batch()), atol=1e-5, rtol=1e-4)
