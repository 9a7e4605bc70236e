"""DyLoRA: the ranks it draws, the prefix it trains, and the plain LoRA of every rank that comes out."""

from __future__ import annotations

import copy
import json
from collections import Counter

import pytest
import torch
from helpers.adapted import adapt, randomise
from helpers.tiny import ARCHITECTURES, logits, loss
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from structlora_pyg.study.methods.dylora import DyLora
from structlora_pyg.tuner.layers import CUSTOM_LAYERS
from structlora_pyg.tuner.model import load_lora

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


def one_layer(frozen: bool = False, **options) -> tuple[PeftModel, DyLora, Tensor, Tensor]:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(7, 5, bias=False))
    nn.init.zeros_(base[0].weight)
    model = get_peft_model(base, LoraConfig(r=R, lora_alpha=ALPHA, target_modules=["0"], **options))
    randomise(model)
    layer = model.get_base_model()[0]
    return model, DyLora(model, frozen), layer.lora_A["default"].weight, layer.lora_B["default"].weight


def step(model: PeftModel, batch: dict, optimizer: torch.optim.Optimizer) -> None:
    loss(model, batch).backward()
    optimizer.step()
    optimizer.zero_grad()


# -- training ---------------------------------------------------------------------------------------------------------


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


def test_ranks_are_uniform_one_a_forward_and_follow_the_seed() -> None:
    model, dylora, _, _ = one_layer()
    model.train()
    drawn = []
    for _ in range(2000):
        model(torch.ones(1, 7))
        drawn.append(dylora.drawn)
    assert all(abs(count - 500) < 90 for count in Counter(drawn).values())  # 4.6 standard deviations
    assert len(Counter(drawn)) == R
    again, other, _, _ = one_layer()
    again.train()
    torch.manual_seed(99)
    for b in drawn[:50]:
        again(torch.ones(1, 7))
        assert other.drawn == b


def test_the_rank_is_one_for_all_layers() -> None:
    model = plain("roberta").train()
    dylora = DyLora(model)
    batch = ARCHITECTURES["roberta"].batch()
    for _ in range(6):
        model.zero_grad()
        loss(model, batch).backward()
        for name, p in model.named_parameters():
            if "lora_" in name:
                directions = p.grad.abs().sum(1 if "lora_A" in name else 0)
                assert int((directions > 0).sum()) == dylora.drawn
                assert bool((directions[: dylora.drawn] > 0).all())


def test_the_frozen_variant_trains_only_the_last_direction_of_the_prefix() -> None:
    model, dylora, A, B = one_layer(frozen=True)
    model.train()
    for _ in range(12):
        model.zero_grad()
        got = model(torch.eye(7)).T
        b = dylora.drawn
        torch.testing.assert_close(got, ALPHA / b * B[:, :b] @ A[:b])
        got.square().sum().backward()
        only = torch.arange(R) == b - 1
        assert torch.equal(A.grad.abs().sum(1) > 0, only)
        assert torch.equal(B.grad.abs().sum(0) > 0, only)


def test_gradient_checkpointing_recomputes_with_the_same_rank() -> None:
    batch = ARCHITECTURES["llama"].batch()
    grads = []
    for checkpointing in (False, True):
        model = plain().train()
        if checkpointing:
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
        DyLora(model, seed=3)
        for _ in range(3):
            model.zero_grad()
            loss(model, batch).backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad)


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_an_ordinary_loop_trains_and_every_prefix_learns(task_type) -> None:
    batch = ARCHITECTURES["llama"].batch()
    model = plain(task_type=task_type)
    dylora = DyLora(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)

    def losses() -> list[float]:
        model.eval()
        values = []
        for b in range(1, R + 1):
            dylora.rank = b
            with torch.no_grad():
                values.append(float(model(**batch).loss))
        return values

    before = losses()
    model.train()
    for _ in range(25):
        step(model, batch, optimizer)
    assert dylora.draws == 25
    assert all(after < start - 0.1 for after, start in zip(losses(), before, strict=True))


