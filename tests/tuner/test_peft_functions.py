"""What PEFT's own functions read, write, merge and combine is what the model computes."""

import copy
import json

import peft
import pytest
import torch
from helpers.adapted import adapt, descend, full_config, train
from helpers.tiny import ARCHITECTURES, LLAMA, logits, loss
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from structlora_pyg import StructLoraConfig, StructLoraModel, get_structlora_model

TINY = ARCHITECTURES["llama"]
BATCH = TINY.batch()
FIRST = {"warmup_steps": 0, "ramp_steps": 0}
HALF = {"init_logit": 0.5}  # gates that are not 1 from the first step on


@pytest.fixture(scope="module", params=[0, 1], ids=["active from the first step", "after a warm-up"])
def trained(request) -> StructLoraModel:
    """A model whose coordinated factors are not its parameters."""
    schedule = {"warmup_steps": request.param, "ramp_steps": 0}
    model = train(adapt(TINY, filter=HALF, schedule=schedule), BATCH, lr=5e-2)
    with torch.no_grad():
        model.graph_pass.stages[0].gate_offset[::2, 0] = -1.0
        model.graph_pass.stages[-1].gain.fill_(0.8)
    return model


def plain(**changes) -> PeftModel:
    return get_peft_model(TINY.model(), LoraConfig(r=2, lora_alpha=4, target_modules=TINY.targets, **changes)).eval()


def from_a_given_state_dict(model):
    other = plain()
    set_peft_model_state_dict(other, get_peft_model_state_dict(model, state_dict=copy.deepcopy(model.state_dict())))
    return other


def merged_below(model):
    return model.base_model.merge_and_unload(safe_merge=True)


def from_delta_weights(model):
    base = TINY.model()
    for path, layer in model.graph_pass.adapters.layers.items():
        base.get_submodule(path).weight.data += layer.get_delta_weight("default")
    return base


def weighted(kind):
    def combined(model):
        model.add_weighted_adapter(["default"], [1.0], "copy", combination_type=kind)
        model.set_adapter("copy")
        return model

    return combined


def reference(model):
    """What TRL's trainers do with a model that is trained further."""
    model.add_adapter("ref", model.peft_config["default"])
    for name, p in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(p.data)
    model.set_adapter("ref")
    return model


def back_and_forth(model):
    model.add_adapter("other", LoraConfig(r=2, target_modules=TINY.targets))
    model.set_adapter("other")
    assert not any(p.requires_grad for p in model.graph_pass.parameters())
    model.set_adapter("default")
    assert all(p.requires_grad for p in model.graph_pass.parameters())
    return model


def its_own_plain_weights(model):
    if not model.graph_pass.warmup_steps:
        pytest.skip("refused, see the test below")
    set_peft_model_state_dict(model, get_peft_model_state_dict(model))
    assert model.state_dict()
    assert model.graph_pass.step == 0
    return model


READERS = [from_a_given_state_dict, merged_below, from_delta_weights, reference, back_and_forth, its_own_plain_weights]
READERS = {f.__name__: f for f in READERS} | {f"weighted {k}": weighted(k) for k in ("linear", "svd")}


@pytest.mark.parametrize("how", READERS)
def test_whatever_reads_the_adapter_gets_what_the_model_computes(how: str, trained: StructLoraModel) -> None:
    for inner in (trained.base_model, trained.get_base_model()):
        assert all(".lora_" in key for key in get_peft_model_state_dict(inner))
    with torch.no_grad():
        want = logits(trained, BATCH)
        got = logits(READERS[how](copy.deepcopy(trained)).eval(), BATCH)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)
    factor = next(iter(trained.graph_pass.adapters.layers.values())).lora_B["default"]
    assert not torch.allclose(factor.current(), factor.weight, atol=1e-3)  # the parameter alone is something else


