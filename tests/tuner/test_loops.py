"""Training loops of every kind: by hand, accumulated, Trainer, checkpointed; and the schedule nobody has to call."""

from collections import namedtuple
from typing import Any

import pytest
import torch
from helpers.adapted import adapt, descend, full_config, train
from helpers.tiny import ARCHITECTURES, DETECTOR, logits, loss
from peft import LoraConfig, PeftModel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import Trainer, TrainingArguments

from structlora_pyg import StructLoraConfig, get_structlora_model, parameter_groups

TINY = ARCHITECTURES["llama"]
ROBERTA, TIMM = ARCHITECTURES["roberta"], ARCHITECTURES["timm_vit"]


def halves(batch: dict) -> list[dict]:
    return [{k: v[i : i + 1] for k, v in batch.items()} for i in range(2)]


def test_gradient_accumulation_equals_a_large_batch() -> None:
    results = []
    for accumulate in (False, True):
        model = adapt(ROBERTA, schedule={"warmup_steps": 1, "ramp_steps": 1}, filter={"init_logit": 0.5}).train()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        for _ in range(5):
            if accumulate:
                for part in halves(ROBERTA.batch()):
                    (loss(model, part) / 2).backward()
            else:
                loss(model, ROBERTA.batch()).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert model.graph_pass.step == 4  # the fifth is counted by whatever looks next
        results.append({n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad})
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, atol=2e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize(
    ("kind", "options"),
    [(torch.optim.AdamW, {}), (torch.optim.AdamW, {"fused": True}), (torch.optim.SGD, {"foreach": True})],
    ids=["AdamW", "fused AdamW", "SGD"],
)
def test_optimizer_steps_are_counted_for_every_optimizer(kind, options) -> None:
    model = adapt(TINY).train()
    optimizer = kind([p for p in model.parameters() if p.requires_grad], lr=1e-3, **options)
    for step in range(4):
        assert model.graph_pass.step == max(step - 1, 0)
        loss(model, TINY.batch()).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_steps_of_an_optimizer_that_holds_copies_are_counted_and_those_of_other_models_are_not() -> None:
    """DeepSpeed's optimizers train copies in float32 and write them back past the version counters."""
    model = adapt(TINY, schedule={"warmup_steps": 2}).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    copies = [torch.nn.Parameter(p.detach().clone()) for p in trained]
    optimizer = torch.optim.AdamW(copies, lr=1e-2)
    other = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    for step in range(4):
        loss(model, TINY.batch()).backward()
        other.step()
        loss(model, TINY.batch())
        assert model.graph_pass.step == step
        for p, copied in zip(trained, copies, strict=True):
            copied.grad, p.grad = p.grad, None
        optimizer.step()
        for p, copied in zip(trained, copies, strict=True):
            p.data.copy_(copied.data)
    model.state_dict()
    assert model.graph_pass.step == 4
    assert model.graph_pass.active
    with torch.no_grad():
        before = logits(model.eval(), TINY.batch())
        model.hooks.run()
        assert torch.equal(logits(model, TINY.batch()), before)  # evaluation had noticed the last step too


@pytest.mark.parametrize("also", [True, False], ids=["with a forward of its own", "alone"])
def test_every_step_is_counted_once_where_torch_func_gives_the_gradients(also: bool) -> None:
    """As with Opacus, which clips the gradients of single examples."""
    base, x = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)), torch.randn(4, 8)
    config = StructLoraConfig(r=2, target_modules=["0", "2"], schedule={"warmup_steps": 2}, alarms="error")
    model = get_structlora_model(base, config).train()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)

    def value(parameters: dict[str, torch.Tensor], row: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, parameters, (row[None],)).square().mean()

    for _ in range(9):
        if also:
            model(x)
        each = torch.func.vmap(torch.func.grad(value), (None, 0), randomness="different")
        for name, gradient in each({n: p.detach() for n, p in trained.items()}, x).items():
            trained[name].grad = gradient.mean(0)
        optimizer.step()
    model.hooks.finish()
    assert model.graph_pass.step == 9


