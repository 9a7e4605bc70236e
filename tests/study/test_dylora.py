"""DyLoRA: the ranks it draws, the prefix it trains, and the plain LoRA of every rank that comes out."""

from __future__ import annotations

import copy
import json
from collections import Counter

import pytest
import torch
from helpers.adapted import randomise
from helpers.tiny import ARCHITECTURES, logits, loss
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from structlora_pyg.study.methods.dylora import DyLora
from structlora_pyg.tuner.export import load_lora
from structlora_pyg.tuner.layers import CUSTOM_LAYERS

R, ALPHA = 4, 6


def plain(name: str = "llama", **options) -> PeftModel:
    tiny = ARCHITECTURES[name]
    config = LoraConfig(**{"r": R, "lora_alpha": ALPHA, "target_modules": tiny.targets, **options})
    if name == "pyg_transformer":
        config._register_custom_module(CUSTOM_LAYERS)
    model = get_peft_model(tiny.model(), config)
    model.auxiliary_loss = lambda: 0.0  # what `tiny.loss` adds
    randomise(model)
    return model


def one_layer(**options) -> tuple[PeftModel, DyLora, Tensor, Tensor]:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(7, 5, bias=False))
    nn.init.zeros_(base[0].weight)
    model = get_peft_model(base, LoraConfig(r=R, lora_alpha=ALPHA, target_modules=["0"], **options))
    randomise(model)
    layer = model.get_base_model()[0]
    return model, DyLora(model), layer.lora_A["default"].weight, layer.lora_B["default"].weight


def step(model: PeftModel, batch: dict) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    loss(model.train(), batch).backward()
    optimizer.step()
    optimizer.zero_grad()


def test_a_training_forward_is_the_lora_of_the_drawn_rank() -> None:
    model, dylora, A, B = one_layer()
    model.train()
    seen = set()
    for _ in range(20):
        got = model(torch.eye(7)).T
        b = dylora.drawn
        seen.add(b)
        torch.testing.assert_close(got, ALPHA / b * B[:, :b] @ A[:b])
    assert seen == {1, 2, 3, 4}


def test_with_rank_stabilised_scaling_it_is_alpha_over_the_root() -> None:
    model, dylora, A, B = one_layer(use_rslora=True)
    dylora.rank = 3
    torch.testing.assert_close(model.eval()(torch.eye(7)).T, ALPHA / 3**0.5 * B[:, :3] @ A[:3])


def test_ranks_are_uniform_one_per_forward_and_follow_the_seed() -> None:
    model, dylora, _, _ = one_layer()
    model.train()
    drawn = []
    for _ in range(800):
        model(torch.ones(1, 7))
        drawn.append(dylora.drawn)
    assert all(abs(count - 200) < 57 for count in Counter(drawn).values())  # 4.6 standard deviations
    assert len(Counter(drawn)) == R
    again, other, _, _ = one_layer()
    again.train()
    torch.manual_seed(99)
    for b in drawn[:50]:
        again(torch.ones(1, 7))
        assert other.drawn == b


def test_the_rank_is_one_for_all_layers_and_reaches_only_its_prefix() -> None:
    model = plain("roberta").train()
    dylora = DyLora(model)
    for _ in range(6):
        model.zero_grad()
        loss(model, ARCHITECTURES["roberta"].batch()).backward()
        for name, p in model.named_parameters():
            if "lora_" in name:
                directions = p.grad.abs().sum(1 if "lora_A" in name else 0)
                assert ((directions > 0) == (torch.arange(R) < dylora.drawn)).all()


@pytest.mark.parametrize("name", ["llama", "gpt2", "timm_vit", "pyg_transformer"])
@pytest.mark.parametrize("rank", [1, 3])
def test_export_and_merge_of_a_rank_have_the_forward_of_that_rank(name: str, rank: int, tmp_path) -> None:
    tiny = ARCHITECTURES[name]
    batch, model = tiny.batch(), plain(name)
    dylora = DyLora(model)
    step(model, batch)
    dylora.export(tmp_path, rank)
    with torch.no_grad():
        whole = logits(model.eval(), batch)
        dylora.rank = rank
        want = logits(model, batch)
        assert not torch.allclose(whole, want), "the rank changes nothing"
        load = load_lora if name == "pyg_transformer" else PeftModel.from_pretrained
        loaded = load(tiny.model(), str(tmp_path)).eval()
        torch.testing.assert_close(logits(loaded, batch), want)
        if name != "pyg_transformer":
            merged = copy.deepcopy(model).merge_and_unload()
            torch.testing.assert_close(logits(merged, batch), want, atol=1e-5, rtol=1e-4)
            model.merge_adapter(safe_merge=True)
            model.unmerge_adapter()
            torch.testing.assert_close(logits(model, batch), want, atol=1e-5, rtol=1e-4)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (written["peft_type"], written["r"], written["lora_alpha"]) == ("LORA", rank, ALPHA)


def test_evaluation_is_at_full_rank_by_default_and_equals_plain_lora_there(tmp_path) -> None:
    tiny = ARCHITECTURES["llama"]
    model, twin = plain().eval(), plain().eval()
    dylora = DyLora(model)
    assert dylora.rank == R
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        want = logits(twin, tiny.batch())
        torch.testing.assert_close(logits(model, tiny.batch()), want)
        loaded = PeftModel.from_pretrained(tiny.model(), str(tmp_path)).eval()
        torch.testing.assert_close(logits(loaded, tiny.batch()), want)
    assert dylora.draws == 0


def test_adapters_without_an_order_of_prefixes_are_refused_and_left_alone() -> None:
    with pytest.raises(ValueError, match=r"one rank r >= 2 for all layers, got \[1\]"):
        DyLora(plain(r=1))
    model = plain(rank_pattern={"model.layers.0.self_attn.q_proj": 2})
    with pytest.raises(ValueError, match=r"got \[2, 4\]"):
        DyLora(model)
    assert not any(m.lora_variant for m in model.modules() if isinstance(m, LoraLayer))
    assert not model.get_base_model()._forward_pre_hooks


def test_ranks_out_of_range_and_broken_adapters_are_not_exported(tmp_path) -> None:
    _, dylora, A, _ = one_layer()
    for rank in (0, R + 1, -1):
        with pytest.raises(ValueError, match=rf"rank must be in \[1, {R}\], got {rank}"):
            dylora.export(tmp_path, rank)
    with torch.no_grad():
        A[0, 0] = float("nan")
    with pytest.raises(ValueError, match="is not finite"):
        dylora.export(tmp_path)
    assert not any(tmp_path.iterdir())
