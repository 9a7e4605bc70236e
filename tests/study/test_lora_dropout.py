"""LoRA-Dropout: what its masks do to the update, its loss, its ensemble, and what is left after training."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from helpers.adapted import adapt, randomise
from helpers.tiny import ARCHITECTURES, logits
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from structlora_pyg.study.methods.dropout import LoraDropout
from structlora_pyg.tuner.layers import CUSTOM_LAYERS

D_IN, D_OUT = 12, 9


def one_layer(r: int = 4, **options) -> PeftModel:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(D_IN, D_OUT, bias=False))
    nn.init.zeros_(base[0].weight)  # the output is the update alone
    model = get_peft_model(base, LoraConfig(r=r, lora_alpha=8, target_modules=["0"], **options))
    randomise(model)
    return model.train()


def plain(name: str, **options) -> PeftModel:
    tiny = ARCHITECTURES[name]
    config = LoraConfig(r=3, lora_alpha=6, target_modules=tiny.targets, **options)
    if name == "pyg_transformer":
        config._register_custom_module(CUSTOM_LAYERS)
    model = get_peft_model(tiny.model(), config)
    randomise(model)
    return model.train()


def update(model: nn.Module) -> Tensor:
    """Return the dense update (d_out, d_in): the response of a one-layer model to every unit vector."""
    return model(torch.eye(D_IN)).T.detach()


def exact(model: PeftModel) -> Tensor:
    layer = model.get_base_model()[0]
    return (layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight).detach()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_whole_rows_and_columns_drop_out_for_all_tokens_and_the_rest_is_rescaled() -> None:
    model = one_layer()
    want = exact(model)
    LoraDropout(model, p=0.4, seed=1)
    got = update(model)
    rows, columns = (got != 0).any(1), (got != 0).any(0)
    assert 0 < rows.sum() < D_OUT
    assert 0 < columns.sum() < D_IN
    torch.testing.assert_close(got, want * rows[:, None] * columns / 0.6**2)


def test_the_rank_is_never_masked() -> None:
    model = one_layer(r=2)
    LoraDropout(model, p=0.3)
    assert all(torch.linalg.matrix_rank(update(model)) == 2 for _ in range(20))


def test_entries_drop_with_their_probability_and_the_expected_update_is_that_out_of_training() -> None:
    model = one_layer()
    full = exact(model)
    LoraDropout(model, p=0.3)
    samples = torch.stack([update(model) for _ in range(2000)])
    assert float((samples == 0).double().mean()) == pytest.approx(2 * 0.3 - 0.3**2, abs=0.02)
    error = (samples.mean(0) - full).abs() / (samples.std(0) / 2000**0.5)
    assert float(error.max()) < 4.5  # standard errors
    torch.testing.assert_close(update(model.eval()), full)


def test_masks_follow_the_seed_and_neither_read_nor_change_the_global_generator() -> None:
    runs = []
    for seed, noise in ((0, 1), (0, 2), (1, 1)):
        model = one_layer()
        dropout = LoraDropout(model, seed=seed)
        torch.manual_seed(noise)
        state = torch.get_rng_state()
        runs.append(torch.stack([update(model) for _ in range(3)]))
        assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    state = dropout.generator.get_state()  # all that a checkpoint has to keep
    want = update(model)
    dropout.generator.set_state(state)
    assert torch.equal(update(model), want)


@pytest.mark.parametrize("name", ["llama", "timm_vit", "gpt2", "roberta", "t5", "pyg_transformer"])
def test_every_architecture_is_masked_in_training_and_plain_in_evaluation(name: str) -> None:
    batch = ARCHITECTURES[name].batch()
    model = plain(name, task_type="CAUSAL_LM" if name == "llama" else None)
    with torch.no_grad():
        before = logits(model.eval(), batch)
        LoraDropout(model, p=0.5)
        torch.testing.assert_close(logits(model, batch), before, atol=1e-6, rtol=1e-5)
        model.train()
        assert not torch.allclose(logits(model, batch), logits(model, batch))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_backward_is_that_of_the_mean_over_mask_sets_also_under_gradient_checkpointing(checkpointing: bool) -> None:
    batch = ARCHITECTURES["llama"].batch()
    model, twin = plain("llama"), plain("llama")
    LoraDropout(twin)
    losses = [twin(**batch).loss for _ in range(4)]
    assert len({float(value.detach()) for value in losses}) == 4
    (sum(losses) / 4).backward()
    if checkpointing:
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    dropout = LoraDropout(model)
    for _ in range(2):
        model.zero_grad()
        dropout.generator.manual_seed(0)
        got = dropout.backward(lambda: model(**batch).loss)
    torch.testing.assert_close(got, sum(losses).detach() / 4)
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, gradients(twin)[name])
    calls: list[Tensor] = []
    dropout.backward(lambda: model(**batch).loss, backward=calls.append)
    assert len(calls) == 4


def test_recomputing_several_forwards_at_once_is_refused() -> None:
    batch, model = ARCHITECTURES["llama"].batch(), plain("llama")
    LoraDropout(model)
    for _ in range(3):  # without checkpointing this is fine
        (model(**batch).loss + model(**batch).loss).backward()
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    model(**batch).loss.backward()
    with pytest.raises(RuntimeError, match=r"after 2 training forwards.*Call backward after every forward"):
        (model(**batch).loss + model(**batch).loss).backward()


def test_the_ensemble_averages_masked_outputs_and_is_the_same_every_time() -> None:
    batch, model = ARCHITECTURES["llama"].batch(), plain("llama")
    dropout = LoraDropout(model, p=0.4, samples=5)
    seen: list[Tensor] = []

    def closure() -> Tensor:
        seen.append(model(**batch).logits)
        return seen[-1]

    with pytest.raises(RuntimeError, match=r"call model\.eval\(\)"):
        dropout.ensemble(closure)
    model.eval()
    got = dropout.ensemble(closure)
    assert len({float(output.sum()) for output in seen}) == 5
    torch.testing.assert_close(got, torch.stack(seen).mean(0))
    assert torch.equal(dropout.ensemble(closure), got)
    assert not torch.allclose(got, model(**batch).logits)
    assert not got.requires_grad


def test_evaluation_does_not_change_the_masks_of_training() -> None:
    runs = []
    for evaluate in (False, True):
        model = one_layer()
        dropout = LoraDropout(model)
        update(model)
        if evaluate:
            model.eval()
            dropout.ensemble(lambda m=model: m(torch.eye(D_IN)))
            model.train()
        runs.append(update(model))
    assert torch.equal(*runs)


def test_a_saved_folder_is_a_plain_lora_with_the_forward_of_evaluation(tmp_path) -> None:
    tiny = ARCHITECTURES["llama"]
    batch = tiny.batch()
    model = plain("llama", alpha_pattern={"model.layers.0.self_attn.q_proj": 12})
    keys = list(model.state_dict())
    dropout = LoraDropout(model, p=0.3)
    assert list(model.state_dict()) == keys
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-2)
    losses = []
    for _ in range(15):
        losses.append(float(dropout.backward(lambda: model(**batch).loss)))
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.1
    model.eval().save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (written["peft_type"], written["lora_alpha"]) == ("LORA", 6)
    with torch.no_grad():
        want = logits(model, batch)
        loaded = PeftModel.from_pretrained(tiny.model(), str(tmp_path)).eval()
        torch.testing.assert_close(logits(loaded, batch), want)
        merged = copy.deepcopy(model).merge_and_unload(safe_merge=True)
        torch.testing.assert_close(logits(merged, batch), want, atol=1e-5, rtol=1e-4)


def test_it_masks_coordinated_factors_of_structlora() -> None:
    tiny = ARCHITECTURES["llama"]
    batch = tiny.batch()
    model = adapt(tiny, coordinator={"conv": "none"}, filter={"kind": "none"}, graph={"edges": "none"})
    randomise(model)
    with torch.no_grad():
        before = logits(model.eval(), batch)
        LoraDropout(model, p=0.5)
        torch.testing.assert_close(logits(model, batch), before, atol=1e-6, rtol=1e-5)
        model.train()
        assert not torch.allclose(logits(model, batch), logits(model, batch))
    model(**batch).loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "lora_" in n)
    with torch.no_grad():
        merged = model.eval().merge_and_unload()
        torch.testing.assert_close(logits(merged, batch), before, atol=1e-5, rtol=1e-4)


def test_values_and_adapters_that_do_not_fit_are_refused() -> None:
    for p in (0, 1, -0.1, float("nan")):
        with pytest.raises(ValueError, match=r"p must be in \(0, 1\)"):
            LoraDropout(one_layer(), p=p)
    with pytest.raises(ValueError, match="samples must be >= 1"):
        LoraDropout(one_layer(), samples=0)
    with pytest.raises(ValueError, match="needs a LoRA adapter 'other'; adapters: "):
        LoraDropout(one_layer(), adapter_name="other")
    with pytest.raises(ValueError, match="has the variant DoraLinearVariant"):
        LoraDropout(plain("llama", use_dora=True))
    with pytest.raises(ValueError, match="lora_bias"):
        LoraDropout(plain("roberta", lora_bias=True))
    adalora = AdaLoraConfig(target_modules=["0"], total_step=9)
    with pytest.raises(ValueError, match="'default': 'ADALORA'"):
        LoraDropout(get_peft_model(nn.Sequential(nn.Linear(4, 4)), adalora))
    model = one_layer()
    LoraDropout(model)
    with pytest.raises(ValueError, match="has the variant LoraDropout already"):
        LoraDropout(model)
    model = one_layer()
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        LoraDropout(model)


def test_wrong_use_is_refused_with_the_fix() -> None:
    model = one_layer()
    dropout = LoraDropout(model)
    with pytest.raises(RuntimeError, match="outside of the model's forward"):
        model.get_base_model()[0](torch.ones(1, D_IN))
    model.eval()
    with pytest.raises(RuntimeError, match=r"call model\.train\(\)"):
        dropout.backward(lambda: model(torch.ones(1, D_IN)).sum())
    with pytest.raises(RuntimeError, match="once"):
        dropout.ensemble(lambda: (_ for _ in ()).throw(RuntimeError("once")))
    torch.testing.assert_close(update(model), exact(model), msg="an error has left the masks on")