def test_warm_up_is_plain_lora_with_all_gates_open_and_a_gradient_for_every_parameter() -> None:
    model = adapt(TINY, schedule={"warmup_steps": 3, "ramp_steps": 3}, coordinator={"lift": "project"}).train()
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-2))
    weights = []
    for step in range(8):
        total = loss(model, TINY.batch())
        weights.append(model.graph_pass.ramp)
        gate = model.hooks.data.gate
        assert step >= 3 or torch.equal(gate, torch.ones_like(gate))
        assert (model.losses()["auxiliary"] > 0.0) == (step >= 3)
        total.backward()
        assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []  # as DDP demands
        optimizer.step()
        optimizer.zero_grad()
    assert weights == [0.0, 0.0, 0.0, 0.25, 0.5, 0.75, 1.0, 1.0]


def test_loss_of_the_output_is_task_plus_auxiliary_in_training_and_task_in_evaluation() -> None:
    model, batch = adapt(TINY), TINY.batch()
    with pytest.raises(RuntimeError, match="call the model first"):
        model.auxiliary_loss()
    output = train(model, batch).train()(**batch)
    parts = model.losses()
    assert float(output.loss) == pytest.approx(parts["task"] + parts["auxiliary"], rel=1e-6)
    assert parts["auxiliary"] > 0
    for _ in range(3):
        output = model.eval()(**batch)
    want = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    torch.testing.assert_close(output.loss, want)
    assert float(model.auxiliary_loss()) == 0.0
    loss(model.train(), batch)
    assert model.graph_pass.step == 3  # evaluations between steps are none


def test_coordinator_off_equals_filtered_lora_and_both_off_equals_lora() -> None:
    full = train(adapt(TINY), TINY.batch())
    filtered = adapt(TINY, coordinator={"conv": "none"})
    filtered.load_state_dict(full.state_dict(), strict=False)
    plain = adapt(TINY, coordinator={"conv": "none"}, filter={"kind": "none"})
    plain.load_state_dict(full.state_dict(), strict=False)
    for model in (full, filtered, plain):
        model.graph_pass.step = 10
    with torch.no_grad():
        full.graph_pass.stages[0].gate_offset[:, 0] = -1.0
        filtered.graph_pass.stages[0].gate_offset.copy_(full.graph_pass.stages[0].gate_offset)
        full.graph_pass.stages[1].gain.zero_()
        a, b, c = (logits(m.eval(), TINY.batch()) for m in (full, filtered, plain))
        torch.testing.assert_close(a, b)
        assert not torch.allclose(b, c)
        full.graph_pass.stages[0].gate_offset.zero_()
        torch.testing.assert_close(logits(full, TINY.batch()), c)


@pytest.mark.parametrize("term", ["decoder", "infonce", "task"])
@pytest.mark.parametrize("compression", ["gate", "vib"])
def test_label_and_compression_terms_train_their_parts(term: str, compression: str) -> None:
    options = {"gamma": 0.5, "label_term": term, "compression": compression}
    options |= {} if term == "task" else {"num_labels": 2}
    model = adapt(ROBERTA, filter=options)
    train(model, ROBERTA.batch(), steps=3)
    output = model.train()(**ROBERTA.batch())
    parts = model.losses()
    extra = 0.5 * model.graph_pass.ramp * parts["task"] if term == "task" else 0.0
    assert float(output.loss) == pytest.approx(parts["task"] + parts["auxiliary"] + extra, rel=1e-4)
    output.loss.backward()
    if term == "task":
        assert not [*model.graph_pass.information.parameters()]
        return
    continuous = adapt(TIMM, filter={**options, "num_labels": 1}, schedule={"warmup_steps": 0}).train()
    continuous(**TIMM.batch())
    continuous.auxiliary_loss(torch.tensor([0.25, -1.5])).backward()
    for each in (model, continuous):
        assert all(p.grad.abs().sum() > 0 for p in each.graph_pass.information.parameters())


