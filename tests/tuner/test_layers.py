"""The adapted layers against stock PEFT, and every path that could bypass the graph pass."""

import copy
import dataclasses
import pickle
from collections.abc import Callable

import pytest
import torch
from helpers.adapted import PLAIN, adapt, full_config, randomise, train
from helpers.tiny import ARCHITECTURES, LLAMA, logits, loss
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.func import functional_call, grad, jvp, vmap
from transformers import LlamaConfig, LlamaForCausalLM

from structlora_pyg import StructLoraConfig, get_structlora_model
from structlora_pyg.tuner.layers import AdaptedLinear, FusedLinear

TINY, ROBERTA = ARCHITECTURES["llama"], ARCHITECTURES["roberta"]


@pytest.mark.parametrize("name", ["llama", "gpt2", "roberta", "t5"])
def test_without_filter_and_coordinator_it_is_stock_lora_to_float64_precision(name: str) -> None:
    tiny = ARCHITECTURES[name]
    options = {"r": 3, "lora_alpha": 5, "target_modules": tiny.targets}
    ours = get_structlora_model(tiny.model().double(), StructLoraConfig(**options, **PLAIN)).train()
    stock = get_peft_model(tiny.model().double(), LoraConfig(**options)).train()
    for model in (ours, stock):
        randomise(model)
    results = []
    for model in (ours, stock):
        torch.manual_seed(5)
        value = logits(model, tiny.batch()).square().mean()
        value.backward()
        results.append((value, {n: p.grad for n, p in model.named_parameters() if "lora_" in n}))
    (value_a, grads_a), (value_b, grads_b) = results
    torch.testing.assert_close(value_a, value_b, atol=1e-12, rtol=1e-12)
    assert grads_a.keys() == grads_b.keys()
    for key in grads_a:
        torch.testing.assert_close(grads_a[key], grads_b[key], atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize(
    ("bias", "needs_x", "noisy", "drops"),
    [(False, False, False, True), (True, True, False, False), (False, True, True, True), (True, False, True, False)],
)
def test_derivatives_of_the_fused_function_are_exact(bias: bool, needs_x: bool, noisy: bool, drops: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=needs_x)
    A, B = (torch.randn(*size, dtype=torch.float64).requires_grad_() for size in ((2, 4), (6, 2)))
    W, b = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, dtype=torch.float64) if bias else None
    noise = torch.rand(2, 5, dtype=torch.float64).requires_grad_() if noisy else None
    mask, keep = (torch.rand(5, 4) < 0.6, 0.6) if drops else (None, 1.0)
    fused = lambda x, A, B, n: AdaptedLinear.apply(x, W, b, A, B, 0.7, n, mask, keep)  # noqa: E731
    y, codes = fused(x, A, B, noise)
    h = x if mask is None else x * mask / keep
    heard = codes.T if noise is None else (codes * noise).T
    torch.testing.assert_close(y, torch.nn.functional.linear(x, W, b) + 0.7 * heard @ B.T)
    torch.testing.assert_close(codes, A @ h.T)
    for use in (lambda *f: fused(*f)[0], lambda *f: fused(*f)[1]):
        assert torch.autograd.gradcheck(use, (x, A, B, noise))
    assert torch.autograd.gradgradcheck(fused, (x, A, B, noise))


def test_dropout_inside_the_layer_drops_its_share_in_training_alone() -> None:
    config = StructLoraConfig(r=1, lora_alpha=1, target_modules=["0"], lora_dropout=0.3, **PLAIN)
    model = get_structlora_model(nn.Sequential(nn.Linear(1, 1)), config)
    randomise(model)
    layer, x = model.graph_pass.adapters.layers["0"], torch.ones(40_000, 1)
    update = float((layer.lora_B["default"].weight @ layer.lora_A["default"].weight).detach())
    with torch.no_grad():
        y = (model.train()(x) - layer.base_layer(x)) / update
        torch.testing.assert_close(model.eval()(x), layer.base_layer(x) + update)
    assert float((y.abs() < 1e-3).float().mean()) == pytest.approx(0.3, abs=0.01)
    assert float(y.mean()) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
