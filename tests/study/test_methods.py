"""Every method of the tables trains, evaluates, exports and resumes through the same loop, and is what it says."""

import functools
import json
import math
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.adapted import full_config
from helpers.official import save_bert
from helpers.tiny import ARCHITECTURES
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification

from structlora_pyg import load_lora
from structlora_pyg.checks import ConfigError
from structlora_pyg.config import StructLoraConfig
from structlora_pyg.study.config import DataConfig, MethodConfig, ModelConfig, RunConfig, TrainConfig
from structlora_pyg.study.methods import METHODS, make_method
from structlora_pyg.study.run import restore
from structlora_pyg.study.tasks import Task, load_task
from structlora_pyg.study.train import train
from structlora_pyg.tuner.model import StructLoraModel
from structlora_pyg.tuner.quantization import dequantize_4bit, quantize_4bit

STEPS = 6
BITS4 = ("qlora", "structlora_qlora")
# Query and value of a layer see the same inputs, hence get the same rank.
OWN_ADAPTER = {"sensitivity_lora": {"target_modules": r".*(query|intermediate\.dense|\d\.output\.dense)"}}
STRUCT = ("structlora", "structlora_qlora", "structlora_dora", "structlora_fa")
needs_bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
ALL = [pytest.param(name, marks=needs_bitsandbytes if name in BITS4 else ()) for name in METHODS]
STATE = ("structlora", "structlora_qlora", "adalora", "sensitivity_lora", "lora_dropout", "dylora")
WITH_A_STATE = [p if p.values[0] in STATE else pytest.param(*p.values, marks=[*p.marks, pytest.mark.slow]) for p in ALL]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random BERT of width 64: 4-bit blocks have 64 weights."""
    return save_bert(tmp_path_factory.mktemp("bert64"), width=64, inner=64)


@pytest.fixture(scope="module")
def make_config(bert: Path, rte_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., RunConfig]:
    root = tmp_path_factory.mktemp("runs")

    def make(name: str, folder: str = "", adapter: dict[str, Any] | None = None, **method: Any) -> RunConfig:
        options: dict[str, Any] = {
            "r": 2, "lora_alpha": 4, "target_modules": ["query", "value"], "encoding": {"size": 4},
            "schedule": {"warmup_steps": 1, "ramp_steps": 2}, "coordinator": {"hidden_channels": 8},
            "graph": {"refresh_every": 2}, "filter": {"init_logit": 0.5},  # half open from the start
        }  # fmt: skip
        return RunConfig(
            model=ModelConfig(path=str(bert)),
            data=DataConfig(task="rte", path=str(rte_folder), max_length=32),
            adapter=full_config(**{**options, **(adapter or {})}),
            method=MethodConfig(name=name, **({"vera_r": 16} if name == "vera" else {}), **method),  # type: ignore[arg-type]
            train=TrainConfig(
                output_dir=str(root / (folder or name)), max_steps=STEPS, batch_size=4, lr=1e-2, keep_checkpoints=9,
                save_every=1 if name == "adalora" else 2,
            ),
        )  # fmt: skip

    return make


@pytest.fixture(scope="module")
def run_of(make_config: Callable[..., RunConfig]) -> Callable[[str], tuple[RunConfig, dict[str, Any]]]:
    """Return a function that gives the configuration and the results of a method's run, which is made once."""
    done: dict[str, tuple[RunConfig, dict[str, Any]]] = {}

    def run(name: str) -> tuple[RunConfig, dict[str, Any]]:
        if name not in done:
            config = make_config(name, adapter=OWN_ADAPTER.get(name))
            done[name] = config, train(config)
        return done[name]

    return run


@pytest.fixture(scope="module")
def of_lora(run_of, make_config) -> Callable[[str], Tensor]:
    """Return a function that gives what plain LoRA predicts with the layers of a method."""

    @functools.cache
    def predicted(name: str) -> Tensor:
        config = run_of("lora")[0]
        if name in OWN_ADAPTER:
            train(config := make_config("lora", folder=f"lora-like-{name}", adapter=OWN_ADAPTER[name]))
        return logits(*loaded(config))

    return lambda name: predicted(name if name in OWN_ADAPTER else "lora")


