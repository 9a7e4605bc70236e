"""AdaLoRA through PEFT: allocation without a call in the loop, the orthogonality term once, and the folded export."""

from __future__ import annotations

import json
import logging

import pytest
import torch
import torch.nn.functional as F
from helpers.tiny import ARCHITECTURES, logits
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from torch import nn

from structlora_pyg import ConfigError
from structlora_pyg.study.methods.adalora import AdaLora

INIT, TARGET, TOTAL = 4, 2, 12


def adapted(name: str = "llama", lr: float = 1e-2, optimizer=torch.optim.AdamW, **options):
    tiny = ARCHITECTURES[name]
    config = AdaLoraConfig(
        **{
            "init_r": INIT,
            "target_r": TARGET,
            "tinit": 2,
            "tfinal": 3,
            "total_step": TOTAL,
            "lora_alpha": 6,
            "target_modules": tiny.targets,
            **options,
        }
    )
    torch.manual_seed(0)
    model = get_peft_model(tiny.model(), config).train()
    chosen = optimizer([p for p in model.parameters() if p.requires_grad], lr=lr)
    return model, chosen, tiny.batch()


def task_loss(model: nn.Module, batch: dict) -> torch.Tensor:
    output = model(**batch)
    return F.cross_entropy(output, torch.tensor([0, 1])) if isinstance(output, torch.Tensor) else output.loss


def run(adalora: AdaLora, optimizer: torch.optim.Optimizer, batch: dict, steps: int = TOTAL) -> list[int]:
    totals = []
    for _ in range(steps):
        (task_loss(adalora.model, batch) + adalora.auxiliary_loss()).backward()
        optimizer.step()
        optimizer.zero_grad()
        totals.append(sum(adalora.ranks().values()))
    return totals


# -- allocation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "timm_vit", "roberta"])
@pytest.mark.parametrize("delta", [1, 2])
def test_an_ordinary_loop_cuts_the_ranks_to_the_budget(name: str, delta: int) -> None:
    model, optimizer, batch = adapted(name, deltaT=delta)
    adalora = AdaLora(model, optimizer)
    n = len(adalora.layers)
    totals = run(adalora, optimizer, batch)
    assert totals[:2] == [INIT * n] * 2  # tinit
    # Between allocations of deltaT > 1 the optimizer moves what was cut; at the end every step cuts it.
    assert totals[-3:] == [TARGET * n] * 3
    if delta == 1:
        assert totals == sorted(totals, reverse=True)
        # The cubic schedule: b_T + (b_0 - b_T) (1 - (t - tinit) / (T - tfinal - tinit))^3 at t = 4.
        assert totals[3] == int((INIT - TARGET) * n * (1 - 2 / 7) ** 3 + TARGET * n)


def test_ranks_differ_between_layers() -> None:
    model, optimizer, batch = adapted("roberta")
    adalora = AdaLora(model, optimizer)
    run(adalora, optimizer, batch)
    assert len(set(adalora.ranks().values())) > 1, "the budget was spread evenly, as in plain LoRA"


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_the_budget_is_reached_also_without_a_final_phase_and_with_any_optimizer(optimizer) -> None:
    model, optimizer, batch = adapted(tfinal=0, optimizer=optimizer)
    adalora = AdaLora(model, optimizer)
    assert run(adalora, optimizer, batch)[-1] == TARGET * len(adalora.layers)
    assert adalora.step == TOTAL


def test_gradient_accumulation_is_one_step() -> None:
    model, optimizer, batch = adapted()
    adalora = AdaLora(model, optimizer)
    for _ in range(3):
        task_loss(model, batch).backward()
    optimizer.step()
    assert adalora.step == 1


def test_removed_it_no_longer_acts() -> None:
    model, optimizer, batch = adapted()
    adalora = AdaLora(model, optimizer)
    run(adalora, optimizer, batch, 2)
    adalora.remove()
    assert run(adalora, optimizer, batch, 8)[-1] == INIT * len(adalora.layers)
    assert adalora.step == 2


# -- the orthogonality term -------------------------------------------------------------------------------------------


