"""The shipped files of Accelerate are read by Accelerate itself, and give what `structlora train` accepts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env
from helpers.runs import MakeConfig

import structlora_pyg
from structlora_pyg.study.distributed import sharding_problems

ROOT = Path(structlora_pyg.__file__).parents[1]
FOLDER = Path(structlora_pyg.__file__).parent / "configs" / "accelerate"
KINDS = {
    "ddp": DistributedType.MULTI_GPU,
    "fsdp2": DistributedType.FSDP,
    "zero2": DistributedType.DEEPSPEED,
    "zero3": DistributedType.DEEPSPEED,
}


def test_every_file_is_accepted_by_accelerate() -> None:
    assert {file.stem for file in FOLDER.iterdir()} == KINDS.keys()
    for name, kind in KINDS.items():
        found = load_config_from_file(str(FOLDER / f"{name}.yaml"))  # refuses keys that it does not know
        assert found.distributed_type == kind
        assert found.mixed_precision == "no"
    for stage in (2, 3):
        assert load_config_from_file(str(FOLDER / f"zero{stage}.yaml")).deepspeed_config["zero_stage"] == stage


def test_what_accelerate_makes_of_the_fsdp_file_is_what_train_takes(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launch, "-m", "structlora_pyg", "train", "--config", str(file)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert '"processes": 2' in (Path(config.train.output_dir) / "results.json").read_text()
