"""A model whose layers lie on several devices: its adapters meet in one graph, and go back to where they run."""

from pathlib import Path

import pytest
import torch
from accelerate import dispatch_model
from helpers.adapted import adapt, train
from helpers.tiny import ARCHITECTURES
from safetensors.torch import load_file

from structlora_pyg import StructLoraConfig, get_structlora_model

TINY = ARCHITECTURES["llama"]
GPUS = torch.cuda.device_count()


def dispatched(first: str | int, second: str | int, folder: Path) -> torch.nn.Module:
    base = TINY.model()
    ends = {"model.embed_tokens": first, "model.rotary_emb": first, "model.norm": second, "lm_head": second}
    count = len(base.model.layers)
    layers = {f"model.layers.{i}": first if i < count // 2 else second for i in range(count)}
    return dispatch_model(base, {**ends, **layers}, offload_dir=folder, force_hooks=True)


def test_an_offloaded_layer_is_refused_because_its_adapter_has_no_weights(tmp_path: Path) -> None:
    base = dispatched("cpu", "disk", tmp_path)
    with pytest.raises(ValueError, match=r"device_map keeps .* off the devices that compute, first .*layers"):
        get_structlora_model(base, StructLoraConfig(r=2, target_modules=TINY.targets))


@pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")
@pytest.mark.parametrize("term", ["none", "task"])
def test_two_devices_train_what_one_trains(term: str, tmp_path: Path) -> None:
    options = {"schedule": {"warmup_steps": 1}, "filter": {"init_logit": 0.5, "gamma": 0.1, "label_term": term}}
    folders = []
    for name, second in (("one", 0), ("two", 1)):
        base = dispatched(0, second, tmp_path)
        model = get_structlora_model(base, StructLoraConfig(r=2, target_modules=TINY.targets, **options)).train()
        assert {p.device.index for p in model.graph_pass.adapters.parameters()} == {0, second}
        assert {p.device.index for p in model.graph_pass.parameters()} == {0}
        batch = {key: value.to(0) for key, value in TINY.batch().items()}
        train(model, batch, steps=4)
        model.export(tmp_path / name)
        folders.append(load_file(tmp_path / name / "adapter_model.safetensors"))
    for key, value in folders[0].items():
        torch.testing.assert_close(folders[1][key], value, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(GPUS < 1, reason="needs a GPU")
def test_adapters_of_a_processor_and_of_a_gpu_meet_in_one_graph() -> None:
    model = adapt(TINY, schedule={"warmup_steps": 0}).train()
    *_, last = model.graph_pass.adapters.layers.values()
    last.to("cuda")
    model.hooks.run()
    for path, layer in model.graph_pass.adapters.layers.items():
        lifted = layer.lora_B["default"].current()
        assert lifted.device == layer.lora_B["default"].weight.device, path
    sum(layer.lora_B["default"].current().sum().cpu() for layer in model.graph_pass.adapters.layers.values()).backward()
    assert all(p.grad is not None for p in model.graph_pass.adapters.parameters())
