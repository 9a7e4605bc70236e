"""A base cut over processes trains as one that is whole; the shipped files of Accelerate give what `train` accepts."""

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env
from helpers.runs import (
    ADAPTER,
    MakeConfig,
    adapter_of,
    assert_identical,
    folder_of,
    interrupt,
    lines_of,
    without_dropout,
)
from helpers.two_processes import launch
from helpers.zero import train_alone
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file

import structlora_pyg
from structlora_pyg.study.config import RunConfig
from structlora_pyg.study.distributed import sharding_problems
from structlora_pyg.study.tasks import load_task
from structlora_pyg.study.train import train

FOLDER = Path(structlora_pyg.__file__).parent / "configs" / "accelerate"
KINDS = {
    "ddp": DistributedType.MULTI_GPU,
    "fsdp2": DistributedType.FSDP,
    "zero2": DistributedType.DEEPSPEED,
    "zero3": DistributedType.DEEPSPEED,
}
# BERT names its embeddings too, which Accelerate would cut twice.
BLOCKS = {"FSDP_TRANSFORMER_CLS_TO_WRAP": "BertLayer"}


@pytest.fixture
def pickled(make_config: MakeConfig, tiny_bert: Path, tmp_path: Path) -> Callable[..., tuple[RunConfig, Path]]:
    """Return a function that writes the configuration of a tiny run without dropout, for other processes to read."""
    folder = without_dropout(tiny_bert, tmp_path / "bert-without-dropout")

    def make(name: str, **changes: Any) -> tuple[RunConfig, Path]:
        config = make_config(name, **{"max_steps": 6, **changes})
        config.model.path = str(folder)
        file = tmp_path / f"{name}.pkl"
        file.write_bytes(pickle.dumps(config))
        return config, file

    return make


def assert_close(a: RunConfig, b: RunConfig, tolerance: float) -> None:
    one, two = adapter_of(a), adapter_of(b)
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0.0, atol=tolerance, msg=name)


def said_of_base(config: RunConfig) -> dict[str, str]:
    with safe_open(folder_of(config) / ADAPTER, framework="pt") as file:
        return file.metadata()


@pytest.mark.slow
def test_a_sharded_base_trains_evaluates_and_exports_like_a_whole_one(pickled: Callable) -> None:
    """Looking inside, evaluating and saving in between are part of it: they are where processes could part."""
    looks = {"eval_every": 2, "save_every": 2, "watch_every": 3, "record_every": 3, "importance_examples": 2}
    alone, _ = pickled("alone", batch_size=8, **looks)
    train(alone, progress=False)
    shared, file = pickled("shared", batch_size=4, **looks)
    done = launch("fsdp", file, **BLOCKS)
    assert done.returncode == 0, done.stderr
    assert_close(alone, shared, 1e-6)
    assert said_of_base(shared) == said_of_base(alone)  # the fingerprint is that of the whole base
    one, two = (json.loads((folder_of(c) / "results.json").read_text()) for c in (alone, shared))
    assert two["processes"] == 2
    assert two["metrics"] == pytest.approx(one["metrics"], abs=1e-5)
    assert two["parameters"] == one["parameters"]
    steps = [[line for line in lines_of(c) if "grad_norm" in line] for c in (alone, shared)]
    assert len(steps[0]) == 6
    assert [b["grad_norm"] for b in steps[1]] == pytest.approx([a["grad_norm"] for a in steps[0]], rel=1e-3)
    task = load_task(shared.model, shared.data, seed=0)
    assert type(PeftModel.from_pretrained(task.model, folder_of(shared) / "adapter")) is PeftModel


VARIANTS: dict[str, dict[str, Any]] = {
    "accumulated": {"batch_size": 2, "gradient_accumulation_steps": 2},
    "checkpointed": {"gradient_checkpointing": True},
    "gradient start": {"adapter": {"init_lora_weights": "gradient"}},
    **{
        method: {"method": method}
        for method in ("lora", "dora", "lora_fa", "vera", "adalora", "sensitivity_lora", "lora_cos")
    },
    "structlora_dora": {"method": "structlora_dora"},
    "structlora_fa": {"method": "structlora_fa"},
}


@pytest.mark.slow
def test_every_method_is_the_same_on_a_sharded_base(pickled: Callable) -> None:
    runs = {name: (pickled(f"{name}-whole", **v), pickled(f"{name}-cut", **v)) for name, v in VARIANTS.items()}
    words = [w for whole, cut in runs.values() for w in ("ddp", whole[1], "fsdp", cut[1])]
    done = launch(*words, **BLOCKS)
    assert done.returncode == 0, done.stderr
    for (whole, _), (cut, _) in runs.values():
        assert_close(whole, cut, 1e-5)
    alone, _ = pickled("alone", batch_size=8)
    train(alone, progress=False)
    for config, _ in runs["accumulated"]:  # 2 processes, 2 micro-batches, 2 examples
        assert_close(alone, config, 1e-5)