def folder_of(config: RunConfig) -> Path:
    return Path(config.train.output_dir)


def exported(config: RunConfig) -> Path:
    return folder_of(config) / METHODS[config.method.name].folder


def weights(config: RunConfig) -> dict[str, Tensor]:
    found = load_file(next(exported(config).glob("*.safetensors")))
    # Transformers 5.5 saves the norms of a BERT under the names that they had in TensorFlow, and loads both.
    return {n.replace("Norm.gamma", "Norm.weight").replace("Norm.beta", "Norm.bias"): v for n, v in found.items()}


def state_of(config: RunConfig, step: int) -> dict[str, Tensor]:
    """Return the tensors that a checkpoint would continue from."""
    files = (folder_of(config) / f"checkpoint-{step}").glob("*_state.safetensors")
    return {name: value for file in files for name, value in load_file(file).items()}


@torch.no_grad()
def logits(task: Task, model: nn.Module) -> Tensor:
    batch = task.collate(list(task.eval_set))
    return model.eval()(**batch).logits


def loaded(config: RunConfig) -> tuple[Task, nn.Module]:
    """Return the exported folder as PEFT or Transformers load it, on a base with another new head."""
    task = load_task(config.model, config.data, seed=99)
    if config.method.name in ("full", "head"):
        return task, AutoModelForSequenceClassification.from_pretrained(exported(config))
    base = task.model
    if config.method.name in BITS4:
        base = dequantize_4bit(quantize_4bit(base, keep=task.head))
    return task, PeftModel.from_pretrained(base, str(exported(config)))


@pytest.mark.parametrize("name", ALL)
def test_a_run_ends_with_a_folder_that_stock_libraries_load_and_not_where_lora_does(name: str, run_of, of_lora) -> None:
    config, results = run_of(name)
    assert results["method"] == results["config"]["method"]["name"] == name
    assert results["steps"] == STEPS
    assert (exported(config) / "tokenizer.json").is_file()
    task, model = loaded(config)
    assert not isinstance(model, StructLoraModel)
    found = task.evaluate(model, DataLoader(task.eval_set, 6, collate_fn=task.collate))
    assert found == pytest.approx(results["metrics"], rel=2e-3 if name in BITS4 else 1e-4)
    method = restore(config, folder_of(config) / f"checkpoint-{STEPS}").method
    tolerance = {"atol": 2e-3, "rtol": 1e-2} if name in BITS4 else {"atol": 1e-5, "rtol": 1e-4}
    torch.testing.assert_close(logits(task, model), logits(task, method.model), **tolerance)
    assert torch.allclose(logits(task, model), of_lora(name), atol=1e-5) == (name == "lora")


@pytest.mark.parametrize("name", WITH_A_STATE)
def test_a_resumed_run_ends_bit_for_bit_like_an_undisturbed_one(name: str, run_of, make_config) -> None:
    config, results = run_of(name)
    # After step 5 AdaLoRA has settled its ranks; after step 2 no method has.
    for step in (2, 5) if name == "adalora" else (4,):
        other = make_config(name, folder=f"{name}-resumed-{step}", adapter=OWN_ADAPTER.get(name))
        shutil.copytree(folder_of(config), folder_of(other))
        shutil.rmtree(exported(other))
        (folder_of(other) / "results.json").unlink()
        for checkpoint in folder_of(other).glob("checkpoint-*"):
            if int(checkpoint.name.split("-")[1]) > step:
                shutil.rmtree(checkpoint)
        torch.manual_seed(7)  # whatever happened in the process before must not matter
        again = train(other, resume=True)
        assert again["metrics"] == results["metrics"]
        for before, after in ((weights(config), weights(other)), (state_of(config, STEPS), state_of(other, STEPS))):
            assert before.keys() == after.keys()
            assert [n for n in before if not torch.equal(before[n], after[n])] == []


