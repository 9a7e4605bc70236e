"""What must hold for every architecture: identity at the start, export, merge, frozen base, gradients everywhere."""

from __future__ import annotations

import pytest
import torch
from helpers.adapted import adapt, floats, train
from helpers.tiny import ARCHITECTURES, Tiny, logits, loss
from peft import PeftModel

from structlora_pyg import load_lora


@pytest.fixture(params=ARCHITECTURES)
def tiny(request: pytest.FixtureRequest) -> Tiny:
    return ARCHITECTURES[request.param]


@torch.no_grad()
def test_a_fresh_adapter_changes_nothing(tiny: Tiny) -> None:
    want = logits(tiny.model(), tiny.batch())
    torch.testing.assert_close(logits(adapt(tiny).eval(), tiny.batch()), want, atol=1e-5, rtol=1e-5)


EXPORTED = [(name, "GCNConv", dtype) for name in ARCHITECTURES for dtype in (torch.float32, torch.bfloat16)]
EXPORTED += [(name, conv, torch.float32) for name in ("llama", "pyg_gps") for conv in ("GATConv", "SAGEConv")]


@pytest.mark.parametrize(("name", "conv", "dtype"), EXPORTED)
def test_the_exported_folder_gives_the_training_time_forward_in_stock_peft(name, conv, dtype, tmp_path) -> None:
    tiny = ARCHITECTURES[name]
    batch = floats(tiny.batch(), dtype)
    model = train(adapt(tiny, conv, dtype), batch)
    with torch.no_grad():
        want, start = logits(model, batch), logits(tiny.model().to(dtype), batch)
    assert not torch.equal(want, start), "training moved nothing, so the comparison below would be empty"
    model.export(tmp_path)
    base = tiny.model().to(dtype)
    loaded = PeftModel.from_pretrained(base, str(tmp_path)) if tiny.stock else load_lora(base, tmp_path)
    tolerance = 1e-5 if dtype is torch.float32 else 6e-2
    with torch.no_grad():
        torch.testing.assert_close(logits(loaded.eval(), batch), want, atol=tolerance, rtol=tolerance)


def test_the_merged_model_has_the_exact_module_structure_of_the_base(tiny: Tiny) -> None:
    batch = tiny.batch()
    fresh = tiny.model()
    model = train(adapt(tiny), batch)
    with torch.no_grad():
        want = logits(model, batch)
        merged = model.merge_and_unload().eval()
        torch.testing.assert_close(logits(merged, batch), want, atol=1e-5, rtol=1e-4)
    assert [(n, type(m)) for n, m in merged.named_modules()] == [(n, type(m)) for n, m in fresh.named_modules()]
    assert list(merged.state_dict()) == list(fresh.state_dict())
    assert not merged._forward_hooks
    assert not merged._forward_pre_hooks


def test_base_weights_never_change(tiny: Tiny) -> None:
    before = tiny.model().state_dict()
    model = train(adapt(tiny), tiny.batch())
    weights = {n.replace(".base_layer", ""): v for n, v in model.get_base_model().state_dict().items()}
    for name, value in before.items():
        assert torch.equal(weights[name], value), name


def test_every_trainable_parameter_receives_a_gradient_within_a_few_steps(tiny: Tiny) -> None:
    model, batch = adapt(tiny, coordinator={"conv": "GCNConv", "lift": "basis", "hidden_channels": 8}), tiny.batch()
    model.train()
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2)
    moved = set()
    for _ in range(5):
        loss(model, batch).backward()
        moved |= {n for n, p in parameters.items() if p.grad is not None and p.grad.abs().sum() > 0}
        optimizer.step()
        optimizer.zero_grad()
    assert set(parameters) == moved


def test_one_graph_pass_per_forward(tiny: Tiny) -> None:
    model, batch = adapt(tiny), tiny.batch()
    model.train()
    for count in (1, 2, 3):
        logits(model, batch)
        assert model.hooks.passes == count


def test_the_graph_is_valid_data_with_one_node_per_adapter(tiny: Tiny) -> None:
    graph = adapt(tiny).adapter_graph()
    assert graph.validate(raise_on_error=True)
    assert graph.num_nodes == len(graph.name) == len(set(graph.name))
    assert graph.is_undirected()
    assert not graph.has_self_loops()
