"""The command line: exit codes, messages, and that one form works everywhere."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from structlora_pyg.cli import COMMANDS, main
from structlora_pyg.study.methods import METHODS
from structlora_pyg.study.run_config import TaskName


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_validate_says_that_a_configuration_is_valid(capsys) -> None:
    assert run(capsys, "validate", "--config", "rte") == (0, "rte is valid\n", "")


def test_validate_refuses_what_train_refuses(capsys) -> None:
    code, _, error = run(capsys, "validate", "--config", "rte", "method.name=dylora", "adapter.r=1")
    assert code == 2
    assert "dylora needs one rank >= 2" in error


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
    assert "no effect" in run(capsys, "demo", "seeds=9", "quick=true")[2]


def test_a_checkpoint_that_is_none_is_named(capsys, tmp_path) -> None:
    code, _, error = run(capsys, "export", f"checkpoint={tmp_path / 'x'}", f"output={tmp_path / 'y'}")
    assert code == 2
    assert "config.json" in error


def test_the_module_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "structlora_pyg", "--version"], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.startswith("structlora_pyg ")


def test_compare_lists_every_method_and_task_on_a_line(capsys) -> None:
    code, text, _ = run(capsys, "compare", "--list")
    assert code == 0
    lines = [line.split()[0] for line in text.splitlines() if line.startswith("  ")]
    assert set(lines) == {*METHODS, *get_args(TaskName)}
    found = json.loads(run(capsys, "compare", "--list", "--json")[1])
    assert list(found["methods"]) + list(found["tasks"]) == lines
    assert all({**found["methods"], **found["tasks"]}.values())
    assert "list takes no configuration" in run(capsys, "compare", "list=true", "train.lr=1")[2]
    assert "json has no effect without list" in run(capsys, "compare", "--json")[2]
    assert "the configuration of a run, a grid is a file such as" in run(capsys, "compare", "--config", "rte")[2]


@pytest.mark.parametrize(
    ("command", "has", "has_not"),
    [
        ("compare", "--config benchmarks/configs/glue.yaml --size mini", "--config rte"),
        ("ablate", "--config rte adapter.coordinator.conv=GCNConv,GATv2Conv", "YAML file of a grid"),
        ("report", "folders", "--config"),
    ],
)
def test_the_help_of_a_command_names_what_it_takes(capsys, command: str, has: str, has_not: str) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = capsys.readouterr().out
    assert has in text
    assert has_not not in text


def test_options_may_be_written_in_both_forms_and_anywhere(capsys) -> None:
    both = [run(capsys, "convs", form)[1] for form in ("json=true", "--json")]
    assert both[0] == both[1]
    assert {r["name"]: r["hetero"] for r in json.loads(both[0])}["SAGEConv"] == "hetero_conv"
    code, _, error = run(capsys, "validate", "adapter.r=4", "--config", "rte", "adapter.rr=4")
    assert code == 2
    assert "Did you mean 'r'" in error
    with pytest.raises(SystemExit):
        main(["compare", "--jbos", "2"])
    assert "unknown option --jbos" in capsys.readouterr().err


def test_compare_and_report_make_tables_from_a_file(capsys, tmp_path, tiny_bert, rte_folder) -> None:
    file, out = tmp_path / "grid.yaml", tmp_path / "out"
    file.write_text(
        f"""
        tasks:
          rte: {{config: rte, model.path: {tiny_bert}, data.path: {rte_folder}, data.max_length: 32}}
          vqav2: {{config: llava7b_vqav2, unavailable: no such model here}}
        methods: {{LoRA: {{method.name: lora}}, head: {{method.name: head}}}}
        baseline: head
        seeds: 2
        settings: {{train.max_steps: 2}}
        """
    )
    code, text, _ = run(capsys, "compare", "--config", str(file), "--output_dir", str(out), "--jobs", "1")
    assert code == 0
    assert text.splitlines()[0] == f"4 runs in {out}, 0 of them failed"  # what was known not to run is none
    code, text, _ = run(capsys, "report", str(out))
    assert code == 0
    assert {"report.html", "report.md", "report.tex"} <= {Path(line).name for line in text.splitlines()}
    scores, differences = (out / "report.md").read_text().split("### Differences from head", 1)
    assert "no such model here" in scores
    assert "vqav2" not in differences.split("###")[0].lower()  # nothing to be different from
    assert "no folder given" in run(capsys, "report")[2]
    assert "grids" in run(capsys, "report", str(tmp_path))[2]
    assert "no grid given" in run(capsys, "compare")[2]
    assert (
        "size='mini' is unknown; this grid has none"
        in run(capsys, "compare", "--config", str(file), "--size", "mini")[2]
    )


def test_a_run_of_another_method_is_exported_merged_and_not_described(capsys, tmp_path, tiny_bert, rte_folder) -> None:
    settings = [
        f"model.path={tiny_bert}", "data.task=rte", f"data.path={rte_folder}", "data.max_length=32", "adapter.r=2",
        "adapter.target_modules=[query, value]", "train.max_steps=3", "train.batch_size=4",
    ]  # fmt: skip
    for method in ("dora", "adalora", "full"):
        folder = tmp_path / method
        own = [f"method.name={method}", f"train.output_dir={folder}"]
        assert run(capsys, "train", *settings, *own)[0] == 0
        checkpoint = f"checkpoint={folder / 'checkpoint-3'}"
        for output, options in ((folder / "again", []), (folder / "merged", ["merge=true"])):
            assert run(capsys, "export", checkpoint, f"output={output}", *options)[0] == 0
        places = (folder / "again", folder / METHODS[method].folder)
        again, first = (next(place.glob("*.safetensors")) for place in places)
        assert again.read_bytes() == first.read_bytes()
        ragged = run(capsys, "export", checkpoint, f"output={folder / 'x'}", "ragged=true")
        assert "ragged has no effect" in ragged[2]
    code, _, error = run(capsys, "describe", *settings, "method.name=lora")
    assert code == 2
    assert "method.name=lora has no graph to describe" in error


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
    small = [
        "data.train_limit=16",
        "data.eval_limit=8",
        "data.max_length=16",
        "train.max_steps=3",
        "train.batch_size=4",
    ]
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