LAYERS, WIDTH = 4, 64
LORA = LAYERS * 2 * (WIDTH + WIDTH)  # r (d_in + d_out)


def test_lora_trains_both_factors_and_adds_nothing_to_the_loss(run_of) -> None:
    config, results = run_of("lora")
    assert results["parameters"]["adapter"] == LORA
    assert results["parameters"]["training_only"] == 0
    assert results["losses"]["last"]["auxiliary"] == 0.0
    assert type(restore(config, folder_of(config) / "checkpoint-2").model) is PeftModel


def test_full_fine_tuning_moves_every_matrix(run_of, bert: Path) -> None:
    config, results = run_of("full")
    assert results["parameters"]["heads"] == results["parameters"]["base"]
    before, after = load_file(bert / "model.safetensors"), weights(config)
    assert all(not torch.equal(after[f"bert.{n}"], v) for n, v in before.items() if n.endswith("query.weight"))


def test_the_head_alone_moves_and_nothing_else(run_of, bert: Path) -> None:
    config, results = run_of("head")
    assert 0 < results["parameters"]["heads"] < results["parameters"]["base"]
    before, after = load_file(bert / "model.safetensors"), weights(config)
    moved = {n for n, v in before.items() if not torch.equal(after[f"bert.{n}"], v)}
    assert moved == {n for n in before if n.startswith("pooler.")}


def test_the_head_alone_is_refused_where_there_is_none() -> None:
    options = MethodConfig(name="head")
    with pytest.raises(ConfigError, match="nothing to train"):
        make_method(StructLoraConfig(), options, total_steps=1).adapt(nn.Linear(2, 2), lambda: None, lambda: None)


@pytest.mark.parametrize("name", ["dora", "structlora_dora"])
def test_dora_exports_trained_magnitudes(name: str, run_of) -> None:
    config, results = run_of(name)
    found = [n for n in weights(config) if "lora_magnitude_vector" in n]
    assert len(found) == LAYERS
    assert results["parameters"]["adapter"] == LORA + LAYERS * WIDTH
    first, last = (state_of(config, step) for step in (2, STEPS))
    moved = [n for n in first if "magnitude" in n and not torch.equal(first[n], last[n])]
    assert len(moved) == LAYERS


