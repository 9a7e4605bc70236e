"""QLoRA: 4-bit bases that train, evaluate, export and merge as they should, on CPU."""

import copy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as hf
from helpers.adapted import descend
from helpers.tiny import LLAMA, logits, loss
from peft import LoraConfig, PeftModel, get_peft_model
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, RobertaConfig

from structlora_pyg import ConfigError, StructLoraConfig, StructLoraModel, get_structlora_model
from structlora_pyg.tuner.factor import Factor
from structlora_pyg.tuner.quantization import NF4, dequantize_4bit, guard_4bit, quantize_4bit

bnb = pytest.importorskip("bitsandbytes")

WIDE = LlamaConfig(**{**LLAMA, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2})
GPT2 = GPT2Config(
    n_embd=64, n_layer=2, n_head=2, vocab_size=64, n_positions=32, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
    bos_token_id=1, eos_token_id=2,
)  # fmt: skip
PLACES = ("attn.qkv.base_layer", "attn.proj", "mlp.fc1", "mlp.fc2")


def build(maker: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return maker().eval()


def llama() -> nn.Module:
    return build(lambda: hf.LlamaForCausalLM(WIDE))


def vit() -> nn.Module:
    return build(lambda: VisionTransformer(img_size=8, patch_size=4, embed_dim=64, depth=2, num_heads=2, num_classes=2))


def batch() -> dict:
    torch.manual_seed(1)
    ids = torch.randint(4, 64, (2, 9))
    return {"input_ids": ids, "labels": ids}


def structlora(base: nn.Module, **changes) -> StructLoraModel:
    options = {"schedule": {"warmup_steps": 1, "ramp_steps": 2}, "coordinator": {"hidden_channels": 8}, **changes}
    return get_structlora_model(
        base, StructLoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **options})
    )


def train(model: nn.Module, data: dict, steps: int = 6) -> list[float]:
    losses = []

    def value() -> torch.Tensor:
        losses.append(loss(model, data))
        return losses[-1]

    descend(model.train().parameters(), value, steps, lr=2e-2)
    model.eval()
    return [float(each.detach()) for each in losses]


def four_bit(model: nn.Module) -> dict[str, nn.Module]:
    return {n: m for n, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)}


def stored(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: m.weight.data.clone() for n, m in four_bit(model).items()}


def test_linear_layers_become_four_bit_and_keep_their_values_up_to_nf4_rounding() -> None:
    model, original = quantize_4bit(llama()), llama()
    layers = four_bit(model)
    assert set(layers) == {n for n, m in original.named_modules() if type(m) is nn.Linear and n != "lm_head"}
    for name, layer in layers.items():
        weight = original.get_submodule(name).weight
        assert layer.weight.dtype is torch.uint8
        assert layer.weight.numel() == weight.numel() // 2  # two a byte
        got = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        assert 0.05 < float((got - weight).norm() / weight.norm()) < 0.12
    for name, p in original.named_parameters():
        if not name.endswith("proj.weight"):
            assert torch.equal(model.get_parameter(name), p), name


@pytest.mark.parametrize("maker", [llama, lambda: build(lambda: hf.GPT2LMHeadModel(GPT2))], ids=["llama", "gpt2"])
def test_the_dequantised_model_computes_what_the_four_bit_one_does(maker) -> None:
    model = quantize_4bit(maker())
    with torch.no_grad():
        want = logits(model, batch())
        plain = dequantize_4bit(model)
        assert not four_bit(plain)
        torch.testing.assert_close(logits(plain, batch()), want, atol=1e-5, rtol=1e-4)
        assert 0.001 < float((want - logits(maker(), batch())).norm() / want.norm()) < 0.5


def test_evaluation_does_not_change_weights_or_stop_training() -> None:
    model = get_peft_model(quantize_4bit(llama()), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    before = stored(model)
    for _ in range(2):
        with torch.no_grad():
            model.eval()(**batch())
        model.train()
        model.zero_grad()
        model(**batch()).loss.backward()
        grads = [p.grad for n, p in model.named_parameters() if "lora_B" in n]
        assert all(g is not None and float(g.abs().sum()) > 0 for g in grads)
    for name, weight in stored(model).items():
        assert torch.equal(weight, before[name]), name


def test_the_guard_undoes_repacking_that_has_happened() -> None:
    model = quantize_4bit(llama())
    before = stored(model)
    layers = four_bit(model).values()
    for layer in layers:
        layer.support_avx512bf16_for_cpu = bnb.nn.modules.has_avx512bf16()
    with torch.no_grad():
        model(**batch())
    packed = any(getattr(layer.weight.quant_state, "packing_format_for_cpu", False) for layer in layers)
    guard_4bit(model)
    for name, weight in stored(model).items():
        assert torch.equal(weight.flatten(), before[name].flatten()), name
    if not packed:
        pytest.skip("bitsandbytes repacks nothing on this CPU")


def test_widths_that_this_cpu_reads_wrongly_are_refused_before_anything_is_replaced() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 64))
    weight = torch.randn(64, 48) * torch.logspace(-1, 1, 64).unsqueeze(1)
    packed, state = bnb.functional.quantize_4bit(weight, quant_type="nf4")
    error = float((bnb.functional.dequantize_4bit(packed, state) - weight).norm() / weight.norm())
    if error < 0.12:
        quantize_4bit(base)
        pytest.skip("bitsandbytes reads a width of 48 as it should on this CPU")
    with pytest.raises(ValueError, match=r"4-bit weights with 48 input features wrongly on this CPU.*keep="):
        quantize_4bit(base)
    assert not four_bit(base)
    assert set(four_bit(quantize_4bit(base, keep=["1"]))) == {"0"}