# -- evaluation and export --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "timm_vit", "pyg_transformer"])
@pytest.mark.parametrize("rank", [1, 3])
def test_the_export_of_a_rank_is_a_plain_lora_with_the_forward_of_that_rank(name: str, rank: int, tmp_path) -> None:
    tiny = ARCHITECTURES[name]
    batch = tiny.batch()
    model = plain(name)
    dylora = DyLora(model)
    model.train()
    step(model, batch, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2))
    dylora.export(tmp_path, rank)
    dylora.rank = rank
    with torch.no_grad():
        want = logits(model.eval(), batch)
        dylora.rank = R
        assert not torch.allclose(logits(model, batch), want), "the rank changes nothing"
        load = load_lora if name == "pyg_transformer" else PeftModel.from_pretrained
        loaded = load(tiny.model(), str(tmp_path)).eval()
        torch.testing.assert_close(logits(loaded, batch), want)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (written["peft_type"], written["r"], written["lora_alpha"]) == ("LORA", rank, ALPHA)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_merging_and_unmerging_use_the_chosen_rank(name: str) -> None:
    batch = ARCHITECTURES[name].batch()
    model = plain(name).eval()
    dylora = DyLora(model)
    dylora.rank = 2
    with torch.no_grad():
        want = logits(model, batch)
        merged = copy.deepcopy(model).merge_and_unload()
        torch.testing.assert_close(logits(merged, batch), want, atol=1e-5, rtol=1e-4)
        model.merge_adapter(safe_merge=True)
        torch.testing.assert_close(logits(model, batch), want, atol=1e-5, rtol=1e-4)
        model.unmerge_adapter()
        torch.testing.assert_close(logits(model, batch), want, atol=1e-5, rtol=1e-4)


def test_evaluation_is_at_full_rank_by_default_and_equals_plain_lora_there(tmp_path) -> None:
    tiny = ARCHITECTURES["llama"]
    model, twin = plain().eval(), plain().eval()
    dylora = DyLora(model)
    assert dylora.rank == R
    with torch.no_grad():
        torch.testing.assert_close(logits(model, tiny.batch()), logits(twin, tiny.batch()))
    assert dylora.draws == 0
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        loaded = PeftModel.from_pretrained(tiny.model(), str(tmp_path)).eval()
        torch.testing.assert_close(logits(loaded, tiny.batch()), logits(twin, tiny.batch()))
    dylora.rank = 1
    dylora.remove()
    with torch.no_grad():
        torch.testing.assert_close(logits(model.train(), tiny.batch()), logits(twin, tiny.batch()))


def test_trained_heads_travel_with_the_export(tmp_path) -> None:
    tiny = ARCHITECTURES["roberta"]
    batch = tiny.batch()
    model = plain("roberta", modules_to_save=["classifier"]).train()
    dylora = DyLora(model)
    step(model, batch, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2))
    dylora.rank = 2
    dylora.export(tmp_path)
    with torch.no_grad():
        loaded = PeftModel.from_pretrained(tiny.model(), str(tmp_path)).eval()
        torch.testing.assert_close(logits(loaded, batch), logits(model.eval(), batch))


# -- the worst inputs -------------------------------------------------------------------------------------------------


def test_adapters_without_an_order_of_prefixes_are_refused_and_left_alone() -> None:
    with pytest.raises(ValueError, match=r"one rank r >= 2 for all layers, got \[1\]"):
        DyLora(plain(r=1))
    model = plain(rank_pattern={"model.layers.0.self_attn.q_proj": 2})
    with pytest.raises(ValueError, match=r"got \[2, 4\]"):
        DyLora(model)
    assert not any(m.lora_variant for m in model.modules() if isinstance(m, LoraLayer))
    assert not model.get_base_model()._forward_pre_hooks
    with pytest.raises(ValueError, match="not coordinated ones"):
        DyLora(adapt(ARCHITECTURES["llama"]))
    with pytest.raises(ValueError, match="DoraLinearVariant"):
        DyLora(plain(use_dora=True))


@pytest.mark.parametrize("rank", [0, R + 1, -1])
def test_ranks_out_of_range_are_refused(rank: int, tmp_path) -> None:
    model, dylora, _, _ = one_layer()
    with pytest.raises(ValueError, match=rf"rank must be in \[1, {R}\], got {rank}"):
        dylora.rank = rank
    model.train()(torch.ones(1, 7))
    with pytest.raises(ValueError, match="rank must be in"):
        dylora.export(tmp_path, rank)


def test_untrained_and_broken_adapters_are_not_exported(tmp_path) -> None:
    model, dylora, A, _ = one_layer()
    with pytest.raises(RuntimeError, match="never ran in training mode"):
        dylora.export(tmp_path)
    model.train()(torch.ones(1, 7))
    with torch.no_grad():
        A[0, 0] = float("nan")
    with pytest.raises(ValueError, match="is not finite"):
        dylora.export(tmp_path)
    assert not any(tmp_path.iterdir())
