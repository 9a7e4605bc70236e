"""The worth of directions, and the structure of updates and gradients during training, against direct computation."""

from pathlib import Path

import pytest
import torch
from helpers.adapted import adapt, train
from helpers.tiny import ARCHITECTURES, logits, loss
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from structlora_pyg import StructLoraModel, adapter_structure
from structlora_pyg.analysis.stages import close_directions, direction_importance
from structlora_pyg.analysis.structure import StructureRecorder, adjacent_pairs

TINY = ARCHITECTURES["roberta"]
PLAIN = {"filter": {"kind": "none", "beta": 0.0}, "coordinator": {"conv": "none"}, "graph": {"edges": "none"}}


def plain() -> StructLoraModel:
    """A StructLoRA model without filter and coordinator, which is LoRA, with updates that matter; in float64."""
    model = train(adapt(TINY, **PLAIN), TINY.batch()).double()
    with torch.no_grad():
        for adapter in model.graph_pass.adapters:
            model.graph_pass.adapters.pair(adapter)[1].normal_(generator=torch.Generator().manual_seed(adapter.depth))
    return model


def test_removal_is_the_rise_of_the_loss_without_the_direction() -> None:
    model, batch = plain(), TINY.batch()
    found = direction_importance(model, lambda: model(**batch).loss)
    model.eval()
    expected = []
    with torch.no_grad():
        start = float(model(**batch).loss)
        for adapter in model.graph_pass.adapters:
            column = model.graph_pass.adapters.pair(adapter)[1]
            for j in range(adapter.r):
                kept = column[:, j].clone()
                column[:, j] = 0.0
                expected.append(float(model(**batch).loss) - start)
                column[:, j] = kept
    assert max(map(abs, expected)) > 1e-4
    torch.testing.assert_close(found.removal, torch.tensor(expected).double(), atol=1e-6, rtol=1e-3)


def test_directions_of_least_worth_are_closed_and_not_exported(tmp_path: Path) -> None:
    model, batch = plain().float().eval(), TINY.batch()
    worth = direction_importance(model, lambda: loss(model, batch)).removal
    ups = [model.graph_pass.adapters.pair(a)[1] for a in model.graph_pass.adapters]
    assert close_directions(model, worth, share=0.5) == len(worth) // 2
    closed = torch.cat([~up.any(0) for up in ups]).detach()
    assert worth[closed].max() <= worth[~closed].min()
    model.export(tmp_path, ragged=True)
    state = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(len(value) for name, value in state.items() if "lora_A" in name) < len(worth)
    exported = PeftModel.from_pretrained(TINY.model(), str(tmp_path)).eval()
    torch.testing.assert_close(loss(exported, batch), loss(model, batch))
    with pytest.raises(ValueError, match=f"has {len(worth)} directions, got the worth of 3"):
        close_directions(model, worth[:3])


def test_first_order_is_the_derivative_of_removal() -> None:
    model, batch = plain(), TINY.batch()
    with torch.no_grad():
        for adapter in model.graph_pass.adapters:
            model.graph_pass.adapters.pair(adapter)[1].mul_(1e-2)  # so small that the loss is linear in a direction
    found = direction_importance(model, lambda: model(**batch).loss)
    torch.testing.assert_close(found.first_order, found.removal, atol=1e-6, rtol=0.05)
    assert found.correlations()["removal_first_order"] > 0.95


def test_norms_are_those_of_rank_one_updates_and_what_is_constant_has_no_rank_correlation() -> None:
    batch, model = TINY.batch(), plain()
    found = direction_importance(model, lambda: model(**batch).loss)
    pairs = [model.graph_pass.adapters.pair(a) for a in model.graph_pass.adapters]
    updates = [torch.outer(b[:, j], a[j]) for a, b in pairs for j in range(len(a))]
    expected = torch.stack([update.detach().norm() for update in updates]).double()
    torch.testing.assert_close(found.norm, expected, atol=1e-6, rtol=1e-5)
    assert found.correlations()["removal_gate"] is None  # all open
    learned = train(adapt(TINY), batch)
    found = direction_importance(learned, lambda: learned(**batch).loss)
    assert -1.0 <= found.correlations()["removal_gate"] <= 1.0
    noisy = adapt(TINY, filter={"kind": "noise", "noise": 0.7}, coordinator={"levels": "fixed"})
    found = direction_importance(noisy, lambda: noisy(**batch).loss)
    torch.testing.assert_close(found.level, torch.full_like(found.norm, 0.7), atol=1e-6, rtol=0)
    assert found.correlations()["removal_level"] is None


@pytest.mark.parametrize("training", [True, False])
def test_measuring_leaves_the_model_as_it_was(training: bool) -> None:
    model, batch = train(adapt(TINY), TINY.batch()), TINY.batch()
    model.eval()
    before = logits(model, batch).detach()
    model.train(training)
    direction_importance(model, lambda: model(**batch).loss)
    assert model.training is training
    assert model.graph_pass.stages[0].factor is None
    model.eval()
    torch.testing.assert_close(logits(model, batch).detach(), before)


def stock() -> torch.nn.Module:
    return get_peft_model(TINY.model(), LoraConfig(r=2, lora_alpha=4, target_modules=TINY.targets))


def test_recorder_measures_stock_lora_and_structlora_alike_where_they_are_the_same() -> None:
    steps = []
    torch.manual_seed(3)
    lora = stock()
    ours = adapt(TINY, **PLAIN)
    for model in (lora, ours):
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_" in name:
                    p.copy_(torch.linspace(-0.3, 0.5, p.numel()).view_as(p).sin())
        recorder = StructureRecorder(model)
        recorder.open()
        loss(model.train(), TINY.batch()).backward()
        steps.append(recorder.read())
    assert steps[0]["gradient_cosine"] == pytest.approx(steps[1]["gradient_cosine"], abs=1e-5)
    assert steps[0]["adjacent_cosine"] == pytest.approx(steps[1]["adjacent_cosine"], abs=1e-5)
    assert steps[0]["relative_drift"] == pytest.approx(adapter_structure(lora).relative_drift)
    assert steps[0]["open_gates"] is None


def test_gradient_cosine_follows_the_true_gradients() -> None:
    model = stock()
    weights = [layer.base_layer.weight for _, layer in StructureRecorder(model).adapters.layers.items()]
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.fill_(0.01)
    for weight in weights:
        weight.requires_grad_()
    recorder = StructureRecorder(model)
    recorder.open()
    loss(model, TINY.batch()).backward()
    unit = torch.nn.functional.normalize(torch.stack([w.grad.flatten() for w in weights]), dim=1)
    pairs = adjacent_pairs(recorder.adapters)
    exact = sum(float(unit[i] @ unit[j]) for i, j in pairs) / len(pairs)
    # Widths of 24 through 16 random projections a side: the sketch is rough, its sign and size are not.
    assert recorder.read()["gradient_cosine"] == pytest.approx(exact, abs=0.3)


def test_recorder_sees_nothing_in_steps_it_was_not_opened_for() -> None:
    model = stock()
    recorder = StructureRecorder(model)
    loss(model, TINY.batch()).backward()
    step = recorder.read()
    assert step["gradient_cosine"] is None
    assert step["relative_drift"] is None  # updates of 0 have no mean square to relate to
    recorder.open()
    recorder.read()
    loss(model, TINY.batch()).backward()
    assert recorder.read()["gradient_cosine"] is None