def test_a_detector_trains_on_labels_that_are_a_list_of_dictionaries() -> None:
    model = train(adapt(DETECTOR), DETECTOR.batch()).train()
    output = model(**DETECTOR.batch())
    parts = model.losses()
    assert parts["auxiliary"] > 0
    assert float(output.loss) == pytest.approx(parts["task"] + parts["auxiliary"], rel=1e-6)
    labelled = adapt(DETECTOR, filter={"gamma": 0.5, "label_term": "decoder", "num_labels": 3}).train()
    with pytest.raises(RuntimeError, match="needs the labels"):
        labelled(**DETECTOR.batch())


@pytest.mark.parametrize("options", [{}, {"gamma": 0.5, "label_term": "decoder", "num_labels": 2}])
def test_a_reference_forward_without_the_adapter_leaves_the_loss_of_the_one_before(options: dict) -> None:
    values = []
    for reference in (False, True):
        model = adapt(ROBERTA, filter=options, schedule={"warmup_steps": 0, "ramp_steps": 0}).train()
        model(**ROBERTA.batch())
        if reference:
            with torch.no_grad(), model.disable_adapter():
                model(input_ids=ROBERTA.batch()["input_ids"])
        torch.manual_seed(0)  # of the noise on the codes
        values.append((model.losses()["task"], float(model.auxiliary_loss())))
    assert values[0] == values[1]
    assert values[0][1] != 0.0


def test_padding_does_not_enter_the_rank_codes() -> None:
    options = {"gamma": 0.5, "label_term": "decoder", "num_labels": 2}
    model = adapt(ROBERTA, filter=options, schedule={"warmup_steps": 0}).train()
    batch = ROBERTA.batch()
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][:, 5:] = 0
    codes = []
    for filler in (7, 9):
        batch["input_ids"][:, 5:] = filler
        model(**batch)
        graph_pass = model.graph_pass
        codes.append(model.hooks._codes.pooled(graph_pass.adapters, graph_pass.graph).detach())
    torch.testing.assert_close(codes[0], codes[1])


def test_gates_and_vectors_are_free_of_weight_decay() -> None:
    model = adapt(TINY)
    decayed, free = parameter_groups(model, lr=1e-3, weight_decay=0.1)
    names = {id(p): n for n, p in model.named_parameters()}
    assert any("gate_offset" in names[id(p)] for p in free["params"])
    assert all("lora_" in names[id(p)] or "graph_pass" in names[id(p)] for p in decayed["params"])
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert len(decayed["params"]) + len(free["params"]) == len(trainable)