def test_the_term_is_the_mean_deviation_from_orthonormality_by_hand() -> None:
    base = nn.Sequential(nn.Linear(3, 3))
    config = AdaLoraConfig(init_r=2, target_r=1, total_step=9, target_modules=["0"], orth_reg_weight=0.5)
    model = get_peft_model(base, config)
    adalora = AdaLora(model, torch.optim.SGD(model.parameters(), lr=1e-2))
    layer = base[0]
    with torch.no_grad():
        layer.lora_A["default"].copy_(torch.eye(3)[:2])  # orthonormal: 0
        layer.lora_B["default"].copy_(2 * torch.eye(3)[:, :2])  # P^T P = 4 I: the norm of 3 I is 3 sqrt 2
    torch.testing.assert_close(adalora.orthogonality(), torch.tensor(0.5 * 3 * 2**0.5 / 2))


def test_it_is_added_once_with_and_without_a_task_type_and_not_in_evaluation() -> None:
    losses = {}
    for task in (None, "CAUSAL_LM"):
        model, optimizer, batch = adapted(task_type=task)
        before = model.get_base_model()(**batch).loss  # no hook yet
        adalora = AdaLora(model, optimizer)
        losses[task] = model(**batch).loss
        torch.testing.assert_close(losses[task], before + adalora.orthogonality())
        assert float(adalora.auxiliary_loss()) == 0.0
        parts = adalora.losses()
        assert parts["auxiliary"] == pytest.approx(float(adalora.orthogonality().detach()))
        assert parts["task"] == pytest.approx(float(before.detach()), abs=1e-5)
        losses[task].backward()
        assert all(p.grad is not None for n, p in model.named_parameters() if "lora_" in n)
    torch.testing.assert_close(losses[None], losses["CAUSAL_LM"])
    model, optimizer, batch = adapted()
    plain = model.eval()(**batch).loss
    AdaLora(model, optimizer)
    assert torch.equal(model(**batch).loss, plain)


def test_without_it_peft_alone_leaves_it_out_for_models_without_a_task_type() -> None:
    model, _, batch = adapted()
    with_term, _, _ = adapted(task_type="CAUSAL_LM")
    assert float(with_term(**batch).loss.detach()) > float(model(**batch).loss.detach()) + 0.1


def test_for_outputs_without_a_loss_it_is_the_auxiliary_loss_in_training_only() -> None:
    model, optimizer, batch = adapted("timm_vit")
    adalora = AdaLora(model, optimizer)
    model(**batch)
    torch.testing.assert_close(adalora.auxiliary_loss(), adalora.orthogonality())
    assert adalora.auxiliary_loss().requires_grad
    model.eval()
    assert float(adalora.auxiliary_loss()) == 0.0


def test_the_term_keeps_the_factors_closer_to_orthonormal() -> None:
    deviations = []
    for weight in (0.0, 0.5):
        model, optimizer, batch = adapted("timm_vit", orth_reg_weight=weight, lr=3e-2)
        adalora = AdaLora(model, optimizer)
        run(adalora, optimizer, batch)
        adalora.config.orth_reg_weight = 1.0
        deviations.append(float(adalora.orthogonality().detach()))
    assert deviations[1] < 0.9 * deviations[0]


