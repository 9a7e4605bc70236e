"""Every alarm is provoked; a sound run gives none (the suite turns our warnings into errors)."""

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.adapted import descend, full_config
from helpers.runs import MakeConfig, folder_of
from helpers.tiny import ARCHITECTURES, loss
from peft import PeftModel
from torch import nn

from structlora_pyg import ConfigError, get_structlora_model, load_lora
from structlora_pyg.study.tasks.sentences import SentenceTask
from structlora_pyg.study.train import train
from structlora_pyg.tuner.alarms import PATIENCE, AlarmError, AlarmWarning, first_not_finite
from structlora_pyg.tuner.fingerprint import changed, fingerprint

TINY = ARCHITECTURES["llama"]
Batch = dict[str, torch.Tensor]


class Branches(nn.Module):
    """Two layers, one of which is read but not run, as `torch.nn.MultiheadAttention` does with its out_proj."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(torch.tanh(self.blocks[0](x)), self.blocks[1].weight.detach())


def adapted(base: nn.Module | None = None, targets: list[str] | None = None, **settings: Any) -> Any:
    schedule = settings.pop("schedule", {"warmup_steps": 1, "ramp_steps": 1})
    config = full_config(r=2, target_modules=targets or TINY.targets, schedule=schedule, **settings)
    return get_structlora_model(TINY.model() if base is None else base, config).train()


def steps(model: Any, count: int, inputs: Batch | None = None) -> Any:
    def value() -> torch.Tensor:
        return loss(model, TINY.batch()) if inputs is None else model(**inputs).square().sum() + model.auxiliary_loss()

    descend(model.parameters(), value, count, 1e-3, torch.optim.SGD)
    return model


def given(model: Any) -> list[str]:
    return model.hooks.alarms.given


def by_name(model: Any) -> list[nn.Parameter]:
    return [p for n, p in model.named_parameters() if "lora_" in n]


def frozen(model: Any) -> list[nn.Parameter]:
    for name, p in model.named_parameters():
        p.requires_grad_("lora_" in name)
    return list(model.parameters())


def base_only(model: Any) -> list[nn.Parameter]:
    return [p for p in model.get_base_model().parameters() if p.requires_grad]


@pytest.mark.parametrize("choose", [by_name, frozen, base_only])
def test_filter_and_coordinator_left_out_of_the_optimizer_are_an_alarm_in_training_and_at_export(
    choose: Callable[[Any], list[nn.Parameter]], tmp_path: Path
) -> None:
    for count in (PATIENCE + 3, 2):
        model = adapted()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", AlarmWarning)
            descend(choose(model), lambda m=model: loss(m, TINY.batch()), count, 1e-3, torch.optim.SGD)
            if count == 2:
                model.export(tmp_path)
        assert sum("trains the adapter and not the" in text for text in given(model)) == 2  # filter and coordinator


def test_a_layer_whose_forward_is_not_called_is_named() -> None:
    torch.manual_seed(0)
    model = adapted(Branches(), ["blocks.0", "blocks.1"])
    steps(model, PATIENCE, {"x": torch.randn(3, 6)})
    with pytest.warns(AlarmWarning, match=r"1 of 2 adapted layers have had no gradient in 5 .* first blocks\.1"):
        steps(model, 1, {"x": torch.randn(3, 6)})
    steps(model, 3, {"x": torch.randn(3, 6)})  # once is enough


def test_a_stage_that_does_not_learn_is_named() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))

        def forward(self, data: Any) -> Any:
            return data

    model = adapted()
    model.graph_pass.stages.append(Idle())
    with pytest.warns(AlarmWarning, match="Idle has had no gradient in 5 optimizer steps"):
        steps(model, 1 + PATIENCE + 1)
    assert len(given(model)) == 1


@pytest.mark.parametrize("name", ["lora", "vera", "dora"])
def test_baselines_are_watched_too(name: str, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"method": name, "adapter": {"alarms": "error"}, "max_steps": PATIENCE + 2, "save_every": 0}
    train(make_config(**options))  # a sound run gives no alarm
    whole = SentenceTask.loss

    def cut(self: SentenceTask, model: nn.Module, batch: Batch) -> torch.Tensor:
        heads = (p.sum() for n, p in model.named_parameters() if "classifier" in n and p.requires_grad)
        return whole(self, model, batch).detach() + sum(heads)

    monkeypatch.setattr(SentenceTask, "loss", cut)
    with pytest.raises(AlarmError, match=r"all \d adapted layers have had no gradient"):
        train(make_config("cut", **options))


def test_listening_ends_with_the_first_gradient_and_changes_nothing() -> None:
    watched, unwatched = steps(adapted(), 3), steps(adapted(alarms="off"), 3)
    for (name, a), b in zip(watched.named_parameters(), unwatched.parameters(), strict=True):
        assert torch.equal(a, b), name
        assert not a._post_accumulate_grad_hooks, name  # nothing is left to be called
    assert not watched.hooks.alarms._silent


def test_codes_that_are_not_finite_are_noticed() -> None:
    model = steps(adapted(graph={"refresh_every": 2}), 2)
    with torch.no_grad():
        next(model.graph_pass.adapters.parameters()).fill_(math.inf)
    assert "weight of base_model" in first_not_finite(model)
    with pytest.warns(AlarmWarning, match=r"optimizer step 2: codes or gates are not finite"):
        loss(model, TINY.batch())


def test_factors_that_overflow_in_half_precision_are_noticed() -> None:
    model = adapted(TINY.model().half(), graph={"refresh_every": 1}, schedule={"warmup_steps": 0})
    adapter = next(iter(model.graph_pass.adapters))
    with torch.no_grad():
        model.graph_pass.adapters.pair(adapter)[1].fill_(1e6)  # the largest number of float16 is 65504
    with pytest.warns(AlarmWarning, match=rf"factors of {adapter.layer} do not fit into torch.float16"):
        loss(model, TINY.batch())


def test_a_graph_without_the_edges_asked_for_is_noticed() -> None:
    with pytest.warns(AlarmWarning, match=r"graph.edges=depth_chain gives no edge between 2 nodes"):
        adapted(targets=[r"layers.0.self_attn.q_proj", "layers.0.self_attn.v_proj"], graph={"edges": "depth_chain"})
    adapted(graph={"edges": "none"})  # asked for
    model = adapted(graph={"edges": "gradient", "threshold": 0.99999, "refresh_every": 2})
    with pytest.warns(AlarmWarning, match=r"graph.edges=gradient gives no edge .* lower graph.threshold"):
        steps(model, 5)


def test_an_auxiliary_loss_that_nobody_takes_is_noticed() -> None:
    def alone(model: Any, count: int) -> Any:
        """Steps on a loss of one's own, as `transformers.Trainer` takes them with label smoothing."""
        ids = TINY.batch()["input_ids"]
        descend(model.parameters(), lambda: model(input_ids=ids).logits.square().mean(), count)
        return model

    with pytest.warns(AlarmWarning, match=r"in 5 optimizer steps the auxiliary loss has gone into no loss"):
        model = alone(adapted(), 1 + PATIENCE + 2)
    assert len(given(model)) == 1
    for without in ({"filter": {"beta": 0.0}}, {"filter": {"kind": "none"}}):
        assert given(alone(adapted(**without), 1 + PATIENCE + 2)) == []  # there is none


