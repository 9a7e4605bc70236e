"""Noise on the rank codes, and levels that held-out loss teaches."""

from functools import partial
from pathlib import Path

import pytest
import torch
from helpers.adapted import adapt, train
from helpers.tiny import ARCHITECTURES, loss
from peft import PeftModel
from torch import nn
from transformers import Trainer, TrainingArguments

from structlora_pyg import ConfigError, StructLoraConfig, StructLoraModel, get_structlora_model
from structlora_pyg.study.run import Order
from structlora_pyg.tuner import TeachLevels
from structlora_pyg.tuner.teaching import undisturbed

TINY = ARCHITECTURES["llama"]
NOISE = {"filter": {"kind": "noise", "noise": 0.7}}
QUIET = {"lift": "none", "hidden_channels": 8}


def noisy(levels: str = "graph", architecture: str = "llama", **changes) -> StructLoraModel:
    coordinator = {"coordinator": {"levels": levels, **QUIET}, "graph": {"edges": "structure"}}
    return adapt(ARCHITECTURES[architecture], **{**NOISE, **coordinator, **changes})


def stepped(model: StructLoraModel, kind: type = torch.optim.AdamW, steps: int = 3) -> torch.optim.Optimizer:
    optimizer = kind([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for _ in range(steps):
        loss(model, TINY.batch()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


@pytest.mark.parametrize(
    ("architecture", "dora"), [("llama", False), ("llama", True), ("gpt2", False), ("pyg_gps", False)]
)
def test_noise_is_there_in_training_alone_and_leaves_no_trace_in_the_export(architecture, dora, tmp_path) -> None:
    tiny = ARCHITECTURES[architecture]
    model = train(noisy("fixed", architecture, use_dora=dora), tiny.batch())
    batch = tiny.batch()
    with torch.no_grad():
        torch.manual_seed(0)
        once, again = loss(model, batch), loss(model, batch)
        assert once == again
        model.train()
        assert loss(model, batch) != loss(model, batch)
        model.eval()
    assert model.export(tmp_path / "plain")["relative_error"] < 1e-6
    if not tiny.stock:
        return
    stock = PeftModel.from_pretrained(tiny.model(), tmp_path / "plain").eval()
    with torch.no_grad():
        torch.testing.assert_close(loss(stock, batch), once, atol=1e-5, rtol=1e-4)


def test_every_way_through_a_layer_hears_the_same_noise() -> None:
    model = noisy("fixed")
    stepped(model)
    losses = []
    for watched in (False, True):
        handles = [
            m.register_forward_hook(lambda *_: None) for m in model.modules() if watched and type(m) is nn.Linear
        ]
        torch.manual_seed(3)
        losses.append(loss(model, TINY.batch()).item())
        for handle in handles:
            handle.remove()
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_lesson_is_the_derivative_of_the_held_out_loss_after_a_step() -> None:
    torch.manual_seed(0)  # a network of its own: those of Transformers compute in float32 here and there
    base = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    options = {"coordinator": {"levels": "free", **QUIET}, "schedule": {"warmup_steps": 0}, **NOISE}
    config = StructLoraConfig(r=2, lora_alpha=4, target_modules=["0", "2", "4"], init_lora_weights=False, **options)
    model, x, other = get_structlora_model(base, config), *torch.randn(2, 16, 6, dtype=torch.float64)

    def training() -> torch.Tensor:
        return model(x).logsumexp(-1).mean()

    def held_out() -> torch.Tensor:
        return model(other).square().mean()

    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-2)  # which the lesson asks for its rates
    model.train()
    training().backward()
    optimizer.step()
    optimizer.zero_grad()
    levels, state = model.graph_pass.levels, torch.get_rng_state()
    model.teach(training, held_out, rate=0.0)
    found = levels.moments[0] / 0.1

    def after_a_step(shift: torch.Tensor, rate: float = 1e-3) -> float:
        kept = [p.detach().clone() for p in trained]
        torch.set_rng_state(state)
        with undisturbed(model.hooks):
            model.train()
            levels.decided.add_(shift.view(-1, 1))
            gradients = torch.autograd.grad(training(), trained, allow_unused=True)
            levels.decided.sub_(shift.view(-1, 1))
            with torch.no_grad():
                for p, g in zip(trained, gradients, strict=True):
                    p -= 0.0 if g is None else rate * g
                model.eval()
                value = held_out().item() / rate
                for p, old in zip(trained, kept, strict=True):
                    p.copy_(old)
        return value

    nodes = model.graph_pass.graph.num_nodes
    expected = []
    for k in range(nodes):
        shift = torch.zeros(nodes, dtype=torch.float64)
        shift[k] = 1e-3
        expected.append((after_a_step(shift) - after_a_step(-shift)) / 2e-3)
    own = found[1:].double()
    assert torch.nn.functional.cosine_similarity(own, torch.tensor(expected).double(), dim=0) > 0.999
    assert len(trained)
    assert levels.taught == 1


@pytest.mark.parametrize("levels", ["graph", "global", "free"])
def test_a_lesson_moves_the_levels_and_nothing_else(levels: str) -> None:
    model = noisy(levels, lora_dropout=0.2)
    optimizer = stepped(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    state, step = torch.get_rng_state(), model.graph_pass.step
    was = model.hooks.data.level.clone()
    for _ in range(2):
        model.teach(lambda: loss(model, TINY.batch()), lambda: loss(model, TINY.batch()), rate=0.5)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved
    assert all(".stages." in f".{n}" for n in moved)
    loss(model, TINY.batch()).backward()
    assert model.graph_pass.step == step + 1  # that of the last optimizer step, which no forward had seen
    assert (model.hooks.data.level - was).abs().max() > 0.05
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert not held & {id(p) for p in model.graph_pass.levels.parameters()}


def test_a_callback_teaches_in_the_trainer_and_leaves_its_random_numbers_alone(tmp_path: Path) -> None:
    examples = [{name: value[0] for name, value in TINY.batch().items()} for _ in range(16)]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=8, per_device_train_batch_size=4, report_to="none", save_strategy="no", use_cpu=True
    )

    def run(*every: int) -> tuple[StructLoraModel, list[float]]:
        model = noisy("global")
        trainer = Trainer(model=model, args=arguments, train_dataset=examples[:12])
        for count in every:
            trainer.add_callback(TeachLevels(trainer, examples[12:], every=count))
        trainer.train()
        return model, torch.rand(3).tolist()

    (plain, draws), (taught, same) = run(), run(2)
    assert draws == same
    assert plain.graph_pass.levels.taught == 0
    assert taught.graph_pass.levels.taught == 2  # of eight steps the first four
    assert (taught.adapter_graph().level - plain.adapter_graph().level).abs().max() > 0.02


def test_levels_go_on_from_a_checkpoint(tmp_path: Path) -> None:
    model = noisy()
    optimizer = stepped(model)
    model.teach(lambda: loss(model, TINY.batch()), lambda: loss(model, TINY.batch()))
    assert len(optimizer.state) > 0
    assert model.graph_pass.levels.taught == 1
    model.save_pretrained(str(tmp_path))
    again = StructLoraModel.from_pretrained(TINY.model(), tmp_path)
    for name, value in model.graph_pass.levels.state_dict().items():
        assert torch.equal(again.graph_pass.levels.state_dict()[name], value), name
    assert torch.equal(again.adapter_graph().level, model.adapter_graph().level)


def test_without_levels_to_teach_a_lesson_says_so_and_noise_that_cannot_act_is_refused() -> None:
    with pytest.raises(ValueError, match=r"filter\.noise"):
        adapt(TINY).teach(lambda: torch.zeros(()), lambda: torch.zeros(()))
    for noise, own, said in (
        (3.0, {}, "most_noise"),
        (-1.0, {}, "noise"),
        (0.0, {}, r"filter\.noise"),  # a coordinator that has nothing to do
        (0.0, {"lift": "tangent", "levels": "global"}, r"filter\.noise"),
    ):
        with pytest.raises(ConfigError, match=said):
            StructLoraConfig(coordinator=own, filter={"noise": noise})


def test_a_lesson_that_fails_leaves_the_model_as_it_was() -> None:
    model = noisy()
    optimizer = stepped(model)  # lessons need one that lives
    before = {n: (p.detach().clone(), p.requires_grad) for n, p in model.named_parameters()}
    for train_loss, held_out_loss in ((lambda: 1 / 0, lambda: loss(model, TINY.batch())), (lambda: 0, lambda: 1 / 0)):
        with pytest.raises(ZeroDivisionError):
            model.teach(train_loss, held_out_loss)
    assert model.training
    assert len(optimizer.param_groups) == 1
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name][0]), name
        assert p.requires_grad == before[name][1], name


