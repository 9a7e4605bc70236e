"""Tiny runs of the training loop, and what they leave."""

import contextlib
import json
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.adapted import with_all_stages
from safetensors.torch import load_file

from structlora_pyg.config import StructLoraConfig
from structlora_pyg.study.config import DataConfig, MethodConfig, ModelConfig, RunConfig, TrainConfig
from structlora_pyg.study.run import Order

ADAPTER = "adapter/adapter_model.safetensors"


MakeConfig = Callable[..., RunConfig]


def tiny_config(model, data, folder, adapter=None, method="structlora", **settings) -> RunConfig:
    options: dict[str, Any] = {
        "r": 2, "lora_alpha": 4, "target_modules": ["query", "value"],
        "schedule": {"warmup_steps": 1, "ramp_steps": 2}, "graph": {"refresh_every": 2, "edges": "hybrid"},
        "encoding": {"size": 4}, "coordinator": {"hidden_channels": 8},
    }  # fmt: skip
    defaults = {"max_steps": 8, "batch_size": 4, "lr": 1e-2, "save_every": 2, "keep_checkpoints": 9}
    return RunConfig(
        model=ModelConfig(path=str(model)),
        data=DataConfig(task="rte", path=str(data), max_length=32),
        adapter=StructLoraConfig(**with_all_stages({**options, **(adapter or {})})),
        method=MethodConfig(name=method),  # type: ignore[arg-type]
        train=TrainConfig(**{**defaults, **settings, "output_dir": str(folder)}),
    )


def folder_of(config: RunConfig) -> Path:
    return Path(config.train.output_dir)


def adapter_of(config: RunConfig) -> dict[str, torch.Tensor]:
    return load_file(folder_of(config) / ADAPTER)


def assert_identical(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def lines_of(config: RunConfig) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder_of(config) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


@contextlib.contextmanager
def disk_that_fills(when: Callable[[], bool], most: int) -> Iterator[None]:
    """Let files grow to `most` bytes from the first training step on at which `when` is true."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    examples, before = Order.step, signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def step(self: Order, index: int) -> list[int]:
        if when():
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
        return examples(self, index)

    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Order, "step", step)
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def without_dropout(bert: Path, folder: Path) -> Path:
    """Return the folder of a copy of a BERT that draws nothing: other batches and processes draw other masks."""
    shutil.copytree(bert, folder)
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def interrupt(folder: Path, step: int) -> None:
    """Put a finished run into the state in which a crash some time after `step` would have left it."""
    shutil.rmtree(folder / "adapter")
    (folder / "results.json").unlink()
    for checkpoint in folder.glob("checkpoint-*"):
        if int(checkpoint.name.split("-")[1]) > step:
            shutil.rmtree(checkpoint)
