"""LoRA-Dropout and DyLoRA: what they draw, what a training forward then is, and what is left after training."""

import copy
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.adapted import randomise
from helpers.tiny import ARCHITECTURES, logits
from peft import PeftModel
from torch import Tensor, nn

from structlora_pyg import ConfigError, StructLoraConfig
from structlora_pyg.study.config import MethodConfig
from structlora_pyg.study.methods import make_method

D_IN, D_OUT, R, ALPHA = 12, 9, 4, 8


def adapted(name: str, base: nn.Module, targets: Any, options: dict[str, Any] | None = None, **adapter) -> Any:
    """Return a method on a base, its factors drawn at random, in training mode."""
    config = StructLoraConfig(**{"r": R, "lora_alpha": ALPHA, "target_modules": targets, **adapter})
    method = make_method(config, MethodConfig(name=name, **(options or {})), total_steps=9)
    method.adapt(base, lambda: None, lambda: None).train()
    randomise(method.model)
    return method


def one_layer(name: str, options: dict[str, Any] | None = None, **adapter) -> Any:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(D_IN, D_OUT, bias=False))
    nn.init.zeros_(base[0].weight)  # the output is the update alone
    return adapted(name, base, ["0"], options, **adapter)


def on(architecture: str, name: str, options: dict[str, Any] | None = None, **adapter) -> Any:
    tiny = ARCHITECTURES[architecture]
    return adapted(name, tiny.model(), tiny.targets, options, **adapter)


def update(method: Any) -> Tensor:
    """Return the dense update (d_out, d_in): the response of a one-layer model to every unit vector."""
    return method.model(torch.eye(D_IN)).T.detach()


def factors(method: Any) -> tuple[Tensor, Tensor]:
    (layer,) = method.layers.values()
    return layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()


def exact(method: Any) -> Tensor:
    A, B = factors(method)
    return ALPHA / R * B @ A


def gradients(method: Any) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in method.model.named_parameters() if p.grad is not None}


def train(method: Any, batch: dict, steps: int) -> None:
    optimizer = method.optimizer(3e-2, 0.0)
    method.model.train()
    for _ in range(steps):
        method.backward(lambda: method.model(**batch).loss, Tensor.backward)
        optimizer.step()
        optimizer.zero_grad()


def test_whole_rows_and_columns_drop_out_for_all_tokens_the_rest_is_rescaled_and_the_rank_stays() -> None:
    method = one_layer("lora_dropout", {"dropout": 0.4}, seed=1)
    want, got = exact(method), update(method)
    rows, columns = (got != 0).any(1), (got != 0).any(0)
    assert 0 < rows.sum() < D_OUT
    assert 0 < columns.sum() < D_IN
    torch.testing.assert_close(got, want * rows[:, None] * columns / 0.6**2)
    assert torch.linalg.matrix_rank(got) == R


def test_entries_drop_with_their_probability_and_the_expected_update_is_that_out_of_training() -> None:
    method = one_layer("lora_dropout", {"dropout": 0.3})
    samples = torch.stack([update(method) for _ in range(800)])
    assert float((samples == 0).double().mean()) == pytest.approx(2 * 0.3 - 0.3**2, abs=0.02)
    error = (samples.mean(0) - exact(method)).abs() / (samples.std(0) / 800**0.5)
    assert float(error.max()) < 4.5  # standard errors
    method.model.eval()
    torch.testing.assert_close(update(method), exact(method))


@pytest.mark.parametrize("name", ["lora_dropout", "dylora"])
def test_draws_follow_the_seed_and_neither_read_nor_change_the_global_generator(name: str) -> None:
    runs = []
    for seed, noise in ((0, 1), (0, 2), (1, 1)):
        method = one_layer(name, seed=seed)
        torch.manual_seed(noise)
        state = torch.get_rng_state()
        runs.append(torch.stack([update(method) for _ in range(6)]))
        assert torch.equal(torch.get_rng_state(), state)
        assert method.draws == 6
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("architecture", ["llama", "timm_vit", "gpt2", "roberta", "t5"])
def test_every_architecture_is_masked_in_training_and_plain_in_evaluation(architecture: str) -> None:
    batch = ARCHITECTURES[architecture].batch()
    method, plain = on(architecture, "lora_dropout", {"dropout": 0.5}), on(architecture, "lora")
    with torch.no_grad():
        want = logits(plain.model.eval(), batch)
        torch.testing.assert_close(logits(method.model.eval(), batch), want, atol=1e-6, rtol=1e-5)
        method.model.train()
        assert not torch.allclose(logits(method.model, batch), logits(method.model, batch))
        inputs = [str(keep_in) for keep_in, _ in method.masks.values()]
        assert len(set(inputs)) == len(inputs), "layers share a mask"