# -- export -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "timm_vit"])
@pytest.mark.parametrize("steps", [3, TOTAL])
def test_the_export_is_a_plain_lora_with_the_forward_of_the_trained_model(name: str, steps: int, tmp_path) -> None:
    tiny = ARCHITECTURES[name]
    model, optimizer, batch = adapted(name, lr=3e-2)
    adalora = AdaLora(model, optimizer)
    run(adalora, optimizer, batch, steps)
    ranks = adalora.export(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["peft_type"] == "LORA"
    assert written["r"] == written["lora_alpha"] == max(ranks.values())
    assert not written["rank_pattern"]
    assert "total_step" not in written
    with torch.no_grad():
        want, start = logits(model.eval(), batch), logits(tiny.model(), batch)
        assert not torch.allclose(want, start, atol=1e-4)
        loaded = PeftModel.from_pretrained(tiny.model(), str(tmp_path)).eval()
        torch.testing.assert_close(logits(loaded, batch), want, atol=1e-5, rtol=1e-4)
        merged = loaded.merge_and_unload()
        torch.testing.assert_close(logits(merged, batch), want, atol=1e-5, rtol=1e-4)


def test_training_goes_on_after_an_export_as_if_there_was_none(tmp_path) -> None:
    results = []
    for export in (False, True):
        model, optimizer, batch = adapted()
        adalora = AdaLora(model, optimizer)
        run(adalora, optimizer, batch, 10)
        if export:
            adalora.export(tmp_path)
        run(adalora, optimizer, batch, 2)
        results.append(logits(model.eval(), batch))
    assert torch.equal(*results)


def test_trained_heads_travel_with_the_export(tmp_path) -> None:
    tiny = ARCHITECTURES["roberta"]
    model, optimizer, batch = adapted("roberta", task_type="SEQ_CLS")
    adalora = AdaLora(model, optimizer)
    run(adalora, optimizer, batch)
    adalora.export(tmp_path)
    with torch.no_grad():
        loaded = PeftModel.from_pretrained(tiny.model(), str(tmp_path)).eval()
        torch.testing.assert_close(logits(loaded, batch), logits(model.eval(), batch), atol=1e-5, rtol=1e-4)


def test_training_that_ends_before_the_budget_is_reached_is_reported(tmp_path, caplog) -> None:
    model, optimizer, batch = adapted()
    adalora = AdaLora(model, optimizer)
    with pytest.raises(RuntimeError, match="no optimizer step was seen"):
        adalora.export(tmp_path)
    run(adalora, optimizer, batch, 5)
    with caplog.at_level(logging.WARNING):
        adalora.export(tmp_path)
    assert "ended after 5 steps, while ranks were cut until step 9" in caplog.text
    caplog.clear()
    run(adalora, optimizer, batch, 4)
    adalora.export(tmp_path)
    assert not caplog.text


# -- the worst inputs -------------------------------------------------------------------------------------------------


def test_all_problems_of_the_configuration_are_reported_at_once() -> None:
    model, optimizer, _ = adapted()
    config = model.peft_config["default"]
    config.target_r, config.tinit, config.deltaT, config.beta1 = INIT, 50, 0, 1.0
    with pytest.raises(ConfigError) as caught:
        AdaLora(model, optimizer)
    text = str(caught.value)
    assert text.startswith("the configuration has 4 problems")
    for part in ("target_r=4, init_r=4", "tinit=50", "deltaT must be >= 1", "beta1 must be in (0, 1)"):
        assert part in text


def test_ranks_can_be_cut_from_the_second_step_on() -> None:
    model, optimizer, batch = adapted(tinit=0, tfinal=2, total_step=4)
    adalora = AdaLora(model, optimizer)
    assert run(adalora, optimizer, batch, 4)[1:] == [TARGET * len(adalora.layers)] * 3
    with pytest.raises(ConfigError, match="total_step - tfinal must be >= 2, got total_step=4, tfinal=3"):
        AdaLora(*adapted(tinit=0, tfinal=3, total_step=4)[:2])


def test_other_adapters_and_optimizers_are_refused() -> None:
    tiny = ARCHITECTURES["llama"]
    lora = get_peft_model(tiny.model(), LoraConfig(target_modules=tiny.targets))
    with pytest.raises(ValueError, match="got LoraConfig"):
        AdaLora(lora, torch.optim.SGD(lora.parameters()))
    model, _, _ = adapted()
    with pytest.raises(ValueError, match=r"does not train .*lora_A \(18 of 18"):
        AdaLora(model, torch.optim.SGD([nn.Parameter(torch.ones(1))]))
    with pytest.raises(ValueError, match="got NoneType"):
        AdaLora(model, torch.optim.SGD(model.parameters()), "other")
    conv = nn.Sequential(nn.Conv2d(2, 2, 3))
    model = get_peft_model(conv, AdaLoraConfig(target_modules=["0"], total_step=9))
    with pytest.raises(ValueError, match="0 is a Conv2d"):
        AdaLora(model, torch.optim.SGD(model.parameters()))


def test_a_step_without_gradients_is_refused_with_the_fix() -> None:
    model, optimizer, _ = adapted()
    adalora = AdaLora(model, optimizer)
    with pytest.raises(RuntimeError, match=r"has no gradient after an optimizer step \(18 of 18.*Was backward called"):
        optimizer.step()
    assert adalora.step == 0