@pytest.mark.parametrize("alarms", ["warn", "error"])
def test_closed_gates_are_noticed_and_an_alarm_can_stop_or_be_switched_off(alarms: str) -> None:
    model = steps(adapted(graph={"refresh_every": 2}, alarms=alarms), 2)
    with torch.no_grad():
        model.graph_pass.stages[0].gate_offset.fill_(-100.0)
    said = r"optimizer step 2: the filter has closed all gates"
    with pytest.warns(AlarmWarning, match=said) if alarms == "warn" else pytest.raises(AlarmError, match=said):
        steps(model, 2)
    if alarms == "warn":
        steps(model, 3)  # still closed at the next look, and said already
        assert len(given(model)) == 1
    quiet = adapted(Branches(), ["blocks.0", "blocks.1"], alarms="off")
    assert given(steps(quiet, PATIENCE + 2, {"x": torch.randn(3, 6)})) == []
    with pytest.raises(ConfigError, match=r"alarms='silent' is unknown; allowed: warn, error, off"):
        adapted(alarms="silent")


def test_frozen_weights_that_change_stop_the_export(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config, whole = make_config(max_steps=3), SentenceTask.loss

    def writing(self: SentenceTask, model: nn.Module, batch: Batch) -> torch.Tensor:
        with torch.no_grad():
            next(p for n, p in model.named_parameters() if "word_embeddings" in n).mul_(1.001)
        return whole(self, model, batch)

    monkeypatch.setattr(SentenceTask, "loss", writing)
    with pytest.raises(RuntimeError, match=r"1 frozen weights of the base model changed in training, first .*word_emb"):
        train(config)
    assert not (folder_of(config) / "adapter").exists()
    assert list(folder_of(config).glob("checkpoint-*"))


def test_an_adapter_knows_its_base(tmp_path: Path) -> None:
    steps(adapted(), 3).export(tmp_path)
    loaded = load_lora(TINY.model(), tmp_path)  # the right one: no warning
    assert isinstance(loaded, PeftModel)
    load_lora(TINY.model().to(torch.bfloat16), tmp_path)  # cannot be compared: no claim
    other = TINY.model()
    with torch.no_grad():
        other.model.embed_tokens.weight.add_(1e-3)
    with pytest.warns(AlarmWarning, match="was trained on another base model than this one"):
        load_lora(other, tmp_path)


def test_a_fingerprint_does_not_see_adapters_and_sees_one_weight_in_many() -> None:
    before = fingerprint(TINY.model())
    model = steps(adapted(), 2)
    assert fingerprint(model.get_base_model()) == before
    weight = model.get_base_model().model.layers[1].mlp.up_proj.weight
    with torch.no_grad():
        weight.mul_(1.01)
    assert changed(before, fingerprint(model.get_base_model())) == ["model.layers.1.mlp.up_proj.weight"]
    assert changed(before, fingerprint(model.get_base_model().to(torch.bfloat16))) == []
    tokens = adapted(trainable_token_indices={"embed_tokens": [1, 2]})
    assert fingerprint(tokens.get_base_model()) == before
