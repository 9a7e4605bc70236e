"""``structlora look`` shows what a run has recorded, says what it has not, and names what it cannot read."""

import json
import re
import shutil
from pathlib import Path

from helpers.adapted import stock
from helpers.runs import tiny_config

from structlora_pyg import AdapterGraphDataset
from structlora_pyg.cli import main
from structlora_pyg.study.train import train

FIGURES = {"graph", "attention", "structure", "dirichlet", "loss", "exported"}


def headings(page: str) -> list[str]:
    return re.findall(r"<h2>(.*?)</h2>", page)


def test_one_command_makes_the_page_and_every_figure(watched_run: Path, looked: Path) -> None:
    written = {p.relative_to(looked).as_posix() for p in looked.rglob("*") if p.is_file()}
    assert written == {"look.html", *(f"figures/look-{name}.svg" for name in FIGURES)}
    page = (looked / "look.html").read_text()
    assert headings(page) == [
        "The adapter graph", "Attention", "Structure over training", "Smoothing by the coordinator", "Training loss",
        "How alike the exported updates are",
    ]  # fmt: skip
    assert not re.search(r"(src|href)=\"(?!#|data:)|url\(http|@import", page)
    last = AdapterGraphDataset(watched_run / "graphs")[-1]
    gate = last.gate[last.scaling != 0]
    said = f"{int((gate == 0).sum())} of {gate.numel()} gates are closed, the mean gate is {float(gate.mean()):.2f}"
    assert said in page
    assert f"{json.loads((watched_run / 'results.json').read_text())['metrics']['accuracy']:.4f}" in page


def test_what_was_not_recorded_is_named_with_its_setting(tiny_bert, rte_folder, tmp_path) -> None:
    for method, said in (
        ("lora", "the adapter graph (method.name=lora has none; method.name=structlora has)"),
        ("structlora", "the adapter graph and its attention (train.record_every=10 records them)"),
    ):
        folder = tmp_path / method
        train(tiny_config(tiny_bert, rte_folder, folder, method=method, max_steps=2, save_every=0), progress=False)
        (folder / "results.json").unlink()  # as if it were still running
        assert main(["look", str(folder)]) == 0
        page = (folder / "look.html").read_text()
        for sentence in (said, "structure over training (train.watch_every=10 records it)", "2 so far", "not finished"):
            assert sentence in page
        assert headings(page) == ["Training loss", "Not shown"]


def test_folders_that_cannot_be_looked_at_are_named(watched_run: Path, tiny_bert, tmp_path, capsys) -> None:
    stock(tmp_path / "lora")
    damaged = {"graphs": "graphs/raw/graph-00000004.pt", "results": "results.json", "settings": "config.json"}
    for name, file in damaged.items():
        shutil.copytree(watched_run, tmp_path / name, ignore=shutil.ignore_patterns("processed"))
        whole = (tmp_path / name / file).read_bytes()
        (tmp_path / name / file).write_bytes(whole[: len(whole) // 2])
    for folder, said in (
        (tmp_path / "lora", f"is an adapter, not a run; look at it with: structlora inspect {tmp_path / 'lora'}"),
        (tmp_path / "nothing", "is no folder"),
        (tiny_bert, "config.json is damaged, another program's, or of another version"),
        (tmp_path / "graphs", "graph-00000004.pt is damaged"),
        (tmp_path / "results", "results.json is damaged"),
        (tmp_path / "settings", "config.json is damaged"),
    ):
        assert main(["look", str(folder), "--output-dir", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.startswith("structlora look: ")
        assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert main(["look", str(watched_run), "--output-dir", str(watched_run / "config.json")]) == 2
    assert "Not a directory" in capsys.readouterr().err
    assert main(["look"]) == 2
    assert "required: folder" in capsys.readouterr().err
