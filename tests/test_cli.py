"""The command line: exit codes, messages, and that one form works everywhere."""

from __future__ import annotations

import subprocess
import sys

import pytest

from structlora_pyg.cli import COMMANDS, main


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_validate_says_that_a_configuration_is_valid(capsys) -> None:
    assert run(capsys, "validate", "--config", "rte") == (0, "rte is valid\n", "")


def test_validate_reports_every_error_at_once(capsys) -> None:
    code, _, error = run(capsys, "validate", "--config", "rte", "adapter.r=0", "train.lrr=1", "data.task=xyz")
    assert code == 2
    assert "3 problems" in error
    assert "Did you mean 'lr'" in error


def test_no_configuration_lists_the_shipped_ones(capsys) -> None:
    code, _, error = run(capsys, "train")
    assert code == 2
    assert "cifar100" in error


@pytest.mark.parametrize("command", COMMANDS)
def test_help_explains_every_command(command: str, capsys) -> None:
    with pytest.raises(SystemExit) as done:
        main([command, "--help"])
    assert done.value.code == 0
    text = capsys.readouterr().out
    assert "key.sub=value" in text
    assert "own keys" in text or command == "validate"


def test_wrong_keys_of_a_command_are_named(capsys) -> None:
    assert "must end in .svg" in run(capsys, "describe", "--config", "rte", "graph=x.txt")[2]
    code, _, error = run(capsys, "export")
    assert code == 2
    assert "checkpoint is missing" in error
    assert "output is missing" in error
    assert "merge=true" in run(capsys, "export", "checkpoint=a", "output=b", "merge=true", "ragged=true")[2]
    assert "demo takes no configuration" in run(capsys, "demo", "train.lr=1")[2]
    assert "paired" in run(capsys, "demo", "seeds=1")[2]


def test_a_checkpoint_that_is_none_is_named(capsys, tmp_path) -> None:
    code, _, error = run(capsys, "export", f"checkpoint={tmp_path / 'x'}", f"output={tmp_path / 'y'}")
    assert code == 2
    assert "config.json" in error


def test_the_module_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "structlora_pyg", "--version"], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.startswith("structlora_pyg ")


def test_describe_prints_the_pipeline_and_draws_the_graph(capsys, tmp_path, real_data, monkeypatch) -> None:
    monkeypatch.setenv("STRUCTLORA_DATA", str(real_data))
    file = tmp_path / "graph.svg"
    code, text, _ = run(capsys, "describe", "--config", "rte", f"graph={file}")
    assert code == 0
    for part in ("12 of 2 roles", "12 nodes", "GCNConv(64, 64)", "training only", "73,728"):
        assert part in text
    assert file.read_text().startswith("<?xml")


def test_train_then_export_gives_an_adapter_and_a_merged_model(capsys, tmp_path, real_data, monkeypatch) -> None:
    monkeypatch.setenv("STRUCTLORA_DATA", str(real_data))
    small = ["data.train_limit=16", "data.eval_limit=8", "data.max_length=16", "train.max_steps=3", "train.batch_size=4"]
    quick = ["adapter.schedule.warmup_steps=1", f"train.output_dir={tmp_path / 'run'}"]
    assert run(capsys, "train", "--config", "rte", *small, *quick)[0] == 0
    checkpoint = f"checkpoint={tmp_path / 'run' / 'checkpoint-3'}"
    assert run(capsys, "export", checkpoint, f"output={tmp_path / 'adapter'}")[0] == 0
    assert run(capsys, "export", checkpoint, f"output={tmp_path / 'merged'}", "merge=true")[0] == 0
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()
    code, _, error = run(capsys, "export", checkpoint, f"output={tmp_path / 'merged'}")
    assert code == 2
    assert "not empty" in error

    from transformers import AutoModelForSequenceClassification

    AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    code, _, error = run(capsys, "train", "--config", "rte", *small, *quick)
    assert code == 2
    assert "holds a finished run" in error