def test_inputs_without_tokens_pass_through(shape: tuple[int, ...], dropout: float) -> None:
    config = StructLoraConfig(r=2, lora_alpha=4, target_modules=["0"], lora_dropout=dropout, graph={"edges": "none"})
    model = get_structlora_model(nn.Sequential(nn.Linear(8, 6)), config).train()
    y = model(torch.zeros(shape))
    y.sum().backward()
    assert y.shape == (*shape[:-1], 6)


def saved_bytes(model: nn.Module, run: Callable[[], torch.Tensor]) -> int:
    """Memory that autograd keeps for the backward pass, without the weights themselves."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        alive = run()
    del alive
    return sum(kept.values())


def test_what_is_kept_for_the_backward_pass_does_not_grow_with_the_tokens_beyond_stock_lora() -> None:
    options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
    for dtype, most in ((torch.float32, 1.001), (torch.bfloat16, 0.8)):  # stock LoRA casts the inputs to float32
        stock = get_peft_model(TINY.model().to(dtype), LoraConfig(**options)).train()
        ours = get_structlora_model(TINY.model().to(dtype), full_config(**options)).train()
        growth = []
        for model in (stock, ours):
            few, many = (
                saved_bytes(model, lambda m=model, n=n: m(input_ids=torch.ones(n, 32, dtype=torch.long)).logits.sum())
                for n in (2, 34)
            )
            growth.append(many - few)
        assert growth[1] <= most * growth[0]


def hooked(model: nn.Module) -> None:
    next(m for m in model.modules() if isinstance(m, FusedLinear)).base_layer.register_forward_hook(lambda *_: None)


def biased(model: nn.Module) -> None:
    for m in model.modules():
        if isinstance(m, FusedLinear) and m.base_layer.bias is not None:
            m.base_layer.bias.requires_grad_(True)


@pytest.mark.parametrize("spoil", [hooked, biased])
def test_base_layers_that_somebody_watches_or_trains_are_called(spoil: Callable[[nn.Module], None]) -> None:
    plain, spoiled = (train(adapt(ROBERTA), ROBERTA.batch(), steps=2) for _ in range(2))
    spoil(spoiled)
    calls: list[str] = []
    names = {m.base_layer: n for n, m in spoiled.named_modules() if isinstance(m, FusedLinear)}
    for layer in names if spoil is hooked else ():
        layer.register_forward_hook(lambda m, *_: calls.append(names[m]))
    values = []
    for model in (plain, spoiled):
        value = loss(model, ROBERTA.batch())
        value.backward()
        values.append(value)
    torch.testing.assert_close(values[1], values[0])
    if spoil is hooked:
        assert len(calls) == len(names)
    else:
        assert all(layer.bias.grad is not None for layer in names if layer.bias is not None)


def test_hooks_on_base_layers_see_what_the_layer_returned_and_may_use_it_in_a_loss() -> None:
    model = train(adapt(TINY), TINY.batch(), steps=2).train()
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    for layer in model.graph_pass.adapters.layers.values():
        layer.base_layer.register_forward_hook(lambda m, args, y: seen.append((y, y.detach().clone())))
    value = loss(model, TINY.batch())
    assert len(seen) == 6
    for y, at_first in seen:
        assert y.dim() == 3
        assert torch.equal(y, at_first)
    (value + sum(y.square().mean() for y, _ in seen)).backward()


@pytest.mark.slow
def test_compiled_layers_train_alike_without_a_graph_break_or_a_compilation_for_each() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    deep = LlamaConfig(**{**LLAMA, "num_hidden_layers": torch._dynamo.config.recompile_limit + 2}, use_cache=False)
    tiny = dataclasses.replace(ARCHITECTURES["llama"], build=lambda: LlamaForCausalLM(deep))
    runs = []
    for compiled in (False, True):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        model = adapt(tiny, graph={"refresh_every": 3}).double()
        for layer in model.get_base_model().model.layers if compiled else ():
            layer.compile(backend=counter, fullgraph=True)
        train(model, tiny.batch(), steps=8)
        assert int(model.graph_pass.sketch.refreshes) > 1
        assert model.hooks.passes == 8
        runs.append([p.detach() for p in model.parameters()])
        # The input of the first layer needs no gradient; all others share one compilation.
        assert counter.frame_count == (2 if compiled else 0)
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-9)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:`torch.jit.trace:DeprecationWarning")
@pytest.mark.parametrize("options", [{"lora_dropout": 0.1}, {"use_dora": True}], ids=["dropout", "dora"])
def test_functional_transforms_and_tracing_give_what_autograd_gives(options: dict) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    config = StructLoraConfig(r=2, target_modules=["0", "2"], schedule={"warmup_steps": 0}, alarms="off", **options)
    model = get_structlora_model(base, config)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for p in trained.values():
        nn.init.normal_(p.data, std=0.3)
    x, detached = torch.randn(3, 8), {n: p.detach() for n, p in trained.items()}

    def value(parameters: dict[str, torch.Tensor], row: torch.Tensor) -> torch.Tensor:
        return functional_call(model, parameters, (row[None],)).square().mean()

    vmap(grad(value), (None, 0), randomness="different")(detached, x)  # in training mode too
    model.eval()
    each = vmap(grad(value), (None, 0))(detached, x)
    direction = {n: torch.randn_like(p) for n, p in detached.items()}
    for i, row in enumerate(x):
        wanted = torch.autograd.grad(model(row[None]).square().mean(), list(trained.values()))
        for name, gradient in zip(trained, wanted, strict=True):
            torch.testing.assert_close(each[name][i], gradient)
        _, slope = jvp(lambda q, row=row: value(q, row), (detached,), (direction,))
        torch.testing.assert_close(slope, sum((g * direction[n]).sum() for n, g in zip(trained, wanted, strict=True)))
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.trace(model, (x,))(2 * x), model(2 * x))


def test_adapter_can_be_disabled_and_costs_nothing_then() -> None:
    batch, base = TINY.batch(), TINY.model()
    model = train(adapt(TINY), batch)
    count = model.hooks.passes
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(logits(model, batch), logits(base, batch))
    assert model.hooks.passes == count


def test_a_second_plain_adapter_adds_its_update_to_the_coordinated_one() -> None:
    batch = TINY.batch()
    model = train(adapt(TINY), batch)
    with torch.no_grad():
        one = logits(model, batch)
        model.add_adapter("second", LoraConfig(r=2, target_modules=TINY.targets))
        model.base_model.set_adapter(["default", "second"])
        torch.testing.assert_close(logits(model, batch), one)  # its lora_B is 0
        for name, p in model.named_parameters():
            if "lora_B.second" in name:
                p.normal_()
        both = logits(model, batch)
        model.set_adapter("second")
        second = logits(model, batch)
        model.set_adapter("default")
        back = logits(model, batch)
    torch.testing.assert_close(back, one)
    assert not torch.allclose(both, one, atol=1e-3)
    assert not torch.allclose(both, second, atol=1e-3)


def test_non_reentrant_checkpointing_gives_the_same_gradients() -> None:
    batch, gradients = TINY.batch(), []
    for checkpointing in (False, True):
        model = train(adapt(TINY), batch).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.zero_grad()
        loss(model, batch).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], value, atol=1e-6, rtol=1e-5, msg=name)


def test_reentrant_checkpointing_is_refused_with_the_fix() -> None:
    model = adapt(TINY).train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(RuntimeError, match="use_reentrant"):
        loss(model, TINY.batch()).backward()


def test_a_part_of_a_forward_without_gradients_is_refused_with_the_fix() -> None:
    class Siamese(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor, detached: bool) -> torch.Tensor:
            if detached:
                target = self.encoder(x).detach()
            else:
                with torch.no_grad():
                    target = self.encoder(x)
            return (self.encoder(x) - target).square().sum()

    options = {"r": 2, "lora_alpha": 4, "target_modules": ["encoder"], "graph": {"edges": "none"}}
    get_structlora_model(Siamese(), StructLoraConfig(**options)).train()(torch.randn(3, 8), detached=False).backward()
    gated = StructLoraConfig(**options, filter={"kind": "hard_concrete"}, coordinator={"conv": "none"})
    model = get_structlora_model(Siamese(), gated).train()
    with pytest.raises(RuntimeError, match=r"torch\.no_grad\(\).*detach\(\)"):
        model(torch.randn(3, 8), detached=False)
    model(torch.randn(3, 8), detached=True).backward()


def test_data_parallel_is_refused_with_the_way_to_go() -> None:
    layer = next(iter(adapt(ARCHITECTURES["llama"]).graph_pass.adapters.layers.values()))
    with pytest.raises(RuntimeError, match=r"DataParallel.*accelerate launch"):
        layer.lora_A["default"]._replicate_for_data_parallel()  # what it does with every module, on several GPUs


@pytest.mark.parametrize("name", ["llama", "t5", "gpt2"])
def test_generate_runs_on_one_graph_pass(name: str, tmp_path) -> None:
    tiny = ARCHITECTURES[name]
    batch = tiny.batch()
    model = train(adapt(tiny), batch)
    count = model.hooks.passes
    ids = model.generate(input_ids=batch["input_ids"], max_new_tokens=6, do_sample=False, use_cache=True)
    assert model.hooks.passes - count == 1
    merged = model.merge_and_unload().eval()
    assert torch.equal(ids, merged.generate(input_ids=batch["input_ids"], max_new_tokens=6, do_sample=False))


def test_generate_and_a_submodule_called_on_its_own_use_current_factors() -> None:
    tiny = ARCHITECTURES["t5"]  # generate calls its encoder before the model itself
    batch = tiny.batch()
    model = train(adapt(tiny), batch).train()
    loss(model, batch).backward()
    encoder, ids = model.get_base_model().encoder, {"input_ids": batch["input_ids"]}
    with torch.no_grad():
        before = encoder(**ids).last_hidden_state
        for p in model.graph_pass.adapters.parameters():
            p.add_(0.3)
        assert not torch.allclose(before, encoder(**ids).last_hidden_state)
    got = model.eval().generate(**ids, max_new_tokens=6, do_sample=False)
    want = model.merge_and_unload().eval().generate(**ids, max_new_tokens=6, do_sample=False)
    assert torch.equal(got, want)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_are_complete_independent_and_know_of_the_last_optimizer_step(copier) -> None:
    tiny = ARCHITECTURES["timm_vit_slices"]
    batch = tiny.batch()
    model = train(adapt(tiny), batch, steps=3)
    for m in (copier(model), model):
        loss(m.train(), batch)  # leaves factors of a live autograd graph behind
        assert m.graph_pass.step == 3
    twin = copier(model)
    for m in (model, twin):
        train(m, batch, steps=2)
    with torch.no_grad():
        torch.testing.assert_close(logits(twin, batch), logits(model, batch))
        for p in twin.graph_pass.adapters.parameters():
            p.zero_()
        assert not torch.equal(logits(twin, batch), logits(model, batch))


def test_autocast_stays_close_to_float32_and_half_precision_leaves_the_graph_pass_alone() -> None:
    batch = ROBERTA.batch()
    model = train(adapt(ROBERTA), batch).train()
    plain = loss(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = loss(model, batch)
    mixed.backward()
    torch.testing.assert_close(mixed.float(), plain, atol=2e-2, rtol=2e-2)
    model.bfloat16()
    assert {p.dtype for p in model.graph_pass.parameters()} == {torch.float32}
    assert logits(model.eval(), batch).dtype is torch.bfloat16


def test_noise_is_kept_in_the_place_of_the_codes() -> None:
    def kept(noise: torch.Tensor | None) -> int:
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()), lambda x: x):
            AdaptedLinear.apply(x, torch.randn(8, 6), None, A, torch.randn(8, 2), 1.0, noise)
        return sum(sizes)

    x, A = torch.randn(10, 6, requires_grad=True), torch.randn(2, 6, requires_grad=True)
    assert kept(torch.ones(2, 10)) == kept(None)
