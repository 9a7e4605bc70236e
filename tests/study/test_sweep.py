"""A sweep makes every run once, goes on where it stopped, and says why a run could not be made."""

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
from joblib.externals.loky import get_reusable_executor
from joblib.externals.loky.backend import context

from structlora_pyg.checks import ConfigError
from structlora_pyg.study import sweep as module
from structlora_pyg.study.grid import GridConfig
from structlora_pyg.study.report.records import read_comparison
from structlora_pyg.study.run_folder import CheckpointError
from structlora_pyg.study.runs import RunStore, call_each, run_key, take, write_run
from structlora_pyg.study.sweep import choose_rates, failed_cells, run_grid
from structlora_pyg.study.tasks.data import DataError

ROOT = str(Path(__file__).parents[2])


@pytest.fixture
def grid(tiny_bert: Path, rte_folder: Path) -> GridConfig:
    """A grid of two methods and two seeds on a tiny BERT."""
    task = {"config": "rte", "model.path": str(tiny_bert), "data.path": str(rte_folder), "data.max_length": 32}
    return GridConfig(
        name="tiny",
        baseline="LoRA",
        tasks={"rte": task},
        methods={"LoRA": {"method.name": "lora"}, "StructLoRA": {"method.name": "structlora"}},
        ranks=[2],
        seeds=2,
        settings={"train.max_steps": 2, "train.batch_size": 4, "adapter.schedule.warmup_steps": 1},
        learning_rates=[1e-3, 1e-2],
    )


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What `train` is called with from now on."""
    calls: list[dict[str, Any]] = []
    real = module.train
    monkeypatch.setattr(
        module,
        "train",
        lambda config, **options: calls.append({"method": config.method.name, **options}) or real(config, **options),
    )
    return calls


def quiet(grid: GridConfig, folder: Path, **options: Any) -> dict[str, Any]:
    return run_grid(grid, folder, progress=False, **options)


def records(folder: Path) -> dict[str, dict[str, Any]]:
    return {file.stem: json.loads(file.read_text()) for file in (folder / "runs").glob("*.json")}


def scores(folder: Path) -> dict[str, Any]:
    return {key: run.get("metrics") for key, run in records(folder).items()}


def write_grid(grid: GridConfig, file: Path) -> Path:
    file.write_text(yaml.safe_dump({k: v for k, v in vars(grid).items() if v is not None}))
    return file


def within(seconds: float, condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.5)
    return False


def test_a_grid_becomes_one_file_per_run_and_a_table_of_keys(grid: GridConfig, tmp_path: Path) -> None:
    grid.settings["train.max_steps"], grid.watch_every, grid.importance_examples = 4, 2, 4
    table = quiet(grid, tmp_path)
    found = records(tmp_path)
    assert len(found) == 2 * 2 + 2 * 2  # two rates and two seeds, of two methods
    assert table == json.loads((tmp_path / "grids" / "tiny.json").read_text())
    assert table["failed"] == {}
    for cell in table["cells"]:
        run = found[cell["key"]]
        assert (run["task"], run["rank"], run["seed"], run["status"]) == ("rte", 2, cell["seed"], "done")
        assert run["config"]["data"]["validation_share"] == 0.0
        assert run["lr"] == table["learning_rates"]["rte"][cell["method"]]
        assert [look["step"] for look in run["curves"]["structure"]] == [2, 4]
        assert len(run["curves"]["loss"]) == 4
        mine = cell["method"] == "StructLoRA"
        assert (run["gates"] is not None) == mine
        assert (run["importance"] is not None) == (mine and cell["seed"] == 0)
        assert run["seconds"]["total"] > 0
    assert not (tmp_path / "work").exists()
    tuning = [r for r in found.values() if r["config"]["data"]["validation_share"] > 0]
    for method, name in (("LoRA", "lora"), ("StructLoRA", "structlora")):
        tried = {r["lr"]: (r["metrics"]["accuracy"], -r["metrics"]["loss"]) for r in tuning if r["method"] == name}
        assert len(tried) == 2
        assert table["learning_rates"]["rte"][method] == max(tried, key=lambda lr: tried[lr])


@pytest.mark.parametrize(
    ("higher", "metrics", "losses", "best"),
    [
        (True, (0.7, 0.9), (1.0, 2.0), 1e-2),
        (False, (0.7, 0.9), (1.0, 2.0), 1e-3),
        (True, (0.8, 0.8), (1.0, 2.0), 1e-3),  # among equals the lower loss
        (True, (None, 0.1), (None, 2.0), 1e-2),  # a run that failed is out
    ],
)
def test_the_choice_follows_the_direction_of_the_metric(higher, metrics, losses, best, grid, tmp_path) -> None:
    store, trials = RunStore(tmp_path), list(grid.tuning_trials())
    for trial in trials:
        at = grid.learning_rates.index(trial.config.train.lr)
        place = {"schema": 1, "key": 16 * "0", "method": "lora", "task": "rte", "rank": 2, "fraction": 1.0, "seed": 0}
        place |= {"lr": 1e-3, "config": {}, "reason": None, "status": "done", "metric": "accuracy"}
        place |= {"metrics": {"accuracy": metrics[at], "loss": losses[at]}, "higher_is_better": higher}
        failed = {"status": "failed", "reason": "x"} if metrics[at] is None else {}
        write_run(tmp_path, run_key(trial.config), {**place, **failed})
        store.reload(run_key(trial.config))
    chosen, reasons = choose_rates(grid, store, trials)
    assert ({name: choice.lr for name, choice in chosen["rte"].items()}, reasons) == (
        {"LoRA": best, "StructLoRA": best},
        {},
    )


def test_settings_are_tuned_together_with_the_rate(grid: GridConfig, tmp_path: Path) -> None:
    grid.methods["LoRA"]["tune"] = {"adapter.lora_dropout": [0.1, 0.5]}
    grid.tuning_seeds = grid.seeds = 1
    del grid.methods["StructLoRA"]
    table = quiet(grid, tmp_path)
    tuning = [r for r in records(tmp_path).values() if r["config"]["data"]["validation_share"] > 0]
    tried = {
        (r["lr"], r["config"]["adapter"]["lora_dropout"]): (r["metrics"]["accuracy"], -r["metrics"]["loss"])
        for r in tuning
        if r["method"] == "lora"
    }
    assert len(tried) == 4
    best = max(tried, key=lambda choice: tried[choice])
    assert table["learning_rates"]["rte"]["LoRA"] == best[0]
    assert table["tuned"] == {"rte": {"LoRA": {"adapter.lora_dropout": best[1]}}}
    runs = [records(tmp_path)[cell["key"]] for cell in table["cells"] if cell["method"] == "LoRA"]
    assert {(r["lr"], r["config"]["adapter"]["lora_dropout"]) for r in runs} == {best}


def test_nothing_is_run_twice_and_what_is_missing_is_made(grid, tmp_path, trained) -> None:
    grid.learning_rates = [1e-3]
    first = quiet(grid, tmp_path)
    lost = first["cells"][1]["key"]
    before = records(tmp_path)[lost]
    (tmp_path / "runs" / f"{lost}.json").unlink()
    trained.clear()
    assert quiet(grid, tmp_path) == first
    assert [call["method"] for call in trained] == [before["method"]]
    assert records(tmp_path)[lost]["metrics"] == before["metrics"]
    labels = {"RTE, tiny": grid.tasks["rte"]}
    more = quiet(GridConfig(**{**vars(grid), "seeds": 3, "name": "more", "tasks": labels}), tmp_path)
    assert len(trained) == 3  # one more seed of two methods; the shared runs are taken from the first grid
    assert [cell["key"] for cell in more["cells"][:4]] == [cell["key"] for cell in first["cells"]]
    labels = {grid.name: {setting.task for setting in grid.settings} for grid in read_comparison(tmp_path)}
    assert labels == {"tiny": {"rte"}, "more": {"RTE, tiny"}}


@pytest.mark.filterwarnings("ignore:.*fork.* start method:UserWarning")
def test_calls_are_made_by_other_processes_and_each_is_reported(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(context, "_DEFAULT_START_METHOD", "fork")  # or every process takes seconds to import torch
    places = [str(tmp_path / name) for name in "abc"]
    ended = list(call_each(os.mkdir, [(place,) for place in places], 2, "loky", {}, tmp_path))
    assert len(ended) == 3
    assert all(map(os.path.isdir, places))
    with pytest.raises(FileExistsError):
        list(call_each(os.mkdir, [(places[0],)], 2, "loky", {}, tmp_path))
    get_reusable_executor().shutdown()


BACKENDS = {"loky": "joblib", "ray": "ray", "dask": "distributed", "slurm": "submitit"}
OPTIONS = {"ray": {"num_cpus": 1}, "slurm": {"cluster": "local"}}


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_runs_in_other_processes_and_on_a_cluster_give_the_same(backend, grid, tmp_path, monkeypatch) -> None:
    pytest.importorskip(BACKENDS[backend])
    monkeypatch.setenv("PYTHONPATH", ROOT)
    grid.learning_rates, grid.seeds = [1e-3], 1
    grid.methods["wild"] = {"method.name": "lora", "learning_rates": [1e30]}
    alone = quiet(grid, tmp_path / "one")
    there = quiet(grid, tmp_path / "two", jobs=2, backend=backend, backend_options=OPTIONS.get(backend, {}))
    assert alone == there
    assert scores(tmp_path / "one") == scores(tmp_path / "two")


def test_backends_files_and_data_are_checked_before_any_run(grid, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setitem(sys.modules, "ray", None)
    for options, said in (
        ({"jobs": 0}, "jobs must be >= 1"),
        ({"backend": "rai"}, "Did you mean 'ray'"),
        ({"backend": "ray"}, r"pip install 'structlora-pyg\[ray\]'"),
        ({"backend": "slurm"}, "there is no sbatch here"),
    ):
        with pytest.raises(ConfigError, match=said):
            quiet(grid, tmp_path, **options)
    assert not records(tmp_path)
    (tmp_path / "runs").mkdir(exist_ok=True)
    for text, said in (
        ('{"schema": 99}', "has schema 99, this version reads 1; write it anew with .structlora compare."),
        ("{", "0123.json is damaged: .*; restore it, or delete it"),
        ("[1]", "0123.json is damaged"),
    ):
        (tmp_path / "runs" / "0123.json").write_text(text)
        with pytest.raises(ValueError, match=said):
            quiet(grid, tmp_path)
    assert [file.name for file in (tmp_path / "runs").iterdir()] == ["0123.json"]
    grid.tuning_share = 0.9999
    with pytest.raises(DataError, match="enough to hold out"):
        quiet(grid, tmp_path / "other")
    assert not records(tmp_path / "other")


def test_what_cannot_be_run_says_why_and_the_others_go_on(grid: GridConfig, tmp_path: Path) -> None:
    grid.methods["wilder"] = {"method.name": "lora", "learning_rates": [1e30, 1e31]}
    grid.methods["wild"] = {"method.name": "lora", "learning_rates": [1e30]}
    grid.learning_rates = [1e-3]
    grid.tasks["coco"] = {"config": "rte", "data.path": str(tmp_path / "nowhere"), "unavailable": "no such model here"}
    assert {trial.cell.task for trial in grid.tuning_trials()} == {"rte"}
    table = quiet(grid, tmp_path)
    assert len(table["cells"]) == 16
    assert sorted(cell["method"] for cell in failed_cells(table)) == ["wild", "wild", "wilder", "wilder"]
    for cell in table["cells"]:
        if cell["task"] == "coco":
            assert (cell["key"], cell["why"]) == (None, "no such model here")
        elif cell["method"] == "wilder":
            assert cell["key"] is None
            assert cell["why"].startswith("no learning rate could be chosen: FloatingPointError")
    assert table["learning_rates"]["coco"]["LoRA"] == 1e-3
    for key, reason in table["failed"].items():
        assert reason.startswith("FloatingPointError")
        failed = records(tmp_path)[key]
        assert (failed["status"], failed["task"]) == ("failed", "rte")
        assert "Traceback" in failed["traceback"]


def test_a_run_that_had_only_to_be_written_down_is_not_made_again(grid, tmp_path, monkeypatch, trained) -> None:
    grid.learning_rates, grid.seeds = [1e-3], 1

    def killed(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(module, "write_run", killed)
        with pytest.raises(KeyboardInterrupt):
            quiet(grid, tmp_path)
    trained.clear()
    table = quiet(grid, tmp_path)
    assert [call["method"] for call in trained] == ["structlora"]
    assert table["failed"] == {}
    assert not (tmp_path / "work").exists()


@pytest.mark.slow
def test_workers_end_with_a_sweep_that_was_killed(grid: GridConfig, tmp_path: Path) -> None:
    grid.settings["train.max_steps"] = 100_000
    file = write_grid(grid, tmp_path / "grid.yaml")
    command = [sys.executable, "-m", "structlora_pyg", "compare", "--config", str(file), "--jobs", "2"]
    parent = subprocess.Popen(
        [*command, "--output-dir", str(tmp_path / "out")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    logs = tmp_path / "out" / "work"
    try:
        assert within(240, lambda: len(list(logs.glob("*/metrics.jsonl"))) == 2)
    finally:
        parent.kill()
        parent.wait()
    sizes: dict[Path, int] = {}

    def still() -> bool:
        before = dict(sizes)
        sizes.update({f: f.stat().st_size for f in logs.glob("*/metrics.jsonl")})
        return sizes == before

    assert within(20, still)


def test_a_setting_added_since_does_not_separate_a_run_from_its_file(grid: GridConfig, tmp_path: Path) -> None:
    grid.learning_rates = [1e-3]
    del grid.methods["StructLoRA"]
    quiet(grid, tmp_path)
    for file in (tmp_path / "runs").glob("*.json"):
        record = json.loads(file.read_text())
        del record["config"]["train"]["importance_examples"], record["config"]["data"]["train_fraction"]
        record["key"] = f"old-{file.stem}"
        (tmp_path / "runs" / f"old-{file.name}").write_text(json.dumps(record))
        file.unlink()
    store = RunStore(tmp_path)
    found = [store.get(grid.run(cell, 1e-3)) for cell in grid.cells() if cell.seed == 1]  # no importance there
    assert all(record is not None and record["key"].startswith("old-") for record in found)


def test_a_full_disk_stops_a_sweep_which_then_goes_on_from_the_last_checkpoint(grid, tmp_path) -> None:
    grid.settings |= {"train.save_every": 2, "train.max_steps": 4}
    grid.learning_rates, grid.seeds = [1e-3], 1
    del grid.methods["LoRA"]
    grid.baseline = "StructLoRA"
    work = tmp_path / "out" / "work"
    with (
        disk_that_fills(lambda: any(work.glob("*/checkpoint-2")), 200),
        pytest.raises(CheckpointError, match="the disk is full"),
    ):
        quiet(grid, tmp_path / "out")
    assert len(list(work.glob("*/checkpoint-2"))) == 1
    assert not records(tmp_path / "out")  # nothing is said of a run that had no disk
    assert quiet(grid, tmp_path / "out") == quiet(grid, tmp_path / "whole")
    assert scores(tmp_path / "out") == scores(tmp_path / "whole")


def test_a_run_belongs_to_one_process_until_it_is_made_or_its_owner_ends(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    with take(tmp_path, "a", None) as free:
        assert free
        assert not store.is_free("a")
        assert store.is_free("b")
    assert store.is_free("a")  # it was let go of unmade
    with take(tmp_path, "a", None):
        write_run(tmp_path, "a", {"schema": 1, "status": "failed"})
    assert store.is_made("a")
    assert not store.is_free("a")
    script = "import sys, time; from filelock import FileLock\n"  # what `take` locks, without importing torch
    script += "with FileLock(sys.argv[1]): print('taken', flush=True); time.sleep(600)"
    lock = tmp_path / "work" / "b.lock"
    owner = subprocess.Popen([sys.executable, "-c", script, str(lock)], stdout=subprocess.PIPE)
    assert owner.stdout is not None
    assert owner.stdout.readline() == b"taken\n"
    assert not store.is_free("b")
    owner.kill()
    owner.wait()
    assert store.is_free("b")


@pytest.mark.slow
def test_processes_that_share_a_folder_share_the_work(grid: GridConfig, tmp_path: Path) -> None:
    """Every run is made once, a killed process's runs are taken up, and the grid is that of one process."""
    grid.methods["wild"] = {"method.name": "lora", "learning_rates": [1e30]}
    grid.settings["train.max_steps"] = 30
    alone = quiet(grid, tmp_path / "alone")
    file, folder = write_grid(grid, tmp_path / "grid.yaml"), tmp_path / "shared"
    script = tmp_path / "worker.py"
    script.write_text(
        "import sys, time\n"
        "from pathlib import Path\n"
        "from structlora_pyg.study import sweep\n"
        "from structlora_pyg.study.grid import load_grid\n"
        "name, file, folder = sys.argv[1:]\n"
        "real = sweep.train\n"
        "def train(config, **options):\n"
        "    key = Path(config.train.output_dir).name\n"
        "    with open(Path(file).parent / f'{name}.log', 'a') as log: log.write(key + chr(10))\n"
        "    if name == 'killed': time.sleep(600)\n"
        "    return real(config, **options)\n"
        "sweep.train = train\n"
        "print(len(sweep.run_grid(load_grid(file, []), folder, progress=False)['failed']))\n"
    )

    def start(name: str) -> subprocess.Popen[str]:
        command = [sys.executable, str(script), name, str(file), str(folder)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": ROOT})

    killed = start("killed")
    assert within(120, (tmp_path / "killed.log").exists)
    workers = [start(name) for name in ("one", "two")]
    assert within(120, lambda: len(records(folder)) >= 2)
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
    assert scores(folder) == scores(tmp_path / "alone")
    assert not (folder / "work").exists()
