"""A comparison makes every run once, goes on where it stopped, and says why a run could not be made."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.runs import disk_that_fills

from structlora_pyg.checks import ConfigError
from structlora_pyg.study import compare as module
from structlora_pyg.study.checkpoints import CheckpointError
from structlora_pyg.study.claims import Claims
from structlora_pyg.study.compare import compare, failed_cells
from structlora_pyg.study.grid import GridConfig
from structlora_pyg.study.report.comparison_report import write_comparison
from structlora_pyg.study.run_store import Runs, write_run
from structlora_pyg.study.tasks.registry import load_task
from structlora_pyg.study.tasks.rows import DataError
from structlora_pyg.study.tuning import chosen_rates, tuning_trials

ROOT = str(Path(__file__).parents[2])


@pytest.fixture
def grid(tiny_bert: Path, rte_folder: Path, tmp_path: Path) -> GridConfig:
    """A grid of two methods and two seeds on a tiny BERT."""
    task = {
        "config": "rte", "model.path": str(tiny_bert), "data.path": str(rte_folder), "data.max_length": 32,
    }  # fmt: skip
    return GridConfig(
        name="tiny",
        baseline="LoRA",
        tasks={"rte": task},
        methods={"LoRA": {"method.name": "lora"}, "StructLoRA": {"method.name": "structlora"}},
        ranks=[2],
        seeds=2,
        settings={"train.max_steps": 4, "train.batch_size": 4, "adapter.schedule.warmup_steps": 1},
        learning_rates=[1e-3, 1e-2],
        watch_every=2,
        importance_examples=4,
    )


def records(folder: Path) -> dict[str, dict[str, Any]]:
    return {file.stem: json.loads(file.read_text()) for file in (folder / "runs").glob("*.json")}


def test_a_grid_becomes_one_file_a_run_and_a_table_of_keys(grid: GridConfig, tmp_path: Path) -> None:
    table = compare(grid, tmp_path / "out", progress=False)
    found = records(tmp_path / "out")
    assert len(found) == 2 * 2 + 2 * 2  # two rates and two seeds, of two methods
    assert table == json.loads((tmp_path / "out" / "grids" / "tiny.json").read_text())
    assert table["failed"] == {}
    for cell in table["cells"]:
        run = found[cell["key"]]
        assert (run["task"], run["rank"], run["seed"], run["status"]) == ("rte", 2, cell["seed"], "done")
        assert run["config"]["data"]["validation_share"] == 0.0
        assert run["lr"] == table["learning_rates"]["rte"][cell["method"]]
        assert [look["step"] for look in run["curves"]["structure"]] == [2, 4]
        assert len(run["curves"]["loss"]) == 4
        assert (
            run["structure"]["names"]
            == [f"encoder.layer.{i}.attention.self.{n}" for i in (0, 1) for n in ("query", "value")]
            or len(run["structure"]["names"]) == 4
        )
        mine = cell["method"] == "StructLoRA"
        assert (run["gates"] is not None) == mine
        assert (run["importance"] is not None) == (mine and cell["seed"] == 0)
        assert run["seconds"]["total"] > 0
    assert not (tmp_path / "out" / "work").exists()


def test_the_rate_with_the_best_score_on_the_cut_is_taken(grid: GridConfig, tmp_path: Path) -> None:
    table = compare(grid, tmp_path, progress=False)
    tuning = [r for r in records(tmp_path).values() if r["config"]["data"]["validation_share"] > 0]
    for method, name in (("LoRA", "lora"), ("StructLoRA", "structlora")):
        scores = {r["lr"]: (r["metrics"]["accuracy"], -r["metrics"]["loss"]) for r in tuning if r["method"] == name}
        assert len(scores) == 2
        assert table["learning_rates"]["rte"][method] == max(scores, key=lambda lr: scores[lr])


@pytest.mark.parametrize(
    ("higher", "scores", "losses", "best"),
    [
        (True, (0.7, 0.9), (1.0, 2.0), 1e-2),
        (False, (0.7, 0.9), (1.0, 2.0), 1e-3),
        (True, (0.8, 0.8), (1.0, 2.0), 1e-3),  # among equals the lower loss
        (True, (None, 0.1), (None, 2.0), 1e-2),  # a run that failed is out
    ],
)
def test_the_choice_follows_the_direction_of_the_metric(
    higher: bool, scores: tuple, losses: tuple, best: float, grid: GridConfig, tmp_path: Path
) -> None:
    (tmp_path / "runs").mkdir()
    store = Runs(tmp_path)
    for trial in tuning_trials(grid):
        at = grid.learning_rates.index(trial.config.train.lr)
        place = {"schema": 1, "key": "0", "method": "lora", "task": "rte", "rank": 2, "fraction": 1.0, "seed": 0}
        place |= {"lr": 1e-3, "config": {}}
        metrics = {"accuracy": scores[at], "loss": losses[at]}
        done = {"status": "done", "metric": "accuracy", "metrics": metrics, "higher_is_better": higher}
        store.add(trial.config, {**place, **(done if scores[at] is not None else {"status": "failed"})})
    assert chosen_rates(grid, store) == {"rte": {"LoRA": best, "StructLoRA": best}}


def test_nothing_is_run_twice_and_what_is_missing_is_made(
    grid: GridConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = compare(grid, tmp_path, progress=False)
    lost = first["cells"][1]["key"]
    before = records(tmp_path)[lost]
    (tmp_path / "runs" / f"{lost}.json").unlink()
    made = []
    real = module.train
    monkeypatch.setattr(module, "train", lambda config, **options: made.append(config) or real(config, **options))
    assert compare(grid, tmp_path, progress=False) == first
    assert [config.method.name for config in made] == [before["method"]]
    assert records(tmp_path)[lost]["metrics"] == before["metrics"]
    more = compare(GridConfig(**{**vars(grid), "seeds": 3, "name": "more"}), tmp_path, progress=False)
    assert len(made) == 3  # one more seed of two methods; the shared runs are taken from the first grid
    assert [cell["key"] for cell in more["cells"][:4]] == [cell["key"] for cell in first["cells"]]


def test_runs_side_by_side_give_the_same(grid: GridConfig, tmp_path: Path) -> None:
    alone = compare(grid, tmp_path / "one", progress=False)
    together = compare(grid, tmp_path / "two", jobs=2, progress=False)
    assert alone["cells"] == together["cells"]
    one, two = records(tmp_path / "one"), records(tmp_path / "two")
    assert {key: run["metrics"] for key, run in one.items()} == {key: run["metrics"] for key, run in two.items()}


def test_a_run_that_cannot_be_made_says_why_and_the_others_go_on(grid: GridConfig, tmp_path: Path) -> None:
    grid.methods["AdaLoRA"] = {"method.name": "adalora", "adapter.rank_pattern": {"query": 1}}
    grid.methods["wild"] = {"method.name": "lora", "learning_rates": [1e30]}
    table = compare(grid, tmp_path, progress=False)
    assert len(table["cells"]) == 8
    assert sorted(cell["method"] for cell in failed_cells(table)) == ["AdaLoRA", "AdaLoRA", "wild", "wild"]
    for cell in (cell for cell in table["cells"] if cell["method"] == "AdaLoRA"):
        assert cell["key"] is None
        assert cell["why"].startswith("no learning rate could be chosen: ConfigError")
        assert "allocates ranks itself" in cell["why"]
    for key, reason in table["failed"].items():
        assert reason.startswith("FloatingPointError")
        failed = records(tmp_path)[key]
        assert failed["status"] == "failed"
        assert "Traceback" in failed["traceback"]


def test_a_task_known_to_be_unavailable_is_said_so_and_not_loaded(grid: GridConfig, tmp_path: Path) -> None:
    grid.tasks["coco"] = {"config": "rte", "data.path": str(tmp_path / "nowhere"), "unavailable": "no such model here"}
    assert {trial.cell.task for trial in tuning_trials(grid)} == {"rte"}
    table = compare(grid, tmp_path, progress=False)
    assert len(table["cells"]) == 8
    assert [cell["why"] for cell in table["cells"] if cell["task"] == "coco"] == ["no such model here"] * 4
    assert not failed_cells(table)  # nothing was tried
    assert {record["task"] for record in records(tmp_path).values()} == {"rte"}
    assert table["learning_rates"]["coco"] == {"LoRA": 1e-3, "StructLoRA": 1e-3}


def test_a_run_interrupted_after_a_checkpoint_ends_as_if_it_had_not_been(
    grid: GridConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid.learning_rates, grid.settings["train.save_every"] = [1e-3], 2
    undisturbed = compare(grid, tmp_path / "a", progress=False)

    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("structlora_pyg.study.train._evaluate", interrupt)
        with pytest.raises(KeyboardInterrupt):
            compare(grid, tmp_path / "b", progress=False)
    (work,) = (path for path in (tmp_path / "b" / "work").iterdir() if path.is_dir())
    assert (work / "checkpoint-2").is_dir()
    resumed = []
    real = module.train
    monkeypatch.setattr(
        module, "train", lambda config, **options: resumed.append(options["resume"]) or real(config, **options)
    )
    assert compare(grid, tmp_path / "b", progress=False)["cells"] == undisturbed["cells"]
    assert resumed == [True, False, False, False]
    one, two = records(tmp_path / "a"), records(tmp_path / "b")
    assert {key: run["metrics"] for key, run in one.items()} == {key: run["metrics"] for key, run in two.items()}


def test_workers_end_with_a_comparison_that_was_killed(grid: GridConfig, tmp_path: Path) -> None:
    file = tmp_path / "grid.yaml"
    grid.settings["train.max_steps"] = 100_000
    values = {k: v for k, v in vars(grid).items() if v is not None}
    file.write_text(yaml.safe_dump(values))
    command = [
        sys.executable,
        "-m",
        "structlora_pyg",
        "compare",
        "--config",
        str(file),
        f"output_dir={tmp_path / 'out'}",
    ]
    parent = subprocess.Popen([*command, "--jobs", "2"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    logs = tmp_path / "out" / "work"
    try:
        assert _within(240, lambda: len(list(logs.glob("*/metrics.jsonl"))) == 2)
    finally:
        parent.kill()
        parent.wait()
    sizes = {}

    def still() -> bool:
        before = dict(sizes)
        sizes.update({f: f.stat().st_size for f in logs.glob("*/metrics.jsonl")})
        return sizes == before

    assert _within(20, still)


def _within(seconds: float, condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.5)
    return False


def test_a_setting_added_since_does_not_part_a_run_from_its_file(grid: GridConfig, tmp_path: Path) -> None:
    compare(grid, tmp_path, progress=False)
    for file in (tmp_path / "runs").glob("*.json"):
        record = json.loads(file.read_text())
        del record["config"]["train"]["importance_examples"], record["config"]["data"]["train_fraction"]
        (tmp_path / "runs" / f"old-{file.name}").write_text(json.dumps(record))
        file.unlink()
    store = Runs(tmp_path)
    configs = [grid.run(cell, 1e-3) for cell in grid.cells() if cell.seed == 1]  # no importance at this seed
    found = [store.key(config) for config in configs]
    table = json.loads((tmp_path / "grids" / "tiny.json").read_text())
    chosen = [table["learning_rates"]["rte"][m] == 1e-3 for m in ("LoRA", "StructLoRA")]
    assert [key is not None and key.startswith("old-") for key in found] == chosen


def test_the_report_is_made_of_what_was_run(grid: GridConfig, tmp_path: Path) -> None:
    grid.learning_rates, grid.paper = [1e-3], "table2"
    compare(grid, tmp_path, progress=False)
    files = write_comparison([tmp_path], tmp_path)
    text = files["report.md"].read_text()
    for run in records(tmp_path).values():
        assert run["lr"] == 1e-3
    mean = sum(r["metrics"]["accuracy"] for r in records(tmp_path).values() if r["method"] == "lora") / 2
    assert f"{100 * mean:.2f}" in text
    assert "not reproduced" in text
    assert "<table" in files["report.html"].read_text()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"schema": 99}', "has schema 99, this version reads 1; write it anew with .structlora compare."),
        ("{", "is damaged: it is not JSON .*; delete it"),
        ("[1]", "it holds a list"),
        ('{"schema": 1}', "it has no 'key'"),
    ],
)
def test_files_of_another_version_stop_before_any_work(text: str, said: str, grid: GridConfig, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "0123.json").write_text(text)
    with pytest.raises(ValueError, match=said):
        compare(grid, tmp_path, progress=False)
    assert len(list((tmp_path / "runs").iterdir())) == 1


def test_missing_data_stops_before_any_run(grid: GridConfig, tmp_path: Path) -> None:
    grid.tasks["rte"]["data.path"] = str(tmp_path / "nowhere")
    with pytest.raises((DataError, FileNotFoundError), match="nowhere"):
        compare(grid, tmp_path / "out", progress=False)
    assert not records(tmp_path / "out")


def test_a_full_disk_stops_a_comparison_which_then_goes_on_from_the_last_checkpoint(
    grid: GridConfig, tmp_path: Path
) -> None:
    grid.settings |= {"train.save_every": 2}
    work = tmp_path / "out" / "work"
    with (
        disk_that_fills(lambda: any(work.glob("*/checkpoint-2")), 200),
        pytest.raises(CheckpointError, match="the disk is full"),
    ):
        compare(grid, tmp_path / "out", progress=False)
    assert len(list(work.glob("*/checkpoint-2"))) == 1
    assert not records(tmp_path / "out")  # nothing is said of a run that had no disk
    again, whole = (compare(grid, tmp_path / name, progress=False) for name in ("out", "whole"))
    assert again == whole
    first, second = (records(tmp_path / name) for name in ("out", "whole"))
    assert {key: run["metrics"] for key, run in first.items()} == {key: run["metrics"] for key, run in second.items()}


def test_jobs_have_to_be_a_positive_number(grid: GridConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="jobs must be >= 1"):
        compare(grid, tmp_path, jobs=0, progress=False)


def test_a_run_belongs_to_one_process_until_it_is_made_or_its_owner_ends(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    mine, yours = Claims(tmp_path, ["a", "b"]), Claims(tmp_path, ["a", "b"])
    with mine.take("a") as free:
        assert free
        assert not yours.free("a")
        assert yours.free("b")
        with yours.take("a") as taken:
            assert not taken
    assert yours.free("a")  # it was let go of unmade
    with mine.take("a"):
        write_run(tmp_path, "a", {"status": "failed"})
    assert yours.made("a")
    assert not yours.free("a")
    assert Claims(tmp_path, ["a"]).free("a")  # for a later comparison it is an old failure, to be tried again
    script = "import sys, time; from structlora_pyg.study.claims import Claims; from pathlib import Path\n"
    script += "with Claims(Path(sys.argv[1]), ['b']).take('b'): print('taken', flush=True); time.sleep(600)"
    owner = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE)
    assert owner.stdout is not None
    assert owner.stdout.readline() == b"taken\n"
    assert not yours.free("b")
    owner.kill()
    owner.wait()
    assert yours.free("b")


def test_runs_that_others_made_since_the_folder_was_read_are_not_made_again(
    grid: GridConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs").mkdir()
    read_before = Runs(tmp_path)
    compare(grid, tmp_path, progress=False)
    monkeypatch.setattr(module, "run_trial", lambda *_: pytest.fail("it was made already"))
    trials = list(tuning_trials(grid))
    assert trials
    module._run_all(trials, read_before, "again", jobs=1, progress=False)
    assert all(read_before.done(trial.config) for trial in trials)


@pytest.mark.slow
def test_processes_that_share_a_folder_share_the_work(grid: GridConfig, tmp_path: Path) -> None:
    """Every run is made once, a killed process's runs are taken up, and the grid is that of one process."""
    grid.methods["wild"] = {"method.name": "lora", "learning_rates": [1e30]}
    grid.settings["train.max_steps"] = 30
    alone = compare(grid, tmp_path / "alone", progress=False)
    file, folder = tmp_path / "grid.yaml", tmp_path / "shared"
    file.write_text(yaml.safe_dump({k: v for k, v in vars(grid).items() if v is not None}))
    script = tmp_path / "worker.py"
    script.write_text(
        "import sys, time\n"
        "from pathlib import Path\n"
        "from structlora_pyg.study import compare\n"
        "from structlora_pyg.study.grid import load_grid\n"
        "from structlora_pyg.study.run_store import run_key\n"
        "name, file, folder = sys.argv[1:]\n"
        "real = compare.train\n"
        "def train(config, **options):\n"
        "    key = Path(config.train.output_dir).name\n"
        "    with open(Path(file).parent / f'{name}.log', 'a') as log: log.write(key + chr(10))\n"
        "    if name == 'killed': time.sleep(600)\n"
        "    return real(config, **options)\n"
        "compare.train = train\n"
        "print(len(compare.compare(load_grid(file, []), folder, progress=False)['failed']))\n"
    )

    def start(name: str) -> subprocess.Popen[str]:
        command = [sys.executable, str(script), name, str(file), str(folder)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": ROOT})

    killed = start("killed")
    assert _within(120, (tmp_path / "killed.log").exists)
    workers = [start(name) for name in ("one", "two")]
    assert _within(120, lambda: len(records(folder)) >= 2)
    killed.kill()
    assert [worker.communicate()[0].strip() for worker in workers] == ["2", "2"]
    logs = [(tmp_path / f"{name}.log").read_text().split() for name in ("one", "two")]
    made = [key for log in logs for key in log]
    assert set(made) == set(records(tmp_path / "alone"))
    done = [key for key in made if records(folder)[key]["status"] == "done"]
    assert len(done) == len(set(done))  # a process that starts after a failure tries that run again
    assert all(logs)  # both had some
    assert (tmp_path / "killed.log").read_text().strip() in made
    table = json.loads((folder / "grids" / "tiny.json").read_text())
    assert table["cells"] == alone["cells"]
    assert table["learning_rates"] == alone["learning_rates"]
    scores = [{key: run.get("metrics") for key, run in records(f).items()} for f in (tmp_path / "alone", folder)]
    assert scores[0] == scores[1]
    assert not (folder / "work").exists()


def test_examples_that_the_cut_part_lacks_are_noticed_before_any_run(grid: GridConfig, tmp_path: Path) -> None:
    """All of train is there for the runs of the table, but not for those that choose learning rates."""
    grid.tasks["rte"]["data.train_limit"] = len(load_task(**where(grid)).train_set)
    with pytest.raises(DataError, match="train_limit"):
        compare(grid, tmp_path / "out", progress=False)
    assert not list((tmp_path / "out" / "runs").iterdir())


def where(grid: GridConfig) -> dict[str, Any]:
    config = grid.run(grid.cells()[0], 1e-3)
    return {"model": config.model, "data": config.data, "seed": 0}


def test_a_run_that_had_only_to_be_written_down_is_not_made_again(
    grid: GridConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid.learning_rates, grid.seeds = [1e-3], 1

    def killed(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(module, "write_run", killed)
        with pytest.raises(KeyboardInterrupt):
            compare(grid, tmp_path, progress=False)
    made = []
    real = module.train
    monkeypatch.setattr(module, "train", lambda config, **options: made.append(config) or real(config, **options))
    table = compare(grid, tmp_path, progress=False)
    assert [config.method.name for config in made] == ["structlora"]
    assert table["failed"] == {}
    assert not (tmp_path / "work").exists()


def test_grids_may_call_one_task_by_two_names(grid: GridConfig, tmp_path: Path) -> None:
    grid.learning_rates, grid.seeds = [1e-3], 1
    compare(grid, tmp_path, progress=False)
    other = GridConfig(**{**vars(grid), "name": "other", "tasks": {"RTE, tiny": grid.tasks["rte"]}})
    compare(other, tmp_path, progress=False)
    assert len(list((tmp_path / "runs").iterdir())) == 2
    write_comparison([tmp_path], tmp_path)
    assert "RTE, tiny: accuracy, %" in (tmp_path / "report.md").read_text()


def test_the_time_left_counts_no_runs_that_cannot_be_made(
    grid: GridConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid.learning_rates = [1e-3]
    grid.tasks["far"] = {**grid.tasks["rte"], "unavailable": "no data at hand"}
    left, real = [], module._Progress.done

    def done(bar: Any, trial: Any, record: dict[str, Any]) -> None:
        real(bar, trial, {**record, "seconds": {"total": 20.0}})
        left.append(bar._left())

    monkeypatch.setattr(module._Progress, "done", done)
    compare(grid, tmp_path, progress=False)
    assert left == ["60 s", "40 s", "20 s", "0 s"]  # two methods, two seeds, one task