@pytest.mark.parametrize("by", ["loading", "hot-swapping"])
@pytest.mark.parametrize("possible", [True, False], ids=["in a warm-up", "half open from the first step"])
def test_weights_of_a_plain_lora_act_as_they_are_or_are_refused(by: str, possible: bool, tmp_path) -> None:
    file = plain(init_lora_weights=False)
    file.save_pretrained(tmp_path)
    model = train(adapt(TINY, filter=HALF, schedule={"warmup_steps": 2} if possible else FIRST), BATCH)
    if by == "loading":
        set_peft_model_state_dict(model, get_peft_model_state_dict(file))
    else:
        hotswap_adapter(model, str(tmp_path), "default", torch_device="cpu")
    with torch.no_grad():
        if possible:
            torch.testing.assert_close(logits(model, BATCH), logits(file, BATCH))
        else:
            with pytest.raises(ValueError, match=r"would change them.*load_training_state"):
                logits(model, BATCH)


@pytest.mark.parametrize("kind", [nn.Linear, nn.Conv2d])
def test_adapters_of_other_ranks_are_hot_swapped_into_a_model_prepared_for_it(kind: type, tmp_path) -> None:
    def base() -> nn.Module:
        torch.manual_seed(0)
        layers = [nn.Linear(8, 8) if kind is nn.Linear else nn.Conv2d(8, 8, 3, padding=1) for _ in range(2)]
        return nn.Sequential(*layers).eval()

    x = torch.randn((5, 8) if kind is nn.Linear else (5, 8, 3, 3))
    config = full_config(r=3, target_modules=["0", "1"], filter=HALF, schedule={"warmup_steps": 1})
    model = get_structlora_model(base(), config)
    descend(model.parameters(), lambda: model(x).square().mean(), lr=5e-2)
    with torch.no_grad():
        model.eval().graph_pass.stages[0].gate_offset[::2, 0] = -1.0
        want = model(x)
        prepare_model_for_compiled_hotswap(model, target_rank=6)
        torch.testing.assert_close(model(x), want, atol=1e-5, rtol=1e-4)  # what was trained is kept
        for r in (6, 2):
            other = LoraConfig(r=r, target_modules=["0", "1"], init_lora_weights=False)
            stock = get_peft_model(base(), other).eval()
            stock.save_pretrained(str(tmp_path / str(r)))
            hotswap_adapter(model, str(tmp_path / str(r)), "default", torch_device="cpu")
            torch.testing.assert_close(model(x), stock(x), atol=1e-5, rtol=1e-4)


def test_every_coordinated_adapter_has_a_graph_pass_of_its_own(tmp_path) -> None:
    model = train(adapt(TINY, task_type="CAUSAL_LM"), BATCH)
    config = StructLoraConfig(r=3, target_modules=["o_proj", "q_proj"], schedule=FIRST, filter=HALF)
    model.add_adapter("second", config)
    with torch.no_grad():
        first = logits(model, BATCH)
    model.set_adapter("second")
    assert model.structlora_config is config
    train(model, BATCH, lr=5e-2)
    with torch.no_grad():
        second = logits(model, BATCH)
        model.save_pretrained(str(tmp_path))
        for folder, want in ((tmp_path, first), (tmp_path / "second", second)):
            stock = PeftModel.from_pretrained(TINY.model(), str(folder)).eval()
            torch.testing.assert_close(logits(stock, BATCH), want, atol=1e-5, rtol=1e-4)
        model.set_adapter("default")
        torch.testing.assert_close(logits(model, BATCH), first)
        model.delete_adapter("default")
        torch.testing.assert_close(logits(model, BATCH), second)
        assert list(model.base_model.graph_passes) == ["second"]
        resumed = StructLoraModel.from_pretrained(TINY.model(), tmp_path / "second", "second", is_trainable=False)
        torch.testing.assert_close(logits(resumed, BATCH), second)
    assert not any(p.requires_grad for p in resumed.parameters())
    model.delete_adapter("second")
    with pytest.raises(LookupError, match="no coordinated adapter"):
        _ = model.graph_pass


def test_a_graph_pass_rests_while_its_adapter_is_disabled_or_another_stands_in_its_place(tmp_path) -> None:
    model = train(adapt(TINY), BATCH, lr=5e-2).train()
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    with model.disable_adapter():
        assert not any(p.requires_grad for p in model.parameters())
    assert [n for n, p in model.named_parameters() if p.requires_grad] == trained
    with torch.no_grad():
        want = logits(model.eval(), BATCH)
        model.save_pretrained(str(tmp_path))
        again = PeftModel.from_pretrained(model.get_base_model(), str(tmp_path)).eval()  # under the same name
        torch.testing.assert_close(logits(again, BATCH), want, atol=1e-5, rtol=1e-4)


