"""What must hold for every architecture: identity at the start, export, merge, frozen base, gradients everywhere."""

from pathlib import Path

import pytest
import torch
from helpers.adapted import adapt, floats, train
from helpers.slow import slow_but
from helpers.tiny import ARCHITECTURES, Tiny, logits, loss
from peft import PeftModel

from structlora_pyg import load_lora


@pytest.fixture(params=ARCHITECTURES)
def tiny(request: pytest.FixtureRequest) -> Tiny:
    return ARCHITECTURES[request.param]


def exported(model, tiny: Tiny, folder: Path, dtype: torch.dtype = torch.float32):
    """Return the exported folder as stock PEFT loads it."""
    model.export(folder)
    base = tiny.model().to(dtype)
    return (PeftModel.from_pretrained(base, str(folder)) if tiny.stock else load_lora(base, folder)).eval()


def test_an_adapter_begins_at_the_base_trains_and_ends_as_a_plain_lora_or_merged_weights(tiny: Tiny, tmp_path) -> None:
    batch, base, model = tiny.batch(), tiny.model(), adapt(tiny)
    with torch.no_grad():
        start = logits(base, batch)
        torch.testing.assert_close(logits(model.eval(), batch), start, atol=1e-5, rtol=1e-5)
    graph = model.adapter_graph()
    assert graph.validate(raise_on_error=True)
    assert graph.num_nodes == len(graph.name) == len(set(graph.name))
    assert graph.is_undirected()
    assert not graph.has_self_loops()
    before, moved = model.hooks.passes, set()
    trained = {n: p for n, p in model.train().named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    for _ in range(5):
        loss(model, batch).backward()
        moved |= {n for n, p in trained.items() if p.grad is not None and p.grad.abs().sum() > 0}
        optimizer.step()
        optimizer.zero_grad()
    assert moved == set(trained)  # every one has received a gradient
    assert model.hooks.passes == before + 5  # one a forward
    model.eval()
    weights = {n.replace(".base_layer", ""): v for n, v in model.get_base_model().state_dict().items()}
    assert [name for name, value in base.state_dict().items() if not torch.equal(weights[name], value)] == []
    with torch.no_grad():
        want = logits(model, batch)
        assert not torch.equal(want, start), "training moved nothing, so the comparisons below would be empty"
        torch.testing.assert_close(logits(exported(model, tiny, tmp_path), batch), want, atol=1e-5, rtol=1e-5)
        merged = model.merge_and_unload().eval()
        torch.testing.assert_close(logits(merged, batch), want, atol=1e-5, rtol=1e-4)
    assert [(n, type(m)) for n, m in merged.named_modules()] == [(n, type(m)) for n, m in base.named_modules()]
    assert list(merged.state_dict()) == list(base.state_dict())
    assert not merged._forward_hooks
    assert not merged._forward_pre_hooks


MORE = [(name, "GCNConv", torch.bfloat16) for name in ("llama", "timm_vit_slices", "t5", "pyg_gps")]
MORE += [("llama", "GATConv", torch.float32), ("pyg_gps", "SAGEConv", torch.float32)]


@pytest.mark.parametrize(("name", "conv", "dtype"), slow_but([MORE[0], MORE[-1]], MORE))
def test_other_convolutions_and_types_are_exported_too(name, conv, dtype, tmp_path) -> None:
    tiny = ARCHITECTURES[name]
    batch = floats(tiny.batch(), dtype)
    model = train(adapt(tiny, conv, dtype), batch)
    tolerance = 1e-5 if dtype is torch.float32 else 6e-2
    with torch.no_grad():
        want = logits(model, batch)
        loaded = exported(model, tiny, tmp_path, dtype)
        torch.testing.assert_close(logits(loaded, batch), want, atol=tolerance, rtol=tolerance)
