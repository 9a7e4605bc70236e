"""Which layers an adapter goes to: everything that PEFT adapts is a node, and a refusal names the option at fault."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from helpers.adapted import descend, full_config, train
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model, initialize_lora_eva_weights
from peft.utils import load_peft_weights
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from structlora_pyg import ConfigError, StructLoraConfig, StructLoraModel, get_structlora_model

OWN: dict[str, Any] = {"alarms": "off", "schedule": {"warmup_steps": 1}, "graph": {"refresh_every": 2}}


class Experts(nn.Module):
    """Three networks of two layers, each in one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = (nn.Parameter(torch.randn(3, *size) * 0.1) for size in ((8, 12), (12, 8)))

    def forward(self, h: Tensor) -> Tensor:
        return torch.einsum("btd,edf,efd->btd", h, self.up, self.down)


class Mixed(nn.Module):
    """One of every kind of layer that PEFT adapts."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.linear, self.experts = nn.Embedding(20, 8), nn.Linear(8, 8), Experts()
        self.conv, self.grouped = nn.Conv1d(8, 8, 3, padding=1), nn.Conv1d(8, 8, 3, padding=1, groups=2)
        self.image, self.head = nn.Conv2d(1, 1, 3, padding=1), nn.Linear(8, 3)

    def forward(self, input_ids: Tensor, labels: Tensor) -> SequenceClassifierOutput:
        h = self.embed(input_ids)
        h = h + self.linear(h) + self.experts(h) + self.conv(h.mT).mT + self.grouped(h.mT).mT
        y = self.head((h + self.image(h.unsqueeze(1)).squeeze(1)).mean(1))
        return SequenceClassifierOutput(logits=y, loss=nn.functional.cross_entropy(y, labels))


PLACES = {
    "a grouped convolution, one node for each group": ({"target_modules": ["grouped"]}, 2),
    "experts, one node for each": ({"target_parameters": ["experts.up", "experts.down"]}, 6),
    "DoRA on convolutions and an embedding": ({"target_modules": ["embed", "conv", "image"], "use_dora": True}, 3),
    "all at once": ({"target_modules": ["embed", "linear", "conv", "grouped", "image", "head"], "r": 4}, 7),
}


@pytest.mark.parametrize("name", PLACES)
def test_whatever_peft_adapts_is_coordinated_and_loads_in_stock_peft(name: str, tmp_path: Path) -> None:
    options, nodes = PLACES[name]
    torch.manual_seed(0)
    base = Mixed().eval()
    batch = {"input_ids": torch.randint(0, 20, (6, 5)), "labels": torch.randint(0, 3, (6,))}
    model = get_structlora_model(copy.deepcopy(base), full_config(**{"r": 2, "lora_alpha": 4, **options, **OWN}))
    assert len(model.graph_pass.adapters) == nodes
    before = [p.detach().clone() for p in model.graph_pass.parameters()]
    train(model, batch, steps=5).eval()
    assert any(not torch.equal(a, b) for a, b in zip(before, model.graph_pass.parameters(), strict=True))
    assert bool(model.graph_pass.sketch.average.any(1).all())  # every node has seen a gradient
    want = model(**batch).logits.detach()
    assert (want - base(**batch).logits).abs().max() > 1e-4
    model.export(tmp_path / "out")
    model.save_pretrained(str(tmp_path / "checkpoint"))
    stock = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "out").eval()
    torch.testing.assert_close(stock(**batch).logits, want)
    again = StructLoraModel.from_pretrained(copy.deepcopy(base), tmp_path / "checkpoint").eval()
    torch.testing.assert_close(again(**batch).logits, want)
    if "grouped" not in options.get("target_modules", []):  # PEFT cannot merge those
        if not options.get("use_dora"):
            updated, adapters = copy.deepcopy(base), model.graph_pass.adapters
            for path, layer in adapters.layers.items():
                layer_name = adapters.plain_name(path)
                weight = layer_name if getattr(layer, "parameter_name", None) else f"{layer_name}.weight"
                updated.get_parameter(weight).data += layer.get_delta_weight("default")
            torch.testing.assert_close(updated(**batch).logits, want)
        torch.testing.assert_close(model.merge_and_unload()(**batch).logits, want)


def test_an_export_whose_magnitudes_are_wrong_is_noticed(tmp_path: Path, monkeypatch) -> None:
    def spoiled(*args: Any, **kwargs: Any) -> dict[str, Tensor]:
        found = load_peft_weights(*args, **kwargs)
        return {key: value * (1.01 if "magnitude" in key else 1.0) for key, value in found.items()}

    batch = {"input_ids": torch.randint(0, 20, (6, 5)), "labels": torch.randint(0, 3, (6,))}
    for target in ("linear", "conv", "embed"):
        config = StructLoraConfig(r=2, lora_alpha=4, target_modules=[target], use_dora=True, **OWN)
        model = train(get_structlora_model(Mixed(), config), batch, steps=2)
        model.export(tmp_path / target)
        with monkeypatch.context() as patched:
            patched.setattr("structlora_pyg.tuner.export.load_peft_weights", spoiled)
            with pytest.raises(RuntimeError, match=f"from the export of {target}"):
                model.export(tmp_path / "spoiled")
        assert not (tmp_path / "spoiled").exists()


SMALL = {"n_layer": 1, "n_head": 4, "vocab_size": 50, "bos_token_id": 0, "eos_token_id": 0, "n_positions": 16}


@pytest.mark.parametrize("target", ["attn.c_proj", "c_attn"])
def test_dora_on_conv1d_follows_the_axis_of_the_weight_without_being_told(target: str, tmp_path: Path) -> None:
    base = hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=32, **SMALL)).eval()
    batch = {"input_ids": (ids := torch.randint(0, 50, (2, 7))), "labels": ids}
    config = StructLoraConfig(r=2, target_modules=[target], use_dora=True, **{**OWN, "graph": {"edges": "none"}})
    model = train(get_structlora_model(copy.deepcopy(base), config), batch, steps=3).eval()
    model.export(tmp_path)
    stock = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    torch.testing.assert_close(stock(ids).logits, model(ids).logits)


def test_fused_slices_are_cut_where_the_model_says_or_refused() -> None:
    config = StructLoraConfig(r=2, target_modules=["c_attn"], fused_slices=["q", "v"], alarms="off")
    shared = hf.GPTBigCodeForCausalLM(hf.GPTBigCodeConfig(n_embd=64, multi_query=True, **SMALL))
    rows = [(a.rows.start, a.rows.stop) for a in get_structlora_model(shared, config).graph_pass.adapters]
    assert rows == [(0, 64), (80, 96)]
    interleaved = hf.GPTBigCodeForCausalLM(hf.GPTBigCodeConfig(n_embd=64, multi_query=False, **SMALL))
    crossed = hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=48, add_cross_attention=True, **SMALL))
    for base in (interleaved, crossed):
        with pytest.raises(ConfigError, match="is not q, k and v one after the other"):
            get_structlora_model(base, config)


@pytest.mark.parametrize("targets", ["all-linear", r"^(model(?=\.).*\.(q_proj|gate_proj|up_proj|down_proj))$"])
def test_experts_that_were_layers_once_are_found_by_their_old_names_as_in_peft(targets: str) -> None:
    config = hf.Qwen3MoeConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, moe_intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, num_experts=2, num_experts_per_tok=1,
    )  # fmt: skip
    base, own, stock = hf.Qwen3MoeForCausalLM, StructLoraConfig(alarms="off"), LoraConfig()
    for options in (own, stock):
        options.r, options.target_modules = 2, targets
    ours = get_structlora_model(base(config), own)
    wanted = {n for n, _ in PeftModel(base(config), stock).named_parameters() if "lora_" in n}
    assert {n for n, _ in ours.named_parameters() if "lora_" in n} == wanted
    assert sum("experts" in a.name for a in ours.graph_pass.adapters) == 4


WRONG: dict[str, tuple[Any, str]] = {
    "exclude_modules": ({"target_modules": ["linear"], "exclude_modules": ["linear"]}, "exclude_modules="),
    "layers_to_transform": ({"target_modules": ["linear"], "layers_to_transform": [7]}, "layers_to_transform="),
    "modules_to_save": ({"target_modules": ["head"], "modules_to_save": ["head"]}, "modules_to_save="),
    "a name": ({"target_modules": ["linaer"]}, "'linaer' is not in the model. Did you mean 'linear'"),
    "a parameter": ({"target_parameters": ["experts.upp"]}, "target parameter 'experts.upp' is not in the model"),
    "no target": ({}, "Please specify `target_modules`"),
    "a variant": ({"target_modules": ["linear"], "use_qalora": True}, "use_qalora="),
    "a start": ({"target_modules": ["linear"], "init_lora_weights": "pisa"}, "init_lora_weights='pisa' is unknown"),
    "a lift": ({"target_modules": ["conv"], "coordinator": {"lift": "dense"}}, "coordinator.lift=dense"),
    "a typo": ({"lora_aplha": 4}, "lora_aplha: unknown setting. Did you mean 'lora_alpha'"),
    "a type": ({"lora_alpha": "four", "lora_dropout": "no"}, "lora_alpha: got 'four', expected a number"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_refusal_names_the_option_that_is_the_cause(name: str) -> None:
    options, message = WRONG[name]
    with pytest.raises(ConfigError) as caught:
        get_structlora_model(nn.Sequential(Mixed()), StructLoraConfig(**options))
    assert message in str(caught.value)
    assert len(caught.value.problems) == len([k for k in ("lora_dropout",) if k in options]) + 1


def test_names_that_are_not_there_are_named_and_the_others_adapted() -> None:
    """As by stock PEFT, which gets one list of names for many models."""
    base, options = Mixed(), {"target_modules": ["linear", "haed"], "target_parameters": ["head.weight", "wieght"]}
    nn.utils.parametrize.register_parametrization(base.head, "weight", nn.Identity())
    with pytest.warns(RuntimeWarning) as said:
        model = get_structlora_model(base, StructLoraConfig(r=2, base_model_name_or_path="mine", **options))
    for text in ("'haed' is not in the model. Did you mean 'head'", "'wieght' is not", "renamed from 'mine' to 'None'"):
        assert any(text in str(w.message) for w in said), text
    assert {a.name for a in model.graph_pass.adapters} == {"linear", "head.weight"}


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_2", "OLoRA"])
def test_a_start_that_rewrites_the_base_is_saved_converted_and_resumed_as_by_stock_peft(start: str, tmp_path) -> None:
    torch.manual_seed(0)
    base, x = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8)).eval(), torch.randn(5, 8)
    options = {"target_modules": ["0", "2"], "rank_pattern": {"2": 2}, "init_lora_weights": start}
    config = StructLoraConfig(r=4, **options, **OWN)
    model = get_structlora_model(copy.deepcopy(base), config)
    model.save_pretrained(str(tmp_path / "start"))
    torch.testing.assert_close(model.eval()(x), base(x))
    descend(model.train().parameters(), lambda: model(x).square().mean())
    with torch.no_grad():
        want = model.eval()(x)
        model.export(tmp_path / "export")
        model.save_pretrained(str(tmp_path / "saved"))
        model.save_pretrained(str(tmp_path / "plain"), path_initial_model_for_weight_conversion=str(tmp_path / "start"))
        for folder in ("export", "saved", "plain") if "niter" not in start else ("plain",):  # its draw has no seed
            stock = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / folder)).eval()
            torch.testing.assert_close(stock(x), want, atol=1e-5, rtol=1e-4)
        resumed = StructLoraModel.from_pretrained(copy.deepcopy(base), tmp_path / "saved").eval()
        assert torch.equal(resumed(x), want)
        torch.testing.assert_close(model.merge_and_unload()(x), want, atol=1e-5, rtol=1e-4)
    failing = copy.deepcopy(base)
    with pytest.raises(ValueError, match="NoSuch"):
        get_structlora_model(failing, dataclasses.replace(config, coordinator={"conv": "NoSuchConv"}))
    assert torch.equal(failing(x), base(x))


@pytest.mark.parametrize("rho", [1.0, 2.0])
def test_a_start_from_the_activations_is_that_of_stock_peft(rho: float, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = Mixed().eval()
    batch = {"input_ids": torch.randint(0, 20, (16, 5)), "labels": torch.randint(0, 3, (16,))}
    common = {"r": 2, "target_modules": ["linear", "head"], "init_lora_weights": "eva"}
    common["eva_config"] = EvaConfig(rho=rho)
    stock = get_peft_model(copy.deepcopy(base), LoraConfig(**common))
    ours = get_structlora_model(copy.deepcopy(base), StructLoraConfig(**common, **OWN))
    for model in (stock, ours):
        initialize_lora_eva_weights(
            model, [batch] * 4, prepare_model_inputs_fn=None, prepare_layer_inputs_fn=flat, show_progress_bar=False
        )
    wanted = {n: p for n, p in stock.named_parameters() if "lora_A" in n}
    torch.testing.assert_close({n: p for n, p in ours.named_parameters() if "lora_A" in n}, wanted)
    assert [a.r for a in ours.graph_pass.adapters] == [len(p) for p in wanted.values()]
    want = train(ours, batch, steps=3)(**batch).logits.detach()
    ours.save_pretrained(str(tmp_path))
    again = StructLoraModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    torch.testing.assert_close(again(**batch).logits, want)
    torch.testing.assert_close(PeftModel.from_pretrained(base, tmp_path).eval()(**batch).logits, want)


def flat(layer_input: Any, model_input: Any, layer_name: str) -> Tensor:
    """Return the inputs of a layer as rows."""
    x = layer_input[0] if isinstance(layer_input, tuple) else layer_input
    return x.reshape(-1, x.size(-1))


def test_layers_registered_by_the_user_are_built() -> None:
    from peft.tuners.lora import Linear

    class Mine(Linear):
        pass

    config = StructLoraConfig(r=2, target_modules=["linear"], alarms="off")
    config._register_custom_module({nn.Linear: Mine})
    model = get_structlora_model(Mixed(), config)
    assert type(model.get_base_model().linear) is Mine


def test_a_parameter_can_be_taken_out_and_put_back_as_fsdp_does() -> None:
    model = get_structlora_model(Mixed(), StructLoraConfig(r=2, target_modules=["linear"], alarms="off"))
    side = model.get_base_model().linear.lora_A["default"]
    parameter = side.weight
    del side.weight
    assert not hasattr(side, "weight")
    side.weight = view = parameter.detach().clone()
    assert side.weight is view is side.raw
    side.weight = parameter
    assert side.weight is parameter is dict(side.named_parameters())["weight"]