class Shared(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(self.inner(x)).relu())


def test_merging_leaves_a_module_alone_that_shares_the_weight() -> None:
    tied = LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=True)).eval()
    for base, targets, x in (
        (Shared(), ["inner", "first"], {"x": torch.randn(4, 8)}),
        (tied, ["q_proj", "lm_head"], {"input_ids": torch.arange(10)[None]}),
    ):
        config = StructLoraConfig(r=2, target_modules=targets, schedule=FIRST, graph={"edges": "full"})
        model = get_structlora_model(base, config).train()
        descend(model.parameters(), lambda m=model, x=x: logits(m, x).square().mean(), lr=5e-2)
        with torch.no_grad():
            want = logits(model.eval(), x)
            torch.testing.assert_close(logits(model.merge_and_unload().eval(), x), want, atol=1e-5, rtol=1e-4)
    assert not tied.config.tie_word_embeddings


def resized(folder, seed: int):
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(seed)
    model.resize_token_embeddings(70, mean_resizing=False)  # the new rows are random: another process has others
    return model.eval()


@pytest.mark.parametrize(("tied", "indices"), [(False, None), (True, [66, 67])], ids=["", "tied, trainable tokens"])
def test_an_enlarged_vocabulary_is_saved_as_by_stock_peft(tied: bool, indices: list | None, tmp_path) -> None:
    LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=tied)).save_pretrained(tmp_path / "base")
    ids = torch.tensor([[1, 2, 66, 67, 68]])
    config = StructLoraConfig(r=2, target_modules=TINY.targets, trainable_token_indices=indices, schedule=FIRST)
    model = train(get_structlora_model(resized(tmp_path / "base", 1), config), {"input_ids": ids, "labels": ids})
    with torch.no_grad():
        want = model(input_ids=ids).logits
        model.save_pretrained(str(tmp_path / "saved"))
        model.export(tmp_path / "export")
        for load, folder in ((PeftModel, "saved"), (PeftModel, "export"), (StructLoraModel, "saved")):
            again = load.from_pretrained(resized(tmp_path / "base", 2), str(tmp_path / folder)).eval()
            torch.testing.assert_close(again(input_ids=ids).logits, want, atol=1e-5, rtol=1e-4)


def test_a_folder_names_its_base_and_loads_by_itself(tmp_path) -> None:
    TINY.model().save_pretrained(tmp_path / "base")
    for task, auto in ((None, peft.AutoPeftModel), ("CAUSAL_LM", peft.AutoPeftModelForCausalLM)):
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        config = full_config(r=2, target_modules=TINY.targets, task_type=task, schedule=FIRST, filter=HALF)
        model = train(get_structlora_model(base, config, revision="main"), BATCH)
        model.export(tmp_path / "export")
        model.save_pretrained(str(tmp_path / "saved"))
        for folder in ("export", "saved"):
            with torch.no_grad():
                loaded = auto.from_pretrained(str(tmp_path / folder)).eval()
                torch.testing.assert_close(logits(loaded, BATCH), logits(model, BATCH), atol=1e-5, rtol=1e-4)
            values = json.loads((tmp_path / folder / "adapter_config.json").read_text())
            assert values["base_model_name_or_path"] == str(tmp_path / "base")
            assert values["revision"] == "main"
            card = (tmp_path / folder / "README.md").read_text()
            assert card.count("## StructLoRA") == 1
            assert all(text in card for text in ("IBFilter", "PeftModel.from_pretrained", "2603.14228", "base_model:"))


def test_arguments_of_save_pretrained_are_followed(tmp_path) -> None:
    model = train(adapt(TINY, filter=HALF, schedule=FIRST), BATCH)
    model.save_pretrained(str(tmp_path / "bin"), False)
    assert not (tmp_path / "bin" / "adapter_model.safetensors").exists()
    with torch.no_grad():
        loaded = PeftModel.from_pretrained(TINY.model(), str(tmp_path / "bin")).eval()
        torch.testing.assert_close(logits(loaded, BATCH), logits(model, BATCH), atol=1e-5, rtol=1e-4)
    model.save_pretrained(str(tmp_path / "embeddings"), save_embedding_layers=True)
    keys = {k for k in load_file(tmp_path / "embeddings" / "adapter_model.safetensors") if ".lora_" not in k}
    assert keys == {"base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"}
    zeros = {k: torch.zeros_like(v) for k, v in model.state_dict().items()}
    model.save_pretrained(str(tmp_path / "zeros"), state_dict=zeros)
    assert not any(v.any() for v in load_file(tmp_path / "zeros" / "adapter_model.safetensors").values())
    model.save_pretrained(str(tmp_path / "nothing"), is_main_process=False)
    assert not (tmp_path / "nothing").exists()