class Rows(torch.utils.data.Dataset):
    def __init__(self, n: int = 12) -> None:
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(4, 64, (n, 8), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict:
        return {"input_ids": self.ids[i], "labels": int(self.ids[i, 0] > 32)}


def trainer(folder, steps: int, **changes) -> Trainer:
    options = {"max_steps": steps, "per_device_train_batch_size": 3, "save_steps": 4, "learning_rate": 1e-2, "seed": 3}
    options |= {"logging_steps": 1, "report_to": [], "use_cpu": True, "disable_tqdm": True, **changes}
    torch.manual_seed(0)
    model = adapt(ROBERTA, task_type="SEQ_CLS", filter={"init_logit": 0.5})
    return Trainer(model, TrainingArguments(str(folder), **options), train_dataset=Rows())


def test_trainer_trains_resumes_exactly_and_saves_what_stock_peft_loads(tmp_path) -> None:
    undisturbed = trainer(tmp_path / "a", 8)
    undisturbed.train()
    broken = trainer(tmp_path / "b", 8)
    broken.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    one, two = undisturbed.model.state_dict(), broken.model.state_dict()
    for key, value in one.items():
        assert torch.equal(two[key], value), key
    assert undisturbed.model.graph_pass.active
    undisturbed.save_model(str(tmp_path / "final"))
    with torch.no_grad():
        loaded = PeftModel.from_pretrained(ROBERTA.model(), str(tmp_path / "final")).eval()
        torch.testing.assert_close(logits(loaded, ROBERTA.batch()), logits(broken.model.eval(), ROBERTA.batch()))


def test_trainer_accumulation_gives_the_auxiliary_loss_its_weight_once(tmp_path) -> None:
    values = []
    for size, accumulation in ((4, 1), (2, 2)):
        run = trainer(
            tmp_path / str(size), 3, per_device_train_batch_size=size, gradient_accumulation_steps=accumulation
        )
        run.model.graph_pass.warmup_steps = 0
        run.train()
        values.append({n: p.detach().clone() for n, p in run.model.named_parameters() if "gate_offset" in n})
    for name, value in values[0].items():
        assert value.abs().max() > 0
        torch.testing.assert_close(values[1][name], value, atol=1e-4, rtol=1e-2)


@pytest.mark.parametrize("kind", ["mapping", "named tuple"])
def test_every_kind_of_output_gets_the_auxiliary_loss(kind: str) -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> Any:
            loss = self.b(self.a(x).relu()).square().mean()
            return {"loss": loss} if kind == "mapping" else namedtuple("Output", "loss logits")(loss, x)

    options = {"r": 2, "target_modules": ["a", "b"], "filter": {"beta": 1.0}, "graph": {"edges": "full"}}
    config = full_config(**options, schedule={"warmup_steps": 0, "ramp_steps": 0})
    model = get_structlora_model(Net(), config).train()
    output = model(torch.randn(4, 8))
    loss = output["loss"] if kind == "mapping" else output.loss
    parts = model.losses()
    assert parts["auxiliary"] > 0.01
    assert float(loss.detach()) == pytest.approx(parts["task"] + parts["auxiliary"], rel=1e-5)


def test_steps_of_a_part_that_is_trained_by_itself_are_counted() -> None:
    model = adapt(TINY).train()
    part, ids = model.get_base_model().model, TINY.batch()["input_ids"]
    descend(model.parameters(), lambda: part(input_ids=ids).last_hidden_state.pow(2).mean(), steps=5)
    assert model.graph_pass.step == 4  # the fifth is counted by whatever looks next
    assert model.graph_pass.active


def test_any_optimizer_steps_on_after_an_embedding_adapter_was_deleted() -> None:
    model = get_structlora_model(TINY.model(), StructLoraConfig(r=2, target_modules=["embed_tokens", "q_proj"]))
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    hooks = model.hooks  # still alive, as in a cycle that nobody has collected yet
    model.set_adapter("other")
    model.delete_adapter("default")
    train(model, TINY.batch(), steps=1)
    assert hooks.updated.count == 0


def test_a_moving_average_of_the_model_is_exported_as_the_average_of_its_factors(tmp_path) -> None:
    model = get_structlora_model(TINY.model(), StructLoraConfig(r=2, target_modules=TINY.targets)).train()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    expected = None
    for _ in range(4):
        loss(model, TINY.batch()).backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(model)
        now = [p.detach().clone() for p in trained]
        expected = now if expected is None else [old.lerp(p, 0.5) for old, p in zip(expected, now, strict=True)]
    averaged = average.module.eval()
    torch.testing.assert_close([p.detach() for p in averaged.parameters() if p.requires_grad], expected)
    averaged.export(tmp_path)
    exported = PeftModel.from_pretrained(TINY.model(), tmp_path).eval()
    torch.testing.assert_close(loss(exported, TINY.batch()), loss(averaged, TINY.batch()))
    assert loss(exported, TINY.batch()) != loss(model.eval(), TINY.batch())