@pytest.mark.parametrize("checkpointing", [False, True])
def test_backward_is_that_of_the_mean_over_mask_sets_also_under_gradient_checkpointing(checkpointing: bool) -> None:
    batch = ARCHITECTURES["llama"].batch()
    method, twin = on("llama", "lora_dropout"), on("llama", "lora_dropout")
    losses = [twin.model(**batch).loss for _ in range(4)]
    assert len({float(value.detach()) for value in losses}) == 4
    (sum(losses) / 4).backward()
    if checkpointing:
        method.model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    for _ in range(2):
        method.model.zero_grad()
        method.generator.manual_seed(0)
        got = method.backward(lambda: method.model(**batch).loss, Tensor.backward)
    torch.testing.assert_close(got, sum(losses).detach() / 4)
    for name, grad in gradients(method).items():
        torch.testing.assert_close(grad, gradients(twin)[name])


@pytest.mark.parametrize("use_rslora", [False, True])
def test_a_training_forward_is_the_lora_of_the_drawn_rank(use_rslora: bool) -> None:
    method = one_layer("dylora", use_rslora=use_rslora)
    A, B = factors(method)
    drawn = []
    for _ in range(300):
        got = update(method)
        b = method.drawn
        drawn.append(b)
        torch.testing.assert_close(got, ALPHA / (b**0.5 if use_rslora else b) * B[:, :b] @ A[:b])
    assert all(abs(count - 75) < 35 for count in Counter(drawn).values())  # 4.6 standard deviations
    assert sorted(Counter(drawn)) == [1, 2, 3, 4]


def test_the_rank_is_one_for_all_layers_and_reaches_only_its_prefix() -> None:
    method, batch = on("roberta", "dylora"), ARCHITECTURES["roberta"].batch()
    for _ in range(6):
        method.model.zero_grad()
        method.model(**batch).loss.backward()
        for name, grad in gradients(method).items():
            directions = grad.abs().sum(1 if "lora_A" in name else 0)
            assert ((directions > 0) == (torch.arange(R) < method.drawn)).all()


@pytest.mark.parametrize(
    ("architecture", "name", "rank"),
    [("llama", "lora_dropout", R), ("llama", "dylora", 1), ("gpt2", "dylora", 3), ("roberta", "dylora", R)],
)
def test_export_and_merge_are_a_plain_lora_with_the_forward_of_evaluation(architecture, name, rank, tmp_path) -> None:
    tiny = ARCHITECTURES[architecture]
    heads = ["classifier"] if architecture == "roberta" else None
    batch, method = tiny.batch(), on(architecture, name, modules_to_save=heads)
    model = method.model
    with torch.no_grad():
        start = float(model.eval()(**batch).loss)
    train(method, batch, steps=12 if architecture == "llama" else 2)
    with torch.no_grad():
        assert architecture != "llama" or float(model.eval()(**batch).loss) < start - 0.1
        whole = logits(model.eval(), batch)
        method.rank = rank
        want = logits(model, batch)
        assert torch.equal(whole, want) == (rank == R)
        method.export(tmp_path)
        loaded = PeftModel.from_pretrained(tiny.model(), str(tmp_path)).eval()
        torch.testing.assert_close(logits(loaded, batch), want, atol=1e-5, rtol=1e-4)
        merged = copy.deepcopy(model).merge_and_unload()
        torch.testing.assert_close(logits(merged, batch), want, atol=1e-5, rtol=1e-4)
        model.merge_adapter(safe_merge=True)
        model.unmerge_adapter()
        torch.testing.assert_close(logits(model, batch), want, atol=1e-5, rtol=1e-4)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (written["peft_type"], written["r"], written["lora_alpha"]) == ("LORA", rank, ALPHA)


@pytest.mark.parametrize("name", ["lora_dropout", "dylora"])
def test_a_trained_bias_and_broken_factors_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"not defined for adapter\.lora_bias=true"):
        one_layer(name, lora_bias=True)
    method = one_layer("dylora")
    factors(method)[0][0, 0] = float("nan")
    with pytest.raises(ValueError, match="is not finite"):
        method.export(tmp_path)
    assert not any(tmp_path.iterdir())