@needs_bitsandbytes
@pytest.mark.parametrize("name", BITS4)
def test_the_base_is_in_4_bit_and_the_head_is_not(name: str, run_of) -> None:
    import bitsandbytes as bnb

    config, _ = run_of(name)
    method = restore(config, folder_of(config) / "checkpoint-2").method
    in_4_bit = [n for n, m in method.model.named_modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert len(in_4_bit) == 2 * 6
    assert not any("classifier" in n or "pooler" in n for n in in_4_bit)


def test_adalora_cuts_directions_to_its_budget(run_of) -> None:
    config, results = run_of("adalora")
    assert results["export"]["total_rank"] == 2 * LAYERS
    assert results["parameters"]["adapter"] == LAYERS * 3 * (WIDTH + WIDTH + 1)
    assert results["losses"]["first"]["auxiliary"] > 0
    settings = json.loads((exported(config) / "adapter_config.json").read_text())
    assert settings["peft_type"] == "LORA"
    names = {f"bert.encoder.layer.{i}.attention.self.{role}" for i in range(2) for role in ("query", "value")}
    assert set(results["structure"]["names"]) == names


@pytest.mark.parametrize("name", ["lora_fa", "structlora_fa"])
def test_lora_fa_leaves_lora_a_where_it_was(name: str, run_of) -> None:
    config, results = run_of(name)
    states = [state_of(config, step) for step in (2, STEPS)]
    frozen = [n for n in states[0] if "lora_A" in n]
    assert len(frozen) == LAYERS
    assert all(torch.equal(states[0][n], states[1][n]) for n in frozen)
    assert not any(torch.equal(v, states[1][n]) for n, v in states[0].items() if "lora_B" in n)
    assert results["parameters"]["adapter"] == LORA // 2


def test_vera_trains_vectors_only(run_of) -> None:
    config, results = run_of("vera")
    assert results["parameters"]["adapter"] == LAYERS * (config.method.vera_r + WIDTH)


@pytest.mark.parametrize(("name", "first"), [("lora_cos", 0.1 * 2), ("lora_laplacian", 0.0)])
def test_the_penalties_are_in_the_loss(name: str, first: float, run_of) -> None:
    _, results = run_of(name)
    losses = results["losses"]
    assert losses["first"]["auxiliary"] == pytest.approx(first)  # updates are 0: a right angle a role
    assert losses["last"]["auxiliary"] > 0
    for line in losses.values():
        assert line["total"] == pytest.approx(line["loss"] + line["auxiliary"])


@pytest.mark.parametrize("name", [p for p in ALL if p.values[0] in STRUCT])
def test_structlora_kinds_filter_and_coordinate(name: str, run_of) -> None:
    config, results = run_of(name)
    assert results["parameters"]["training_only"] > 0
    assert results["losses"]["last"]["auxiliary"] > 0
    method = restore(config, folder_of(config) / f"checkpoint-{STEPS}").method
    assert method.model.graph_pass.active
    assert method.model.graph_pass.step == STEPS


@pytest.fixture
def image_config(vit_file: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    x = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", x_train=x, y_train=np.arange(8), x_test=x, y_test=np.arange(8))

    def make(name: str, **adapter: Any) -> RunConfig:
        options: dict[str, Any] = {"r": 2, "lora_alpha": 4, "target_modules": ["qkv"], "fused_slices": ["q", "v"]}
        return RunConfig(
            model=ModelConfig(library="timm", architecture="test_vit", path=str(vit_file)),
            data=DataConfig(task="cifar100", path=str(tmp_path / "x.npz"), image_size=32),
            adapter=StructLoraConfig(**{**options, **adapter}),
            method=MethodConfig(name=name),  # type: ignore[arg-type]
            train=TrainConfig(output_dir=str(tmp_path / name), max_steps=3, batch_size=4, lr=1e-2),
        )

    return make


@pytest.mark.parametrize("name", ["lora", "sensitivity_lora", "lora_dropout"])
def test_lora_and_its_relatives_adapt_only_the_slices_asked_for(name: str, image_config) -> None:
    config = image_config(name)
    results = train(config)
    found = weights(config)
    lora_b = {n: v for n, v in found.items() if "lora_B" in n}
    for value in lora_b.values():
        third = value.size(0) // 3
        assert [bool(part.any()) for part in value.split(third)] == [True, False, True]  # the keys were not adapted
    assert results["parameters"]["training_only"] == 0
    if name == "lora":
        assert results["losses"]["last"]["auxiliary"] == 0.0


@pytest.mark.parametrize("name", ["full", "adalora", "structlora_fa"])
def test_methods_train_models_whose_output_has_no_loss(name: str, image_config) -> None:
    gates = {"filter": {"kind": "hard_concrete"}}
    config = image_config(name, fused_slices=None, schedule={"warmup_steps": 1}, **gates)
    results = train(config)
    assert math.isfinite(results["metrics"]["loss"])
    assert (results["losses"]["last"]["auxiliary"] > 0) == (name in ("adalora", "structlora_fa"))
    assert any(value.any() for value in weights(config).values())


@pytest.mark.parametrize("name", ["adalora", "vera", "dylora", "lora_fa", "structlora_fa"])
def test_methods_that_cannot_adapt_slices_refuse_before_anything_is_loaded(name: str, image_config) -> None:
    config = image_config(name)
    config.model.path = "/nowhere.safetensors"
    with pytest.raises(ConfigError, match=f"method.name={name} cannot adapt single slices"):
        train(config)


REFUSED = [
    ("lora", {"use_dora": True}, {}, "set method.name=dora"),
    ("adalora", {"rank_pattern": {"query": 3}}, {}, "allocates ranks itself"),
    ("adalora", {"use_rslora": True}, {}, "no rank-stabilised scaling"),
    ("adalora", {"init_lora_weights": "gradient"}, {}, "a start of its own"),
    ("vera", {"init_lora_weights": "shared"}, {}, "a start of its own"),
    ("vera", {"alpha_pattern": {"query": 3}}, {}, "one rank for all layers"),
    ("sensitivity_lora", {"rank_pattern": {"query": 3}}, {}, "allocates ranks itself"),
    ("dylora", {"r": 1}, {}, "one rank >= 2"),
    ("dylora", {"init_lora_weights": "gradient"}, {}, "cannot start from"),
    ("structlora", {"schedule": {"warmup_steps": 99}}, {}, "would never act"),
    ("lora", {}, {"dropout": 0.5, "weight": 2.0}, r"(?s)2 problems.*method\.dropout .*method\.weight "),
    ("adalor", {}, {}, r"method.name='adalor' is unknown; allowed: .* Did you mean 'adalora'"),
]


@pytest.mark.parametrize(("name", "adapter", "method", "part"), REFUSED)
def test_settings_that_a_method_could_only_ignore_are_errors(name, adapter, method, part, make_config) -> None:
    with pytest.raises(ConfigError, match=part):
        train(make_config(name, folder="refused", adapter=adapter, **method))


def test_plain_lora_follows_our_starts(make_config, run_of) -> None:
    late = {"schedule": {"warmup_steps": 99}}  # which plain methods do not ask for
    config = make_config("lora", folder="start", adapter={"init_lora_weights": "gradient", **late})
    results = train(config)
    assert results["losses"]["last"]["auxiliary"] == 0.0
    assert results["parameters"]["training_only"] == 0
    a = {n: v for n, v in weights(config).items() if "lora_A" in n}
    plain = weights(run_of("lora")[0])
    assert all(not torch.allclose(v, plain[n], atol=1e-2) for n, v in a.items())


@pytest.mark.parametrize("name", ["lora", "adalora", "vera"])
def test_every_method_leaves_excluded_modules_alone(name: str) -> None:
    base = ARCHITECTURES["llama"].model()
    adapter = StructLoraConfig(r=2, target_modules=["q_proj", "v_proj"], exclude_modules=["v_proj"])
    method = make_method(adapter, MethodConfig(name=name, vera_r=4 if name == "vera" else 256), total_steps=30)  # type: ignore[arg-type]
    model = method.adapt(base, lambda: None, lambda: None)
    adapted = {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)}
    assert adapted == {"q_proj"}


@pytest.mark.parametrize("name", ["lora", "dora", "sensitivity_lora", "lora_dropout", "dylora", "lora_fa", "lora_cos"])
def test_lora_and_its_relatives_train_and_export_on_networks_of_pyg(name: str, tmp_path: Path) -> None:
    tiny = ARCHITECTURES["pyg_transformer"]
    base, batch = tiny.model(), tiny.batch()
    method = make_method(StructLoraConfig(r=2, target_modules=tiny.targets), MethodConfig(name=name), total_steps=3)
    model = method.adapt(base, lambda: base(**batch), lambda: None).train()
    optimizer = method.optimizer(3e-2, 0.0)
    for _ in range(3):
        method.backward(lambda: model(**batch).square().mean(), Tensor.backward)
        optimizer.step()
        optimizer.zero_grad()
    method.export(tmp_path)
    with torch.no_grad():
        want = model.eval()(**batch)
        assert not torch.allclose(want, tiny.model()(**batch), atol=1e-4)
        torch.testing.assert_close(load_lora(tiny.model(), tmp_path).eval()(**batch), want, atol=1e-5, rtol=1e-4)
