"""What stock PEFT does with a layer, through its whole life, ours does too: every kind of layer, every call."""

import copy
import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.slow import slow_but
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora.config import BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from structlora_pyg import StructLoraConfig, get_structlora_model


class Net(nn.Module):
    """Two layers of a kind, one after the other."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.first, self.second = make(), make()
        self.kind = type(self.first)

    def forward(self, x: Tensor, **options) -> Tensor:
        for layer in (self.first, self.second):
            if self.kind is nn.MultiheadAttention:
                x = layer(x, x, x)[0]
            elif self.kind is nn.Embedding:
                x = layer(torch.arange(4), **options) + (x if layer is self.second else 0)
            else:
                x = layer(x, **options)
        return x


NUMBERS = torch.linspace(-1, 1, 4 * 8).view(4, 8)
IMAGES = torch.linspace(-1, 1, 4 * 4 * 9).view(4, 4, 3, 3)
PARAMETERS = {"target_modules": None, "target_parameters": ["first.weight", "second.weight"]}
KINDS: dict[str, tuple[Callable[[], nn.Module], Tensor, dict]] = {
    "linear": (lambda: nn.Linear(8, 8), NUMBERS, {}),
    "linear with lora_bias": (lambda: nn.Linear(8, 8), NUMBERS, {"lora_bias": True}),
    "linear without a bias for lora_bias": (lambda: nn.Linear(8, 8, bias=False), NUMBERS, {"lora_bias": True}),
    "rank patterns": (lambda: nn.Linear(8, 8), NUMBERS, {"rank_pattern": {"first": 2}, "use_rslora": True}),
    "Conv1D": (lambda: Conv1D(8, 8), NUMBERS, {}),
    "conv1d": (lambda: nn.Conv1d(4, 4, 3, padding=1), IMAGES[..., 0], {}),
    "conv2d": (lambda: nn.Conv2d(4, 4, 3, padding=1), IMAGES, {}),
    "grouped conv2d": (lambda: nn.Conv2d(4, 4, 3, padding=1, groups=2), IMAGES, {}),
    "embedding": (lambda: nn.Embedding(8, 8), torch.arange(4), {}),
    "attention": (lambda: nn.MultiheadAttention(8, 2), NUMBERS, {}),
    "parameter": (lambda: nn.Linear(8, 8), NUMBERS, PARAMETERS),
    "DoRA": (lambda: nn.Linear(8, 8), NUMBERS, {"use_dora": True}),
    "DoRA with rank patterns": (lambda: nn.Linear(8, 8), NUMBERS, {"use_dora": True, "rank_pattern": {"first": 2}}),
    "DoRA of conv2d": (lambda: nn.Conv2d(4, 4, 3, padding=1), IMAGES, {"use_dora": True}),
    "DoRA of an embedding": (lambda: nn.Embedding(8, 8), torch.arange(4), {"use_dora": True}),
    "BD-LoRA, A": (lambda: nn.Linear(8, 8), NUMBERS, {"use_bdlora": BdLoraConfig(["first", "second"])}),
    "BD-LoRA, B": (lambda: nn.Linear(8, 8), NUMBERS, {"use_bdlora": BdLoraConfig(None, ["first", "second"])}),
    "KaSA": (lambda: nn.Linear(8, 8), NUMBERS, {"kasa_config": KasaConfig(), "rank_pattern": {"first": 2}}),
    "MiCA": (lambda: nn.Linear(8, 8), NUMBERS, {"init_lora_weights": "mica"}),
    "MonteCLoRA": (lambda: nn.Linear(8, 8), NUMBERS, {"monteclora_config": MontecloraConfig()}),
    "VeLoRA": (lambda: nn.Linear(8, 8), NUMBERS, {"velora_config": VeloraConfig(num_groups=2)}),
}
USUAL = ("linear", "linear with lora_bias", "rank patterns", "conv2d", "embedding", "attention", "parameter", "DoRA")
# Filter and coordinator act from the first step on, and half of the gates are half closed.
ACTIVE = {
    "schedule": {"warmup_steps": 0},
    "graph": {"edges": "full"},
    "filter": {"kind": "hard_concrete", "init_logit": 0.5, "noise": 0.0},
    "coordinator": {"lift": "tangent"},
    "alarms": "off",
}


def config_of(kind: str, ours: bool) -> LoraConfig:
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["first", "second"], **copy.deepcopy(KINDS[kind][2])}
    return StructLoraConfig(**options, **ACTIVE) if ours else LoraConfig(**options)


def net(kind: str) -> Net:
    torch.manual_seed(0)
    return Net(KINDS[kind][0]).eval()


@functools.cache
def moved(kind: str, ours: bool) -> PeftModel:
    """Return a model whose adapter has moved away from its start."""
    model = (get_structlora_model if ours else get_peft_model)(net(kind), config_of(kind, ours)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".lora_" in name and p.requires_grad:
                p += 0.2 * torch.randn(p.shape, generator=generator)
        if ours:
            model.graph_pass.stages[0].gate_offset[::2, 0] = -1.0
            model.graph_pass.stages[-1].gain.fill_(0.8)
    return model


def in_place(model, x, want, base, kind, folder):
    model.merge_adapter()
    merged = model(x)
    model.unmerge_adapter()
    return [(merged, want), (model(x), want)]


def layer_by_layer(model, x, want, base, kind, folder):
    for layer in (model.base_model.model.first, model.base_model.model.second):
        layer.merge(safe_merge=True)
    return [(model(x), want)]


def away(model, x, want, base, kind, folder):
    return [(model.merge_and_unload(safe_merge=True)(x), want)]


def unloaded(model, x, want, base, kind, folder):
    return [(model.unload()(x), base)]


def disabled(model, x, want, base, kind, folder):
    with model.disable_adapter():
        off = model(x)
    return [(off, base), (model(x), want)]


def another(model, x, want, base, kind, folder):
    config = config_of(kind, hasattr(model, "graph_pass"))
    model.add_adapter("other", config)
    both = [model(x)]
    model.set_adapter("other")
    fresh = model(x)
    model.delete_adapter("default")
    both.append(model(x))
    return [(both[0], want), (fresh, both[1])]


def deleted(model, x, want, base, kind, folder):
    model.add_adapter("other", config_of(kind, hasattr(model, "graph_pass")))
    model.delete_adapter("other")
    return [(model(x), want)]


def combined(model, x, want, base, kind, folder):
    model.add_weighted_adapter(["default"], [1.0], "sum", combination_type="cat")
    model.set_adapter("sum")
    return [(model(x), want)]


def saved(model, x, want, base, kind, folder):
    model.save_pretrained(str(folder))
    return [(PeftModel.from_pretrained(net(kind), str(folder)).eval()(x), want)]


def given(model, x, want, base, kind, folder):
    other = get_peft_model(net(kind), config_of(kind, ours=False)).eval()
    set_peft_model_state_dict(other, get_peft_model_state_dict(model))
    return [(other(x), want)]


def mixed(model, x, want, base, kind, folder):
    got = model(x, adapter_names=["default", "__base__"] * 2)
    return [(got[0], want[0]), (got[1], base[1])]


CALLS = [in_place, layer_by_layer, away, unloaded, disabled, another, deleted, combined, saved, given, mixed]
# Where PEFT alone computes something else from what ours is: it adds an update twice, see `load_lora`.
ELSE = {("attention", call) for call in ("saved", "given")}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
@pytest.mark.parametrize("kind", slow_but(USUAL, KINDS))
def test_every_call_does_with_ours_what_it_does_with_stock_peft(kind: str, call: Callable, tmp_path: Path) -> None:
    ends = []
    with torch.no_grad():
        base = net(kind)(KINDS[kind][1])
        for ours in (False, True):
            model, x = copy.deepcopy(moved(kind, ours)), KINDS[kind][1]
            want = model(x)
            assert not torch.allclose(want, base, atol=1e-3)
            try:
                pairs = call(model, x, want, base, kind, tmp_path / str(ours))
                ends.append([torch.allclose(got, right, atol=1e-5) for got, right in pairs])
            except Exception as error:  # noqa: BLE001  # whatever stock PEFT says
                ends.append(type(error))
    if (kind, call.__name__) in ELSE:
        assert ends[1] == [False]
    else:
        assert ends[0] == ends[1]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["linear", "linear with lora_bias", "conv2d", "DoRA", "embedding"])
def test_a_base_in_half_precision_runs_and_trains_as_with_stock_peft(kind: str) -> None:
    outputs, x = [], KINDS[kind][1]
    x = x.bfloat16() if x.is_floating_point() else x
    for ours in (False, True):
        make, options = (get_structlora_model, {"warmup_steps": 1}) if ours else (get_peft_model, {})
        config = config_of(kind, ours)
        config.schedule = type(config.schedule)(**options) if ours else None
        model = make(net(kind).bfloat16(), config)
        outputs.append(model(x))
        outputs[-1].float().square().sum().backward()
    torch.testing.assert_close(outputs[1], outputs[0], atol=0.05, rtol=0.05)
