"""Pretrained graph networks as the base: PyG's linear layers, torch's attention inside GPS layers, weights by type."""

import copy

import pytest
import torch
import torch_geometric.nn as pyg_nn
import torch_geometric.typing
from helpers.adapted import PLAIN, adapt, full_config, randomise, train
from helpers.tiny import ARCHITECTURES, GPS, HGT, Tiny, logits
from peft import PeftModel
from torch import Tensor, nn
from torch_geometric.explain import AttentionExplainer, Explainer, GNNExplainer
from torch_geometric.utils import get_embeddings, get_num_hops

from structlora_pyg import ConfigError, StructLoraConfig, get_structlora_model, load_lora
from structlora_pyg.tuner.alarms import PATIENCE
from structlora_pyg.tuner.layers import base_weight

TINY_GPS = ARCHITECTURES["pyg_gps"]


class Attends(nn.Module):
    """Attention of torch, masked, with its weights as a second result."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(12, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.zeros(x.shape[:2], dtype=torch.bool)
        hidden[:, -1] = True
        y, weights = self.attn(x, x, x, key_padding_mask=hidden)
        return y.square().mean() + weights.square().mean()


class Relational(nn.Module):
    """Weights of all relations (or layers), and of all types, in one parameter each."""

    def __init__(self, conv=pyg_nn.RGCNConv, **options) -> None:
        super().__init__()
        sizes = (8, 2) if conv is pyg_nn.GatedGraphConv else (8, 8, 3)
        self.convs = nn.ModuleList(conv(*sizes, **options) for _ in range(2))
        self.types, self.head = pyg_nn.HeteroLinear(8, 4, 2), pyg_nn.Linear(4, 2)

    def forward(self, x: Tensor, edge_index: Tensor, edge_type: Tensor) -> Tensor:
        types = () if isinstance(self.convs[0], pyg_nn.GatedGraphConv) else (edge_type,)
        for conv in self.convs:
            x = conv(x, edge_index, *types).relu()
        return self.head(self.types(x, torch.arange(len(x)) % 2))[:2]


def fits(model: nn.Module, **options) -> str:
    with pytest.raises(ConfigError) as caught:
        get_structlora_model(model, StructLoraConfig(r=2, lora_alpha=4, **options))
    return str(caught.value)


def test_attention_is_the_attention_of_the_updated_weights_to_float64_precision() -> None:
    torch.manual_seed(0)
    base, x = Attends().double(), torch.randn(2, 5, 12, dtype=torch.float64)
    config = StructLoraConfig(r=3, lora_alpha=5, target_modules=["attn"], **PLAIN)
    model = get_structlora_model(copy.deepcopy(base), config).train()
    randomise(model)
    value = model(x)
    value.backward()
    dense = copy.deepcopy(base)
    twins, deltas = (dense.attn.in_proj_weight, dense.attn.out_proj.weight), []
    for adapter, weight in zip(model.graph_pass.adapters, twins, strict=True):
        A, B = (p.detach().clone().requires_grad_() for p in model.graph_pass.adapters.pair(adapter))
        deltas.append((A, B))
        weight.data += 5 / 3 * (B @ A).detach()
    want = dense(x)
    want.backward()
    torch.testing.assert_close(value, want)
    layers = model.graph_pass.adapters.layers.values()
    for layer, weight, (A, B) in zip(layers, twins, deltas, strict=True):
        torch.testing.assert_close(layer.lora_A["default"].weight.grad, 5 / 3 * B.T @ weight.grad)
        torch.testing.assert_close(layer.lora_B["default"].weight.grad, 5 / 3 * weight.grad @ A.T)
    adapted = model.get_base_model().attn.get_base_layer()
    assert torch.equal(adapted.in_proj_weight, base.attn.in_proj_weight)
    assert torch.equal(adapted.out_proj.weight, base.attn.out_proj.weight)


@pytest.mark.parametrize("ragged", [False, True])
def test_a_loaded_attention_can_be_switched_off_merged_and_unmerged(ragged: bool, tmp_path) -> None:
    batch, base = TINY_GPS.batch(), TINY_GPS.model()
    model = train(adapt(TINY_GPS, alarms="error"), batch, steps=PATIENCE + 2)
    model.export(tmp_path, ragged=ragged)
    loaded = load_lora(TINY_GPS.model(), tmp_path).eval()
    with torch.no_grad():
        want, start = logits(model, batch), logits(base, batch)
        with loaded.disable_adapter():
            assert torch.equal(logits(loaded, batch), start)
        for change in (loaded.merge_adapter, loaded.unmerge_adapter):
            change()
            torch.testing.assert_close(logits(loaded, batch), want, atol=1e-5, rtol=1e-4)
        merged = loaded.merge_and_unload()
        torch.testing.assert_close(logits(merged, batch), want, atol=1e-5, rtol=1e-4)
    assert list(merged.state_dict()) == list(base.state_dict())


def test_slices_of_an_attention_change_no_other_rows() -> None:
    fresh = TINY_GPS.model()
    tiny = Tiny(TINY_GPS.build, TINY_GPS.inputs, ["attn"], ["q", "v"])
    model = train(adapt(tiny), tiny.batch())
    assert [a.name for a in model.graph_pass.adapters][:3] == [f"convs.0.attn{x}" for x in ("[q]", "[v]", ".out_proj")]
    with torch.no_grad():
        want = logits(model, tiny.batch())
        merged = model.merge_and_unload().eval()
        torch.testing.assert_close(logits(merged, tiny.batch()), want, atol=1e-5, rtol=1e-4)
    moved = (merged.convs[0].attn.in_proj_weight - fresh.convs[0].attn.in_proj_weight).abs().view(3, -1).amax(1)
    assert (moved > 0).tolist() == [True, False, True]


def test_gradient_edges_see_the_true_gradients_of_an_attention() -> None:
    model = adapt(TINY_GPS, graph={"edges": "gradient", "refresh_every": 1}).double().train()
    layers = model.graph_pass.adapters.layers
    for layer in layers.values():
        base_weight(layer).requires_grad_(True)
    logits(model, TINY_GPS.batch() | {"x": TINY_GPS.batch()["x"].double()}).square().sum().backward()
    sketch = model.graph_pass.sketch
    width = max(a.in_features for a in model.graph_pass.adapters)
    for i, adapter in enumerate(model.graph_pass.adapters):
        want = base_weight(layers[adapter.layer]).grad
        got = sketch.pending[i][: adapter.out_features * width].view(-1, width)[:, : adapter.in_features].to(want)
        cosine = torch.cosine_similarity(got.flatten(), want.flatten(), dim=0)  # its length does not matter
        assert float(cosine) == pytest.approx(1.0, abs=1e-5), adapter.name


def test_all_linear_reaches_every_layer_of_a_gps_stack_in_roles_that_are_places_in_a_block() -> None:
    model = adapt(Tiny(GPS, TINY_GPS.inputs, "all-linear"), modules_to_save=["head"])
    inside = [f"convs.*.{x}" for x in ("conv.nn.lins.0", "attn", "attn.out_proj", "mlp.0", "mlp.3")]
    assert model.graph_pass.adapters.roles == ["embed", *inside]
    assert all(a.block == f"convs.{a.depth}" for a in model.graph_pass.adapters if a.name != "embed")
    parts = {f"convs.*.{p}.lins.{kind}" for p in ("kqv_lin", "out_lin") for kind in ("paper", "author")}
    assert {a.role for a in adapt(ARCHITECTURES["pyg_hgt"]).graph_pass.adapters} == parts
    language = adapt(ARCHITECTURES["llama"], target_modules="all-linear")
    assert len(language.graph_pass.adapters) == 21  # its head is spared


STACKED = {
    "RGCN": ({}, 3, "all-linear"),
    "bases": ({"num_bases": 2}, 2, ["convs.0", "types"]),
    "RGAT": ({"conv": pyg_nn.RGATConv}, 3, "all-linear"),
    "GatedGraph": ({"conv": pyg_nn.GatedGraphConv}, 2, ["convs.0", "types"]),
}


@pytest.mark.parametrize("kind", STACKED)
def test_stacked_weights_are_a_node_for_every_matrix_and_the_card_says_how_they_load(kind: str, tmp_path) -> None:
    options, matrices, targets = STACKED[kind]

    def inputs() -> dict:
        generator = torch.Generator().manual_seed(0)
        edge_index = torch.randint(0, 10, (2, 30), generator=generator)
        x = torch.randn(10, 8, generator=generator)
        return {"x": x, "edge_index": edge_index, "edge_type": torch.arange(30) % 3}

    tiny = Tiny(lambda: Relational(**options), inputs, targets)
    model = train(adapt(tiny, graph={"edges": "full"}), inputs())
    names = {a.name for a in model.graph_pass.adapters}
    assert {"types.weight[0]", "types.weight[1]"} < names
    assert ("convs.0.root" in names) == ("conv" not in options)
    assert f"convs.0.weight[{matrices - 1}]" in names
    assert f"convs.0.weight[{matrices}]" not in names
    want = logits(model, inputs())
    assert not torch.allclose(want, logits(tiny.model(), inputs()))
    assert model.export(tmp_path)["relative_error"] < 1e-6
    torch.testing.assert_close(logits(load_lora(tiny.model(), tmp_path).eval(), inputs()), want)
    card, whole = (tmp_path / "README.md").read_text(), targets == "all-linear"
    assert ("PEFT alone cannot load it" in card) == whole
    if whole:
        with pytest.raises(ValueError, match="not supported"):
            PeftModel.from_pretrained(tiny.model(), tmp_path)
    else:
        torch.testing.assert_close(logits(PeftModel.from_pretrained(tiny.model(), tmp_path), inputs()), want)


def test_layers_whose_adapters_would_be_silently_idle_are_refused(monkeypatch) -> None:
    hgt = ARCHITECTURES["pyg_hgt"].build
    assert "read as a weight" in fits(hgt(), target_modules=["k_rel"], lora_dropout=0.1)
    assert "target the attention itself, convs.0.attn" in fits(GPS(), target_modules=["out_proj"])
    assert "no effect on convs.0.attn" in fits(GPS(), target_modules=["attn", "mlp.0"], lora_dropout=0.1)
    encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    assert "set_fastpath_enabled(False)" in fits(nn.Sequential(encoder), target_modules=["linear1"])
    monkeypatch.setattr(torch_geometric.typing, "WITH_GMM", True)
    monkeypatch.setattr("torch_geometric.backend.use_segment_matmul", True)
    assert "use_segment_matmul = False" in fits(HGT(), target_modules=["kqv_lin"])


def test_targets_that_are_no_layers_are_refused_with_the_layers_inside() -> None:
    said = fits(GPS(), target_modules=["convs.1"], lora_bias=True)
    assert "convs.1 is a GPSConv, not a layer; target layers inside: convs.1.conv.nn.lins.0, convs.1.mlp.0" in said
    said = fits(GPS(), target_parameters=["embed.wieght"])
    assert "target parameter 'embed.wieght' is not in the model. Did you mean 'weight'?" in said
    assert "LightGCN has no linear layer" in fits(pyg_nn.LightGCN(4, 4, 1), target_modules="all-linear")
    assert "set num_blocks=None" in fits(Relational(num_blocks=2), target_modules="all-linear")
    assert "lora_bias=True has no effect on convs.0.attn" in fits(GPS(), target_modules=["attn"], lora_bias=True)


def test_sparse_features_give_what_dense_ones_give() -> None:
    base = nn.Sequential(pyg_nn.Linear(5, 8), pyg_nn.Linear(8, 2))
    model = get_structlora_model(base, StructLoraConfig(r=2, lora_alpha=4, target_modules=["0"], **PLAIN))
    randomise(model)
    x = torch.randn(4, 5).relu()
    torch.testing.assert_close(model(x.to_sparse()), model(x))


def test_shared_and_lazy_layers_are_refused_and_adapted_once_they_are_separate_and_real() -> None:
    gat = pyg_nn.GAT(5, 16, 2, v2=True, heads=2, share_weights=True)
    assert "convs.0.lin_l and convs.0.lin_r are one module" in fits(gat, target_modules=["lin_l", "lin_r"])
    for conv in gat.convs:
        conv.lin_r = copy.deepcopy(conv.lin_l)
    lazy = nn.Sequential(pyg_nn.Linear(-1, 4), pyg_nn.Linear(4, 2))
    said = fits(lazy, target_modules=["1"])
    assert "lazy" in said
    assert "torch.no_grad()" in said
    lazy(torch.randn(3, 5))
    for base, targets, count in ((gat, ["lin_l", "lin_r"], 4), (lazy, ["0", "1"], 2)):
        model = get_structlora_model(base, StructLoraConfig(r=2, lora_alpha=4, target_modules=targets))
        assert len(model.graph_pass.adapters) == count


def test_tools_of_pyg_see_the_layers_of_the_network_and_not_those_of_the_coordinator(tmp_path) -> None:
    torch.manual_seed(0)
    x, edge_index = torch.randn(20, 8), torch.randint(0, 20, (2, 40))
    net = pyg_nn.GAT(8, 16, 3)
    config = full_config(r=2, lora_alpha=4, target_modules=["lin"], coordinator={"conv": "GATConv"})
    model = get_structlora_model(copy.deepcopy(net), config)
    randomise(model)
    inner = model.graph_pass.stages[-1].convs[0]
    assert any(module is inner for _, module in model.named_modules())
    assert {id(p) for p in inner.parameters()} <= {id(p) for p in model.parameters()}
    kind = {"explanation_type": "model", "edge_mask_type": "object"}
    kind["model_config"] = {"mode": "multiclass_classification", "task_level": "node", "return_type": "raw"}
    for one in (model, net):
        assert get_num_hops(one) == 3
        assert [tuple(e.shape) for e in get_embeddings(one, x, edge_index)] == [(20, 16)] * 3
        for algorithm in (AttentionExplainer(), GNNExplainer(epochs=2)):
            assert Explainer(one, algorithm, **kind)(x, edge_index, index=3).edge_mask.shape == (40,)
        assert one(x, edge_index).shape == (20, 16)
