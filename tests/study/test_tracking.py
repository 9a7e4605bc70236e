"""Trackers get what the log gets, through Accelerate, and a resumed run goes on where it stopped."""

import json
from pathlib import Path
from typing import Any

import pytest
from accelerate import tracking as accelerate_tracking
from accelerate.tracking import GeneralTracker
from accelerate.utils import LoggerType
from helpers.runs import folder_of, interrupt, tiny_config

from structlora_pyg.checks import ConfigError
from structlora_pyg.study.distributed import tracker_problems
from structlora_pyg.study.train import train


class LineTracker(GeneralTracker):
    """Appends everything to a file in the logging folder."""

    name = "tensorboard"
    requires_logging_directory = True
    main_process_only = True

    def __init__(self, run_name: str, logging_dir: str, **kwargs: Any) -> None:
        super().__init__()
        self.file, self.arguments = Path(logging_dir) / f"{run_name}.jsonl", kwargs

    def start(self) -> None:
        self._append(started=self.arguments)

    @property
    def tracker(self) -> Path:
        return self.file

    def store_init_configuration(self, values: dict) -> None:
        assert all(isinstance(v, (bool, int, float, str)) for v in values.values())
        self._append(config=values)

    def log(self, values: dict, step: int | None = None, **kwargs: Any) -> None:
        self._append(step=step, values=values)

    def finish(self) -> None:
        self._append(finished=True)

    def _append(self, **line: Any) -> None:
        with self.file.open("a") as stream:
            stream.write(json.dumps(line) + "\n")


@pytest.fixture
def line_tracker(monkeypatch) -> None:
    """Put a tracker of our own in the place of one of Accelerate's."""
    monkeypatch.setitem(accelerate_tracking.LOGGER_TYPE_TO_CLASS, "tensorboard", LineTracker)
    monkeypatch.setattr(accelerate_tracking, "_available_trackers", [LoggerType.TENSORBOARD])


def test_a_tracker_gets_every_number_and_no_step_twice(line_tracker, tiny_bert, rte_folder, tmp_path) -> None:
    config = tiny_config(
        tiny_bert, rte_folder, tmp_path / "run", max_steps=4, eval_every=2, watch_every=2, trackers=["tensorboard"]
    )
    train(config, progress=False)
    file = folder_of(config) / "logs" / "structlora.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert lines[0] == {"started": {"purge_step": 1}}
    assert lines[1]["config"]["adapter.r"] == 2
    assert lines[-1] == {"finished": True}
    logged = [line for line in lines if "values" in line]
    assert [line["step"] for line in logged if "loss" in line["values"]] == [1, 2, 3, 4]
    names = {name for line in logged for name in line["values"]}
    assert {
        "loss", "auxiliary", "total", "lr", "grad_norm", "evaluation/accuracy", "structure/drift_energy",
        "structure/open_gates",
    } <= names  # fmt: skip
    interrupt(folder_of(config), 2)
    file.unlink()
    train(config, resume=True, progress=False)
    again = [json.loads(line) for line in file.read_text().splitlines()]
    assert again[0] == {"started": {"purge_step": 3}}
    seen = [line["step"] for line in again if "loss" in line.get("values", {})]
    assert seen == [3, 4]


def test_a_tracker_is_finished_when_training_fails(line_tracker, tiny_bert, rte_folder, tmp_path) -> None:
    config = tiny_config(tiny_bert, rte_folder, tmp_path / "run", method="lora", lr=1e30, trackers=["tensorboard"])
    with pytest.raises(FloatingPointError):
        train(config, progress=False)
    assert json.loads((folder_of(config) / "logs" / "structlora.jsonl").read_text().splitlines()[-1]) == {
        "finished": True
    }


def test_a_tracker_that_is_missing_or_unknown_is_named_before_training(
    monkeypatch, tiny_bert, rte_folder, tmp_path
) -> None:
    monkeypatch.setattr(accelerate_tracking, "_available_trackers", [])
    config = tiny_config(tiny_bert, rte_folder, tmp_path / "run", trackers=["wandb", "comet_ml", "tensorbord"])
    with pytest.raises(ConfigError) as found:
        train(config)
    missing, other, unknown = found.value.problems
    assert missing == "train.trackers: 'wandb' is not installed; pip install wandb, or leave it out"
    assert "pip install comet-ml" in other
    assert "Did you mean 'tensorboard'?" in unknown
    assert not (tmp_path / "run").exists()
    assert tracker_problems([]) == []
