"""A folder that does not fit is refused with its file and what to do, before anything is made of it."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
from helpers.comparison_folder import REASON, edit_grid, write, write_folder

from structlora_pyg.cli import main
from structlora_pyg.study.report.records import RecordError, Setting, pack, read_comparison, read_runs

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("whole") / "runs")


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "runs"))


def some_run(folder: Path) -> Path:
    """Return the file of the first run: LoRA on stsb at rank 2 with 10 % of the data, seed 0."""
    cell = json.loads((folder / "grids" / "ranks.json").read_text())["cells"][0]
    return folder / "runs" / f"{cell['key']}.json"


def change(file: Path, **changes: object) -> None:
    write(file, {**json.loads(file.read_text()), **changes})


def test_grid_is_read_with_its_runs(folder: Path):
    (grid,) = read_comparison(folder)
    assert (grid.name, grid.baseline, grid.validation) == ("ranks", "LoRA", False)
    assert grid.settings == [
        Setting(t, r, f) for t in ("stsb", "cola") for r in (2, 8) for f in (0.1, 1.0)
    ]  # the order of the columns
    runs = grid.done("StructLoRA", Setting("cola", 8, 1.0))
    assert list(runs.index) == [0, 1, 2, 3, 4]
    on_disk = json.loads((folder / "runs" / f"{runs.loc[3, 'key']}.json").read_text())
    assert runs.loc[3, "score"] == on_disk["metrics"]["matthews"]
    assert runs.loc[3, "structure.adjacent_cosine"] == on_disk["structure"]["adjacent_cosine"]
    assert runs["peak_memory_bytes"].isna().all()
    assert grid.curves[runs.loc[3, "key"]]["similarity"] == on_disk["structure"]["similarity"]


def test_failed_and_missing_runs_are_told_apart(folder: Path):
    (grid,) = read_comparison(folder)
    states = grid.cells.groupby(["method", "task", "rank", "fraction"])["state"].apply(list)
    assert states["AdaLoRA", "stsb", 2, 0.1] == states["AdaLoRA", "cola", 2, 0.1] == ["failed"] * 5
    assert states["DoRA", "cola", 8, 0.1] == ["done"] * 3 + ["not run yet"] * 2
    assert set(grid.cells["reason"][grid.cells["state"] == "failed"]) == {REASON}
    assert len(grid.done()) == 160 - 20 - 2


def test_grids_share_runs(folder: Path):
    grid = json.loads((folder / "grids" / "ranks.json").read_text())
    write(folder / "grids" / "data.json", {**grid, "name": "data"})
    first, second = read_comparison(folder)
    assert [first.name, second.name] == ["data", "ranks"]
    assert set(first.done()["key"]) == set(second.done()["key"])


def test_methods_without_rank_share_a_run_among_the_ranks(folder: Path):
    def share(grid):
        cells = [cell for cell in grid["cells"] if cell["method"] == "LoRA"]
        same = {(c["task"], c["fraction"], c["seed"]): c["key"] for c in cells}
        for c in cells:
            c["key"] = same[c["task"], c["fraction"], c["seed"]]

    (read,) = read_comparison(edit_grid(folder, share))
    two, eight = (read.done("LoRA", Setting("stsb", rank, 0.1))["key"] for rank in (2, 8))
    assert list(two) == list(eight)


def test_folders_without_grids_or_runs_say_so(tmp_path: Path):
    for _ in range(2):
        with pytest.raises(RecordError, match=r"runs holds no grids/\*\.json.*`structlora compare`"):
            read_comparison(tmp_path / "runs")
        (tmp_path / "runs" / "grids").mkdir(parents=True, exist_ok=True)
    with pytest.raises(RecordError, match=r"holds neither runs\.jsonl\.gz nor runs/"):
        read_runs(tmp_path)


BAD: list[tuple[str, dict | str, str]] = [
    ("grid", {"cells": []}, "it has no cells"),
    ("grid", {"cells": None}, "it has no cells"),
    ("grid", {"tasks": 3}, "FILE is damaged"),
    ("run", {"curves": {"step": [], "loss": []}}, "FILE is damaged: it has no 'structure'"),
    ("run", {"metrics": {"pearson": "high"}}, "runs is damaged: could not convert string to float: 'high'"),
]
for which in ("grid", "run"):
    BAD += [(which, {"schema": 2}, "FILE has schema 2, this version reads 1.*`structlora compare`")]
    again = "FILE is damaged: .*delete it and start the same `structlora"
    BAD += [(which, content, again) for content in ('{"schema": 1', "[1]", "")]


@pytest.mark.parametrize(("which", "damage", "message"), BAD)
def test_a_grid_or_a_run_that_does_not_fit_is_refused(folder: Path, which: str, damage: dict | str, message: str):
    file = folder / "grids" / "ranks.json" if which == "grid" else some_run(folder)
    if isinstance(damage, str):
        file.write_text(damage)
    else:
        change(file, **damage)
    with pytest.raises(RecordError, match=message.replace("FILE", file.name)):
        read_comparison(folder)


def test_stored_runs_are_all_there_with_their_version():
    runs = read_runs(RESULTS)
    assert runs["version"].value_counts().to_dict() == {"0.1.0": 1053, "0.2.0": 1182}
    assert runs["score"].notna().all()
    assert sum(len(grid.done()) for grid in read_comparison(RESULTS)) > 700


def test_packed_runs_keep_every_number(folder: Path, tmp_path: Path, capsys):
    packed = tmp_path / "packed"
    assert main(["report", str(folder), "--pack", str(packed)]) == 0
    assert str(packed / "runs.csv") in capsys.readouterr().out
    pd.testing.assert_frame_equal(read_runs(packed), read_runs(folder), check_dtype=False)
    (before,), (after,) = read_comparison(folder), read_comparison(packed)
    pd.testing.assert_frame_equal(after.cells, before.cells, check_dtype=False)
    key = before.done()["key"].iloc[0]
    assert after.curves[key]["loss"] == pytest.approx(before.curves[key]["loss"], rel=1e-3)
    with pytest.raises(RecordError, match="two grids are called 'ranks'"):
        pack([folder, write_folder(tmp_path / "other")], tmp_path / "packed")


@pytest.fixture(scope="module")
def packed(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pack([whole], folder := tmp_path_factory.mktemp("packed"))
    return folder


@pytest.mark.parametrize("name", ["runs.jsonl.gz", "grids.jsonl.gz"])
@pytest.mark.parametrize("content", [b"", b'{"name": 3}', b"\xff\xfe", b"a,b\n1,2\n"])
def test_damaged_packed_file_is_named(packed: Path, tmp_path: Path, name: str, content: bytes):
    shutil.copytree(packed, tmp_path / "packed")
    (tmp_path / "packed" / name).write_bytes(content)
    with pytest.raises(RecordError, match=name.replace(".", r"\.")):
        read_comparison(tmp_path / "packed")