def test_examples_held_out_are_in_no_step_until_they_return_and_all_are_then_in_every_epoch() -> None:
    order = Order(20, 4, seed=1, held_out=5)
    order.returned = 8
    early = {i for step in range(order.returned) for i in order.step(step)}
    assert early == set(range(20)) - set(order.held_out)
    for epoch in range(2):
        steps = range(order.returned + 5 * epoch, order.returned + 5 * (epoch + 1))
        assert sorted(i for step in steps for i in order.step(step)) == list(range(20))
    assert {i for step in range(5) for i in order.unseen(step, 3)} == set(order.held_out)
    assert len(order.unseen(2, 8)) == 5


def test_a_preset_gives_defaults_that_what_is_set_overrides(tmp_path: Path) -> None:
    config = StructLoraConfig(
        preset="paper", r=2, target_modules=TINY.targets, filter={"beta": 0.1}, encoding={"size": 4}
    )
    for again in (config, StructLoraConfig(**config.own_fields())):
        assert (again.filter.kind, again.filter.beta, again.filter.noise) == ("gumbel_sigmoid", 0.1, 0.0)
        assert (again.coordinator.lift, again.coordinator.bounded) == ("dense", False)
        assert (again.graph.node, again.encoding.size) == ("layer", 4)
    model = train(get_structlora_model(TINY.model(), config), TINY.batch())
    model.save_pretrained(str(tmp_path))
    with torch.no_grad():
        assert loss(StructLoraModel.from_pretrained(TINY.model(), tmp_path).eval(), TINY.batch()) == loss(
            model, TINY.batch()
        )
    with pytest.raises(ConfigError, match="Did you mean 'paper'"):
        StructLoraConfig(preset="papre")


@pytest.mark.parametrize("architecture", ["llama", "gpt2_slices", "pyg_gps"])
def test_levels_alone_are_decided_in_lessons_and_every_update_is_trained_as_by_a_whole_pass(architecture: str) -> None:
    tiny = ARCHITECTURES[architecture]
    found = []
    for whole in (False, True):
        model, graphs = noisy("graph", architecture).train(), []
        model.graph_pass.graph.register_forward_hook(lambda *_, graphs=graphs: graphs.append(1))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        torch.manual_seed(0)
        for step in range(6):
            if step == 3:
                model.teach(*2 * (partial(loss, model, tiny.batch()),), rate=0.5)
                graphs.clear()
            if whole:
                model.hooks._levels = None
            loss(model, tiny.batch()).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert len(graphs) == (3 if whole else 1)
        found.append([p.detach() for n, p in model.named_parameters() if "lora_" in n])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
