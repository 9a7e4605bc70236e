"""Bounds on what numbers may lose on the way out, over random shapes, ranks, dtypes, lifts, and the devices at hand."""

import tempfile
from itertools import pairwise
from pathlib import Path

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from structlora_pyg import StructLoraConfig, StructLoraModel, get_structlora_model
from structlora_pyg.tuner.graph_pass import plain_factors

UNIT = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}  # largest relative rounding error
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
FEW = settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))


class Stack(nn.Module):
    def __init__(self, widths: list[int], dtype: torch.dtype) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b, dtype=dtype) for a, b in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


@st.composite
def trained(draw: st.DrawFn) -> StructLoraModel:
    """A model of random widths and type whose gates are half closed and whose messages act."""
    widths = draw(st.lists(st.integers(5, 24), min_size=3, max_size=5))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    config = StructLoraConfig(
        r=draw(st.integers(1, 4)), lora_alpha=draw(st.sampled_from([1, 4, 16])), target_modules=r"layers\.\d+",
        encoding={"size": 4}, schedule={"warmup_steps": 0}, graph={"edges": "full"}, filter={"init_logit": 0.0},
        coordinator={"lift": draw(st.sampled_from(["tangent", "project"]))},
    )  # fmt: skip
    base = Stack(widths, draw(st.sampled_from(list(UNIT)))).to(draw(st.sampled_from(DEVICES)))
    model = get_structlora_model(base, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
        elif name.endswith("gain"):
            nn.init.constant_(parameter, 1.0)
    model.graph_pass.step = model.hooks.passes = 1  # as if it had been trained
    return model.eval()


def updates(model: StructLoraModel) -> dict[str, Tensor]:
    """Return the coordinated updates in float64, on the CPU."""
    layers, name = model.graph_pass.adapters.layers, model.graph_pass.adapters.adapter_name
    factors, _ = plain_factors(model.graph_pass)
    return {
        path: layers[path].scaling[name] * (b.cpu().double() @ a.cpu().double()) for path, (a, b) in factors.items()
    }


@FEW
@given(model=trained())
def test_an_exported_update_is_the_trained_one_to_the_rounding_of_its_type(model: StructLoraModel) -> None:
    want = updates(model)
    with tempfile.TemporaryDirectory() as folder:
        said = model.export(folder)
        state = load_file(Path(folder) / "adapter_model.safetensors")
    unit = max(UNIT[value.dtype] for value in state.values())
    for path, update in want.items():
        a, b = (state[f"base_model.model.{path}.lora_{side}.weight"].double() for side in "AB")
        scaling = next(iter(model.graph_pass.adapters.layers[path].scaling.values()))
        bound = 4 * unit * scaling * (b.abs() @ a.abs()) + 1e-12  # two factors rounded, and their scaling
        assert ((scaling * (b @ a) - update).abs() <= bound).all()
    assert said["relative_error"] <= 8 * unit * max(1, model.structlora_config.r) ** 0.5


@FEW
@given(model=trained())
def test_a_merged_weight_is_rounded_once(model: StructLoraModel) -> None:
    want = updates(model)
    layers = model.graph_pass.adapters.layers
    base = {path: layer.get_base_layer().weight.detach().cpu().double() for path, layer in layers.items()}
    merged = model.merge_and_unload()
    for path, update in want.items():
        weight = merged.get_submodule(path).weight.detach().cpu()
        exact = base[path] + update
        bound = UNIT[weight.dtype] * exact.abs() + 4 * UNIT[torch.float32] * (base[path].abs() + update.abs()) + 1e-7
        assert ((weight.double() - exact).abs() <= bound).all()
