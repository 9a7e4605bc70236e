"""AdaLoRA through PEFT: allocation behind every optimizer step, the orthogonality term once, and the folded export."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers.tiny import ARCHITECTURES, logits
from peft import PeftModel
from torch import nn

from structlora_pyg import ConfigError, StructLoraConfig
from structlora_pyg.study.config import MethodConfig
from structlora_pyg.study.methods import make_method
from structlora_pyg.study.methods.ranks import AdaLora

INIT, TARGET, TOTAL = 6, 4, 20
FIRST, LAST = 2, 14  # ranks are cut after the first and until the last of these steps


def adapted(name: str = "llama", steps: int = TOTAL, lr: float = 1e-2, **options):
    tiny = ARCHITECTURES[name]
    config = StructLoraConfig(r=TARGET, lora_alpha=8, target_modules=tiny.targets, **options)
    torch.manual_seed(0)
    method = make_method(config, MethodConfig(name="adalora"), steps)
    assert isinstance(method, AdaLora)
    method.adapt(tiny.model(), lambda: None, lambda: None).train()
    return method, method.optimizer(lr, 0.0), tiny.batch()


def task_loss(model: nn.Module, batch: dict) -> torch.Tensor:
    output = model(**batch)
    return F.cross_entropy(output, torch.tensor([0, 1])) if isinstance(output, torch.Tensor) else output.loss


def run(method: AdaLora, optimizer: torch.optim.Optimizer, batch: dict, steps: int = TOTAL) -> list[int]:
    totals = []
    for _ in range(steps):
        method.backward(lambda: task_loss(method.model, batch), torch.Tensor.backward)
        optimizer.step()
        optimizer.zero_grad()
        totals.append(sum(method.ranks().values()))
    return totals


def test_a_loop_cuts_the_ranks_to_the_budget_and_not_evenly() -> None:
    method, optimizer, batch = adapted()
    n = len(method.layers)
    totals = run(method, optimizer, batch)
    assert totals[:FIRST] == [INIT * n] * FIRST
    assert totals == sorted(totals, reverse=True)
    # The cubic schedule: b_T + (b_0 - b_T) (1 - (t - tinit) / (T - tfinal - tinit))^3 at t = 4.
    assert totals[3] == int((INIT - TARGET) * n * (1 - 2 / (LAST - FIRST)) ** 3 + TARGET * n)
    assert totals[LAST:] == [TARGET * n] * (TOTAL - LAST)
    assert len(set(method.ranks().values())) > 1, "the budget was spread evenly, as in plain LoRA"


def test_gradient_accumulation_is_one_step_and_a_step_without_gradients_is_refused() -> None:
    method, optimizer, batch = adapted()
    with pytest.raises(RuntimeError, match=r"has no gradient after an optimizer step.*Was backward called"):
        optimizer.step()
    assert method.step == 0
    for _ in range(3):
        task_loss(method.model, batch).backward()
    optimizer.step()
    assert method.step == 1


def test_the_term_is_the_mean_deviation_from_orthonormality_by_hand() -> None:
    method = make_method(StructLoraConfig(r=1, target_modules=["0"]), MethodConfig(name="adalora"), 9)
    base = nn.Sequential(nn.Linear(3, 3))
    method.adapt(base, lambda: None, lambda: None)
    with torch.no_grad():
        base[0].lora_A["default"].copy_(torch.eye(3)[:2])  # orthonormal: 0
        base[0].lora_B["default"].copy_(2 * torch.eye(3)[:, :2])  # P^T P = 4 I: the norm of 3 I is 3 sqrt 2
    torch.testing.assert_close(method.penalty(), torch.tensor(0.5 * 3 * 2**0.5 / 2))


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_the_term_is_in_the_loss_once_with_and_without_a_task_type(task_type) -> None:
    method, _, batch = adapted(task_type=task_type)
    bare = float(method.model.get_base_model()(**batch).loss.detach())
    loss = method.backward(lambda: task_loss(method.model, batch), torch.Tensor.backward)
    term = float(method.penalty().detach())
    assert float(loss) == pytest.approx(bare + term, rel=1e-5)
    assert method.losses()["auxiliary"] == pytest.approx(term)
    assert all(p.grad is not None for n, p in method.model.named_parameters() if ".lora_" in n and p.requires_grad)
    assert float(method.model.eval()(**batch).loss.detach()) == pytest.approx(bare, rel=1e-5)


@pytest.mark.parametrize(("name", "steps"), [("llama", TOTAL), ("gpt2", 3), ("timm_vit", TOTAL)])
def test_the_export_is_a_plain_lora_with_the_forward_of_the_trained_model(name: str, steps: int, tmp_path) -> None:
    tiny = ARCHITECTURES[name]
    method, optimizer, batch = adapted(name, lr=3e-2)
    run(method, optimizer, batch, steps)
    facts = method.export(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["peft_type"] == "LORA"
    assert written["r"] == written["lora_alpha"] == facts["rank"] == max(method.ranks().values())
    assert not written["rank_pattern"]
    with torch.no_grad():
        want, start = logits(method.model.eval(), batch), logits(tiny.model(), batch)
        assert not torch.allclose(want, start, atol=1e-4)
        loaded = PeftModel.from_pretrained(tiny.model(), str(tmp_path)).eval()
        torch.testing.assert_close(logits(loaded, batch), want, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(logits(loaded.merge_and_unload(), batch), want, atol=1e-5, rtol=1e-4)


def test_training_goes_on_after_an_export_or_a_restored_checkpoint_as_if_there_was_none(tmp_path: Path) -> None:
    results = []
    for pause in ("none", "export", "checkpoint"):
        method, optimizer, batch = adapted()
        run(method, optimizer, batch, LAST + 1)  # the ranks are settled
        if pause == "export":
            method.export(tmp_path)
        if pause == "checkpoint":
            method.save(tmp_path)
            state = optimizer.state_dict()
            method, optimizer, batch = adapted()
            method.load(tmp_path)
            optimizer.load_state_dict(state)
        run(method, optimizer, batch, 3)
        results.append(logits(method.model.eval(), batch))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_one_step_is_too_few_and_two_are_enough() -> None:
    with pytest.raises(ConfigError, match="needs >= 2 optimizer steps to cut ranks, got 1"):
        adapted(steps=1)
    method, optimizer, batch = adapted(steps=2)
    assert run(method, optimizer, batch, 2)[-1] == TARGET * len(method.layers)