@pytest.mark.slow
def test_a_sharded_run_resumes_bit_for_bit(pickled: Callable) -> None:
    """One process saves what all go on from: nothing that moves in training may differ between them."""
    looks = {"eval_every": 2, "watch_every": 3, "record_every": 3, "importance_examples": 2}
    label = {"adapter": {"filter": {"gamma": 0.1, "label_term": "decoder", "num_labels": 2}}}
    config, file = pickled("run", **looks, **label)
    assert launch("fsdp", file, **BLOCKS).returncode == 0
    adapter, lines = adapter_of(config), lines_of(config)
    interrupt(folder_of(config), 2)
    assert launch("fsdp", file, "resume", **BLOCKS).returncode == 0
    assert_identical(adapter, adapter_of(config))
    assert lines_of(config) == lines


@pytest.mark.slow
def test_mixed_precision_of_a_sharded_base_is_autocast(pickled: Callable) -> None:
    alone, _ = pickled("alone", batch_size=8, mixed_precision="bf16")
    train(alone, progress=False)
    shared, file = pickled("shared", batch_size=4, mixed_precision="bf16")
    done = launch("fsdp", file, **BLOCKS)
    assert done.returncode == 0, done.stderr
    assert_close(alone, shared, 5e-3)
    plain, _ = pickled("plain", batch_size=8)
    train(plain, progress=False)
    assert not all(
        torch.equal(a, b) for a, b in zip(adapter_of(plain).values(), adapter_of(shared).values(), strict=True)
    )


def test_what_cannot_be_sharded_is_refused(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")  # the plugin writes it, and it has to go again

    def problems(config: RunConfig, **settings: Any) -> str:
        plugin = FullyShardedDataParallelPlugin(**{"fsdp_version": 2, "cpu_ram_efficient_loading": False, **settings})
        accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin))
        return "; ".join(sharding_problems(accelerator, config))  # type: ignore[arg-type]

    good = make_config()
    assert problems(good) == ""
    assert "set fsdp_version: 2" in problems(good, fsdp_version=1)
    assert "fsdp_cpu_ram_efficient_loading=true" in problems(good, cpu_ram_efficient_loading=True)
    assert "use train.gradient_checkpointing=true" in problems(good, activation_checkpointing=True)
    assert "method.name=full is not for FSDP" in problems(make_config(method="full"))
    assert "would leave 4-bit weights whole" in problems(make_config(method="qlora"))
    assert "adapter.bias=all" in problems(make_config(adapter={"bias": "all"}))


@pytest.mark.slow
def test_a_loop_of_ones_own_trains_what_one_process_trains(tmp_path: Path) -> None:
    """Also what happens if the adapters are cut as well: an error that names the way out."""
    blocks = {"FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer"}
    done = launch("loop", tmp_path / "shared", **blocks)
    assert done.returncode == 0, done.stderr
    for rank in "01":
        assert "q_proj is cut over the processes" in (tmp_path / "shared" / f"merge-{rank}.txt").read_text()
    train_alone(tmp_path / "alone")
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("alone", "shared"))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-5)
    done = launch("naive", tmp_path / "cut", **blocks)
    assert done.returncode == 1
    assert "FSDP has cut the adapters" in done.stderr


def test_every_file_is_accepted_by_accelerate() -> None:
    assert {file.stem for file in FOLDER.iterdir()} == KINDS.keys()
    for name, kind in KINDS.items():
        found = load_config_from_file(str(FOLDER / f"{name}.yaml"))  # refuses keys that it does not know
        assert found.distributed_type == kind
        assert found.mixed_precision == "no"
    for stage in (2, 3):
        assert load_config_from_file(str(FOLDER / f"zero{stage}.yaml")).deepspeed_config["zero_stage"] == stage


def test_what_accelerate_makes_of_the_fsdp_file_is_what_train_takes(make_config, monkeypatch) -> None:
    settings = yaml.safe_load((FOLDER / "fsdp2.yaml").read_text())["fsdp_config"]
    words = [f"--{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in settings.items()]
    arguments = launch_command_parser().parse_args(
        ["--use_fsdp", "--multi_gpu", "--mixed_precision=no", *words, "script.py"]
    )
    arguments.num_processes, arguments.num_machines, arguments.dynamo_backend = 8, 1, "no"
    environment = prepare_multi_gpu_env(arguments)
    for key, value in environment.items():
        if key.startswith("FSDP_"):
            monkeypatch.setenv(key, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.auto_wrap_policy is not None
    accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin))
    assert sharding_problems(accelerator, make_config()) == []  # type: ignore[arg-type]


@pytest.mark.slow
def test_the_command_trains_in_two_processes(make_config: MakeConfig, tmp_path: Path) -> None:
    """``accelerate launch`` starts several processes on GPUs only; torch's launcher does it on a processor too."""
    config = make_config("run", max_steps=4)
    file = tmp_path / "run.yaml"
    sections = {
        "model": {"path": config.model.path},
        "data": {"task": "rte", "path": config.data.path, "max_length": 32},
        "adapter": {"r": 2, "target_modules": ["query", "value"], "schedule": {"warmup_steps": 1}},
        "train": {"output_dir": config.train.output_dir, "max_steps": 4, "batch_size": 2},
    }
    file.write_text(yaml.safe_dump(sections))
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "PYTHONPATH": str(Path(structlora_pyg.__file__).parents[1]),
    }
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launch, "-m", "structlora_pyg", "train", "--config", str(file)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert '"processes": 2' in (Path(config.train.output_dir) / "results.json").read_text()