def test_every_adapter_of_a_classifier_has_a_head_of_its_own(tmp_path) -> None:
    tiny = ARCHITECTURES["roberta"]
    model = adapt(tiny, task_type="SEQ_CLS")
    assert isinstance(model, peft.PeftModelForSequenceClassification)
    model.add_adapter("new", LoraConfig(r=2, target_modules=tiny.targets, task_type="SEQ_CLS"))
    model.set_adapter("new")
    train(model, tiny.batch())
    with torch.no_grad():
        want = logits(model, tiny.batch())
        model.save_pretrained(str(tmp_path))
        loaded = PeftModel.from_pretrained(tiny.model(), str(tmp_path))
        loaded.load_adapter(str(tmp_path / "new"), "new")
        loaded.set_adapter("new")
        torch.testing.assert_close(logits(loaded.eval(), tiny.batch()), want)
        config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["classifier", "score"]


GOOD = {"r": 2, "target_modules": TINY.targets}
BAD = {
    "unknown convolution": {"coordinator": {"conv": "NoSuchConv"}},
    "wrong arguments of one": {"coordinator": {"conv": "GCNConv", "conv_kwargs": {"nonsense": 1}}},
    "unknown transform": {"graph": {"transforms": ["Nope"]}},
    "unknown embedding": {"trainable_token_indices": {"embed": [1]}},
    "a norm as target": {"target_modules": ".*(q_proj|norm)"},
}


@pytest.mark.parametrize("what", BAD)
def test_a_call_that_fails_leaves_the_model_as_it_was(what: str) -> None:
    base = TINY.model()

    def facts(model: nn.Module):
        hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
        return [*model.named_modules()], [(n, p.requires_grad) for n, p in model.named_parameters()], hooks

    before = facts(base)
    with pytest.raises(Exception) as first:  # noqa: PT011
        get_structlora_model(base, StructLoraConfig(**GOOD | BAD[what]))
    assert facts(base) == before
    model = train(get_structlora_model(base, StructLoraConfig(**GOOD)), BATCH)
    before = facts(model)
    with pytest.raises(type(first.value)):
        model.add_adapter("second", StructLoraConfig(**GOOD | BAD[what]))
    assert facts(model) == before
    assert list(model.peft_config) == list(model.get_base_model().peft_config) == ["default"]
    loss(model.train(), BATCH).backward()


def test_shards_that_were_not_gathered_are_named_and_nothing_is_written(tmp_path) -> None:
    model = adapt(TINY)
    (first, *_) = model.graph_pass.adapters.layers.values()
    first.lora_A["default"].weight.data = torch.zeros(32)
    with pytest.raises(ValueError, match="shards of DeepSpeed ZeRO-3 / FSDP for factors; gather them first"):
        model.save_pretrained(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_what_is_no_base_no_configuration_or_no_name_is_refused_with_the_way_out() -> None:
    base = TINY.model()
    for config, said in ((GOOD, r"is a dict.*StructLoraConfig\(\*\*config\)"), (LoraConfig(**GOOD), "is a LoraConfig")):
        with pytest.raises(TypeError, match=said):
            get_structlora_model(base, config)
    model = get_structlora_model(base, StructLoraConfig(**GOOD))
    for again in (base, model):
        with pytest.raises(ValueError, match=r"PeftModel already.*unload\(\).*add_adapter"):
            get_structlora_model(again, StructLoraConfig(**GOOD))
    with pytest.warns(UserWarning, match="Adapter name 'lora' should not be contained in the prefix 'lora_'"):
        get_structlora_model(model.unload(), StructLoraConfig(**GOOD), "lora")
