"""What earlier releases wrote still loads and still computes the same."""

from pathlib import Path

import pytest
import torch
from helpers.golden.make import Base
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn

from structlora_pyg import StructLoraModel, inspect_adapter, load_lora

GOLDEN = Path(__file__).parents[1] / "helpers" / "golden"

RELEASES = sorted(p.name for p in GOLDEN.iterdir() if (p / "outputs.safetensors").is_file())


def base() -> nn.Module:
    module = Base()
    module.load_state_dict(load_file(GOLDEN / "base.safetensors"))
    return module


def test_there_is_a_release() -> None:
    assert "0.2.0" in RELEASES


@pytest.mark.parametrize("release", RELEASES)
def test_an_adapter_and_a_checkpoint_of_a_release_load_and_compute_the_same(release: str) -> None:
    folder = GOLDEN / release
    outputs = load_file(folder / "outputs.safetensors")
    for load in (load_lora, PeftModel.from_pretrained):
        torch.testing.assert_close(load(base(), folder / "adapter").eval()(outputs["input"]), outputs["exported"])
    model = StructLoraModel.from_pretrained(base(), folder / "checkpoint").eval()
    torch.testing.assert_close(model(outputs["input"]), outputs["coordinated"])
    assert model.graph_pass.step == 12
    assert len(inspect_adapter(folder / "adapter").adapters) == 4
