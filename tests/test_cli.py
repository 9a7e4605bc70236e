"""The command line: exit codes, messages, and that help is there at once."""

import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from structlora_pyg.analysis import inspect
from structlora_pyg.cli import main
from structlora_pyg.study.methods import METHODS
from structlora_pyg.study.tasks import TASKS, small

COMMANDS = (
    "demo", "train", "validate", "describe", "export", "look", "inspect", "convs", "compare", "ablate", "report",
    "doctor", "completion",
)  # fmt: skip


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_validate_says_what_is_wrong_all_at_once(capsys) -> None:
    assert run(capsys, "validate", "--config", "rte") == (0, "rte is valid\n", "")
    code, _, error = run(capsys, "validate", "--config", "rte", "adapter.r=0", "train.lrr=1", "data.max_length=0")
    assert code == 2
    assert "3 problems" in error
    assert "Did you mean 'lr'" in error
    code, _, error = run(capsys, "validate", "--config", "rte", "method.name=dylora", "adapter.r=1")
    assert code == 2
    assert "dylora needs one rank >= 2" in error


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train"], "cifar100"),
        (["ablate", "--controls"], "--config takes a YAML file or one of boolq"),
        (["compare"], "no grid given"),
        (["compare", "--config", "rte"], "the configuration of a run, a grid is a file such as"),
        (["demo", "--seeds", "1"], "must be a whole number >= 2, got 1"),
        (["compare", "--jobs", "0"], "must be a whole number >= 1, got 0"),
        (["compare", "--backend-options", "{a"], "must be a YAML mapping"),
        (["describe", "--config", "rte", "--graph", "x.txt"], "must end in .svg"),
        (["compare", "output_dir=x"], "write --output-dir, not output_dir=x"),
        (["demo", "train.lr=1"], "unknown option train.lr=1"),
        (["export"], "required: --checkpoint, --output"),
        (["export", "--checkpoint", "a", "--output", "b", "--merge", "--ragged"], "not allowed with"),
        (["export", "--checkpoint", "/nowhere/x", "--output", "b"], "is no checkpoint; give a folder checkpoint-"),
        (["ablate", "--config", "stsb", "--learning-rates", "[a]"], "must be numbers with commas"),
        (["ablate", "--config", "stsb", "--list-mode", "products"], "invalid choice: 'products'"),
        (["inspect"], "required: adapter"),
        (["train", "ret"], "1 problem:\n  - config file 'ret' does not exist"),
        (["train", "rte", "--smoke", "--resume"], "not allowed with"),
        (["validate", "rte", "adapter.rank=4"], "adapter.rank: unknown key. Did you mean 'r'?"),
        (["validate", "rte", "lr=1e-3"], "lr: unknown key. Did you mean train.lr?"),
        (["validate", "rte", "train.lr"], "'train.lr' is not of the form key.sub=value"),
        (["validate", "rte", "train.max_steps=1e3"], "got '1e3', expected an integer"),
        (["validate", "/proc/self"], "cannot be read: [Errno 21] Is a directory"),
        (["train", "rte", "data.path=nowhere.tsv"], "nowhere.tsv"),
        (["train", "digits", "--resume", "train.output_dir=nowhere"], "nowhere holds no run to resume"),
        (["look", "nowhere"], "nowhere is no folder; give the train.output_dir"),
        (["inspect", "nowhere"], "nowhere holds no adapter_config.json; give a folder"),
        (["report", "nowhere"], "nowhere holds no grids/*.json; give the output folder"),
        (["demo", "--seed", "2"], "Did you mean --seeds?"),
        (["trian"], "Did you mean 'train'?"),
        (["train", "--config", "rte", "--lr", "1e-3"], "Settings have no dashes: train.lr=VALUE"),
        (["train", "--confg", "rte"], "Did you mean --config?"),
        (["validate", "--config", "rte", "train.device=cuda"], "CUDA_VISIBLE_DEVICES"),
        (["report", "x", "--output-dir", "/proc/x"], "--output-dir=/proc/x cannot be written to"),
        (["inspect", "x", "--graph", "/dev/null/x/y.svg"], "--graph=/dev/null/x cannot be written to (Not a"),
        (["train", "--config", "digits", "train.output_dir=/dev/null/x"], "train.output_dir=/dev/null/x cannot be"),
    ],
)
def test_wrong_input_is_named_with_exit_code_2(arguments: list[str], said: str, capsys) -> None:
    code, _, error = run(capsys, *arguments)
    assert code == 2
    assert said in error