def test_transformers_quantises_the_same_layers_to_the_same_values_while_loading(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "lm")
    model = guard_4bit(AutoModelForCausalLM.from_pretrained(tmp_path / "lm", quantization_config=NF4)).eval()
    assert stored(model).keys() == stored(quantize_4bit(llama())).keys()
    with torch.no_grad():
        expected = logits(quantize_4bit(llama()), batch())
        torch.testing.assert_close(logits(model, batch()), expected, atol=1e-4, rtol=1e-3)
    config = RobertaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, vocab_size=64
    )
    classifier = quantize_4bit(build(lambda: hf.RobertaForSequenceClassification(config)))
    assert len(four_bit(classifier)) == 2 * 6
    assert not any(name.startswith("classifier") for name in four_bit(classifier))


@pytest.mark.parametrize("checkpointed", [False, True], ids=["float32", "bfloat16, checkpointed"])
def test_structlora_trains_on_peft_layers_with_coordinated_factors_and_the_base_stays_four_bit(checkpointed) -> None:
    base = quantize_4bit(llama().bfloat16() if checkpointed else llama())
    if checkpointed:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    model = structlora(base)
    layers = model.graph_pass.adapters.layers.values()
    assert {type(layer).__module__ for layer in layers} == {"peft.tuners.lora.bnb"}
    assert all(isinstance(layer.lora_A["default"], Factor) for layer in layers)
    before = stored(model)
    losses = train(model, batch(), 10)
    assert losses[-1] < losses[0] - 0.05
    after = stored(model)
    assert len(after) == 2 * 7
    for name, weight in after.items():
        assert weight.dtype is torch.uint8
        assert torch.equal(weight, before[name]), name
    assert not any(p.requires_grad for n, p in model.named_parameters() if "base_layer" in n)


def test_slices_of_fused_projections_train_on_four_bit_timm_models(tmp_path) -> None:
    data = {"x": torch.randn(2, 3, 8, 8)}
    model = structlora(quantize_4bit(vit()), target_modules=["qkv"], fused_slices=["q", "v"])
    before = stored(model)
    assert set(before) == {f"base_model.model.blocks.{i}.{n}" for i in range(2) for n in PLACES}
    losses = train(model, data, 12)
    assert losses[-1] < losses[0]
    assert all(torch.equal(weight, before[name]) for name, weight in stored(model).items())
    model.export(tmp_path)
    with torch.no_grad():
        want = logits(model, data)
        merged = PeftModel.from_pretrained(dequantize_4bit(quantize_4bit(vit())), str(tmp_path)).merge_and_unload()
        torch.testing.assert_close(logits(merged, data), want, atol=1e-4, rtol=1e-3)


def test_the_export_fits_the_four_bit_base_and_merges_exactly_into_the_dequantised_one(tmp_path) -> None:
    model = structlora(quantize_4bit(llama()))
    train(model, batch())
    with torch.no_grad():
        want, start = logits(model, batch()), logits(quantize_4bit(llama()), batch())
    assert not torch.allclose(want, start, atol=1e-3)
    model.export(tmp_path)
    on_four_bit = PeftModel.from_pretrained(quantize_4bit(llama()), str(tmp_path)).eval()
    on_float = PeftModel.from_pretrained(dequantize_4bit(quantize_4bit(llama())), str(tmp_path)).eval()
    with torch.no_grad():
        torch.testing.assert_close(logits(on_four_bit, batch()), want, atol=1e-4, rtol=1e-3)
        rounded = [logits(m.merge_and_unload(), batch()) for m in (on_four_bit, copy.deepcopy(model))]
        torch.testing.assert_close(rounded[1], rounded[0], atol=1e-4, rtol=1e-3)  # as stock PEFT rounds
        merged = on_float.merge_and_unload()
        assert not four_bit(merged)
        torch.testing.assert_close(logits(merged, batch()), want, atol=1e-4, rtol=1e-3)


def test_without_bitsandbytes_the_error_names_the_extra(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    for call in (quantize_4bit, guard_4bit, dequantize_4bit):
        with pytest.raises(ConfigError, match=r"pip install 'structlora-pyg\[quant\]'"):
            call(llama())


def test_models_that_cannot_be_quantised_or_dequantised_are_refused_and_left_alone() -> None:
    with pytest.raises(ValueError, match="no linear layer to quantise"):
        quantize_4bit(nn.Sequential(nn.ReLU()))
    with pytest.raises(ValueError, match="no 4-bit layer"):
        dequantize_4bit(llama())
    model = llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN or infinite"):
        quantize_4bit(model)
    assert not four_bit(model)
    adapted = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="has adapters already; quantise the base first"):
        quantize_4bit(adapted)
    adapted = structlora(quantize_4bit(llama()))
    with pytest.raises(ValueError, match="has an adapter: export the adapter"):
        dequantize_4bit(adapted.get_base_model())
    assert four_bit(adapted)