def test_the_configuration_of_an_adapter_is_recognised(capsys, tmp_path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 8}')
    code, _, error = run(capsys, "train", "--config", tmp_path / "adapter_config.json")
    assert code == 2
    assert f"to look at the adapter: structlora inspect {tmp_path}" in error


def test_colour_and_a_bar_with_the_time_left_are_for_terminals_alone(capsys, tmp_path, monkeypatch) -> None:
    settings = ["train.max_steps=2", "adapter.schedule.warmup_steps=0", f"model.path={tmp_path}"]
    monkeypatch.setitem(small.DIGITS_RECIPE, "steps", 1)
    for seen in (True, False):
        monkeypatch.setattr(sys.stderr, "isatty", lambda seen=seen: seen)
        code, text, error = run(capsys, "train", "digits", *settings, f"train.output_dir={tmp_path / str(seen)}")
        assert (code, "results: " in text) == (0, True)
        assert ("step/s" in error, "\r" in error) == (seen, seen)
        for no_colour in ("", "1"):
            monkeypatch.setenv("NO_COLOR", no_colour)
            error = run(capsys, "look", tmp_path / "nowhere")[2]
            red = "\033[31mstructlora look:\033[0m " if seen and not no_colour else "structlora look: "
            assert error.startswith(red)


def test_an_interrupted_command_says_how_it_goes_on(capsys, tmp_path, monkeypatch) -> None:
    def interrupt(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("structlora_pyg.study.sweep.run_grid", interrupt)
    monkeypatch.setattr("structlora_pyg.study.train.train", interrupt)
    assert "made one, with: structlora train rte --resume\n" in run(capsys, "train", "rte")[2]
    code, _, error = run(capsys, "demo", "--output-dir", tmp_path)
    assert (code, error) == (
        130,
        f"structlora demo: interrupted; go on with: structlora demo --output-dir {tmp_path}\n",
    )


def test_a_shell_completes_commands_options_and_configurations(capsys, tmp_path) -> None:
    script = tmp_path / "completion"
    script.write_text(
        run(capsys, "completion")[1] + 'COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _structlora; echo ${COMPREPLY[@]}\n'
    )

    def complete(*words: str) -> str:
        return subprocess.run(["bash", script, *words], capture_output=True, text=True, check=True).stdout.strip()

    assert complete("structlora", "tr") == "train"
    assert complete("structlora", "train", "--sm") == "--smoke"
    assert complete("structlora", "train", "--config", "rt") == "rte"


def test_a_dry_run_estimates_time_and_memory_and_leaves_nothing(capsys, tmp_path, tiny_bert, rte_folder) -> None:
    own = [f"model.path={tiny_bert}", f"data.path={rte_folder}", f"train.output_dir={tmp_path / 'run'}"]
    short = ["data.max_length=16", "adapter.schedule.warmup_steps=1"]
    code, text, _ = run(capsys, "train", "rte", "--dry-run", *own, *short)
    assert code == 0
    assert re.fullmatch(r"about \d+:\d\d:\d\d for \d+ steps of \S+ s, and \S+ GB of memory; estimated .*\n", text)
    assert not (tmp_path / "run").exists()


def test_every_cell_of_a_grid_is_checked_before_the_first_run(capsys, tmp_path) -> None:
    file = tmp_path / "grid.yaml"
    file.write_text(
        """
        tasks: {rte: {config: rte, data.text: sentence1}}
        methods: {LoRA: {method.name: lora}, DyLoRA: {method.name: dylora}}
        ranks: [8, 1]
        """
    )
    code, _, error = run(capsys, "compare", "--config", file, "--output-dir", tmp_path / "out")
    assert code == 2
    assert "2 problems" in error
    assert "LoRA on rte, rank 8 and 3 more: data.text has no effect" in error
    assert "DyLoRA on rte, rank 1: method.name=dylora needs one rank >= 2" in error
    assert not (tmp_path / "out").exists()


def test_doctor_names_what_is_missing(capsys, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("STRUCTLORA_DATA", str(tmp_path / "nowhere"))
    monkeypatch.setenv("PATH", "")
    code, text, _ = run(capsys, "doctor")
    assert code == 0
    assert f"torch             {torch.__version__.partition('+')[0]}" in text
    assert "extra quant       " in text
    assert "java              none; CIDEr" in text
    assert f"{tmp_path / 'nowhere'} does not exist" in text


def test_a_missing_package_is_named_with_the_extra_that_brings_it(capsys, monkeypatch, tmp_path) -> None:
    monkeypatch.delitem(sys.modules, "structlora_pyg.study.sweep", raising=False)
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    code, _, error = run(capsys, "demo", "--output-dir", tmp_path)
    assert code == 2
    assert error == "structlora demo: tqdm is not installed: pip install 'structlora-pyg[study]'\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys) -> None:
    code, text, _ = run(capsys, command, "--help")
    assert code == 0
    assert ("key.sub=value" in text) == (command in ("train", "validate", "describe", "export", "compare", "ablate"))


def test_help_and_version_answer_without_loading_torch() -> None:
    for words in (["--version"], ["--help"], ["compare", "--help"]):
        script = (
            "import sys; from structlora_pyg.cli import main\n"
            f"assert main({words}) == 0\n"
            "assert not {'torch', 'transformers', 'pandas', 'numpy'} & set(sys.modules)"
        )
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5
    done = subprocess.run([sys.executable, "-m", "structlora_pyg", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout[:15]) == (0, "structlora_pyg ")


def test_methods_tasks_and_convolutions_are_listed(capsys, monkeypatch) -> None:
    code, text, _ = run(capsys, "compare", "--list")
    assert code == 0
    lines = [line.split()[0] for line in text.splitlines() if line.startswith("  ")]
    assert set(lines) == {*METHODS, *TASKS}
    monkeypatch.setattr(inspect, "conv_reports", lambda: [inspect._conv_report("SAGEConv", 16)])  # all take seconds
    assert re.search(r"^SAGEConv +hetero_conv +works", run(capsys, "convs")[1], flags=re.M)


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
    code, text, _ = run(capsys, "compare", "--config", file, "--output-dir", out)
    assert code == 0
    assert f"\n4 runs in {out}, 0 of them failed\n" in text  # what was known not to run is none
    code, text, _ = run(capsys, "report", out)
    assert code == 0
    assert {"report.html", "report.csv", "report.tex"} <= {Path(line).name for line in text.splitlines()}
    assert "no such model here" in (out / "report.html").read_text()
    assert "grids" in run(capsys, "report", tmp_path)[2]
    error = run(capsys, "compare", "--config", file, "--size", "mini")[2]
    assert "size='mini' is unknown; this grid has none" in error


def test_a_run_of_another_method_is_exported_merged_and_not_described(capsys, tmp_path, tiny_bert, rte_folder) -> None:
    settings = [
        f"model.path={tiny_bert}", "data.task=rte", f"data.path={rte_folder}", "data.max_length=32", "adapter.r=2",
        "adapter.target_modules=[query, value]", "train.max_steps=3", "train.batch_size=4",
    ]  # fmt: skip
    for method in ("adalora", "full"):
        folder = tmp_path / method
        own = [f"method.name={method}", f"train.output_dir={folder}"]
        assert run(capsys, "train", *settings, *own)[0] == 0
        export = ["export", "--checkpoint", folder / "checkpoint-3", "--output"]
        assert run(capsys, *export, folder / "again")[0] == 0
        assert run(capsys, *export, folder / "merged", "--merge")[0] == 0
        assert "not empty" in run(capsys, *export, folder / "merged", "--merge")[2]
        places = (folder / "again", folder / METHODS[method].folder)
        again, first = (next(place.glob("*.safetensors")) for place in places)
        assert again.read_bytes() == first.read_bytes()
        assert "--ragged has no effect" in run(capsys, *export, folder / "x", "--ragged")[2]
        assert "holds a finished run" in run(capsys, "train", *settings, *own)[2]
    code, _, error = run(capsys, "describe", *settings, "method.name=lora")
    assert code == 2
    assert "method.name=lora has no graph to describe" in error
