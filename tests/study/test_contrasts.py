"""Every number of a comparison's tables follows from the records, as scipy and numpy compute it."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from helpers.comparison_folder import REASON, edit_grid, write_folder
from scipy import stats

from structlora_pyg.study.report.records import Setting, read_comparison
from structlora_pyg.study.report.summary import MEAN, summarize
from structlora_pyg.study.report.tables import on_cpu, step_ratio


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("comparison"))


@pytest.fixture(scope="module")
def summary(folder: Path):
    return summarize(read_comparison(folder)[0])


def scores_on_disk(folder: Path) -> dict[tuple, float]:
    """Return all scores times 100, read without the code under test."""
    found = {}
    for cell in json.loads((folder / "grids" / "ranks.json").read_text())["cells"]:
        file = folder / "runs" / f"{cell['key']}.json"
        if file.exists() and (run := json.loads(file.read_text()))["status"] == "done":
            at = (cell["method"], cell["task"], cell["rank"], cell["fraction"], cell["seed"])
            found[at] = 100 * run["metrics"][run["metric"]]
    return found


def test_table_of_differences_is_what_scipy_computes(folder: Path, summary):
    scores, rows = scores_on_disk(folder), []
    for task in ("stsb", "cola", MEAN):
        for rank in (2, 8):
            for fraction in (0.1, 1.0):
                for method in ("StructLoRA", "DoRA", "AdaLoRA"):
                    tasks = ("stsb", "cola") if task == MEAN else (task,)
                    x, y = (
                        {s: np.mean(found) for s in range(5)
                         if len(found := [scores[m, t, rank, fraction, s] for t in tasks
                                          if (m, t, rank, fraction, s) in scores]) == len(tasks)}
                        for m in (method, "LoRA")
                    )  # fmt: skip
                    seeds = sorted(set(x) & set(y))
                    if seeds:
                        pair = np.array([x[s] for s in seeds]), np.array([y[s] for s in seeds])
                        rows.append(((method, Setting(task, rank, fraction)), *pair))
    assert len(rows) == summary.tests == 30
    p = [stats.ttest_rel(x, y).pvalue for _, x, y in rows]
    order, corrected, largest = np.argsort(p), np.empty(len(p)), 0.0
    for place, i in enumerate(order):
        largest = corrected[i] = max(largest, min(1.0, (len(p) - place) * p[i]))
    for (at, x, y), p_holm in zip(rows, corrected, strict=True):
        c, d = summary.at(*at), x - y
        interval = stats.ttest_rel(x, y).confidence_interval(0.95)
        assert c["shared"] == len(d)
        assert c.paired.difference == pytest.approx(d.mean())
        assert (c.paired.low, c.paired.high) == pytest.approx(tuple(interval))
        assert c.paired.p_t == pytest.approx(stats.ttest_rel(x, y).pvalue)
        assert c.effect == pytest.approx(d.mean() / d.std(ddof=1))
        assert c["p"] == pytest.approx(p_holm)
        word = "no difference shown" if p_holm >= 0.05 else "better" if d.mean() > 0 else "worse"
        assert c.verdict == word
    assert set(summary.results["verdict"]) == {"", "better", "worse", "no difference shown", "failed"}


def test_mean_is_taken_over_the_tasks_of_a_seed(folder: Path, summary):
    found = scores_on_disk(folder)
    values = [(found["LoRA", "stsb", 2, 0.1, s] + found["LoRA", "cola", 2, 0.1, s]) / 2 for s in range(5)]
    score = summary.at("LoRA", Setting(MEAN, 2, 0.1))
    assert (score["mean"], score["sd"]) == pytest.approx((np.mean(values), np.std(values, ddof=1)))
    single = [value for at, value in found.items() if at[:4] == ("DoRA", "stsb", 8, 1.0)]
    cell = summary.at("DoRA", Setting("stsb", 8, 1.0))
    assert (cell["mean"], cell["sd"]) == pytest.approx((np.mean(single), np.std(single, ddof=1)))
    assert 50 < cell["mean"] < 100  # percent points
    lacking = summary.at("DoRA", Setting(MEAN, 8, 0.1))
    assert sorted(lacking["scores"]) == [0, 1, 2]
    assert lacking.remarks == ["mean over the 3 of 5 seeds that have all tasks: 0, 1, 2"]


def test_missing_and_failed_cells_say_why(summary):
    partial = summary.at("DoRA", Setting("cola", 8, 0.1))
    assert (partial.state, partial.remarks) == ("done", ["not run yet (3 of 5 seeds: 0, 1, 2)"])
    failed = summary.at("AdaLoRA", Setting("cola", 2, 0.1))
    assert (failed.state, failed.remarks) == ("failed", [REASON])
    assert summary.at("AdaLoRA", Setting("cola", 2, 0.1)).verdict == "failed"
    assert summary.at("LoRA", Setting("cola", 2, 0.1)).verdict == ""


def test_comparisons_still_to_come_count_in_the_correction(tmp_path: Path, summary):
    def unmake(grid):
        for cell in grid["cells"]:
            if (cell["method"], cell["rank"]) == ("DoRA", 2):
                cell["key"] = None

    interim = summarize(read_comparison(edit_grid(write_folder(tmp_path), unmake))[0])
    assert interim.tests == summary.tests
    at = "StructLoRA", Setting("stsb", 2, 0.1)
    assert interim.at(*at)["p"] == pytest.approx(summary.at(*at)["p"])
    assert interim.at("DoRA", at[1]).verdict == "not run yet"
    alone = summarize(read_comparison(write_folder(tmp_path, baseline=None))[0])
    assert (set(alone.results["verdict"]), alone.tests) == ({""}, 0)


def test_one_seed_allows_no_test(tmp_path: Path):
    def first(grid):
        grid |= {"cells": [cell for cell in grid["cells"] if cell["seed"] == 0], "seeds": [0]}

    summary = summarize(read_comparison(edit_grid(write_folder(tmp_path), first))[0])
    c = summary.at("StructLoRA", Setting("stsb", 2, 0.1))
    assert (c["shared"], c["paired"], c["verdict"]) == (1, None, "one seed: no test")
    assert all(map(math.isnan, (c["p"], c.effect, summary.at("LoRA", Setting("stsb", 2, 0.1))["sd"])))


def test_lower_perplexity_is_better_and_keeps_its_scale(tmp_path: Path):
    def to_perplexity(run):
        if run["task"] == "cola":
            value = 10 - 5 * run["metrics"]["matthews"]
            run.update(metric="perplexity", metrics={"perplexity": value}, higher_is_better=False)

    summary = summarize(read_comparison(write_folder(tmp_path, to_perplexity))[0])
    setting = Setting("cola", 2, 0.1)
    assert 6 < summary.at("LoRA", setting)["mean"] < 10
    assert str(summary.units["cola"]) == "perplexity (lower is better)"
    c = summary.at("StructLoRA", setting)
    assert c.paired.difference < 0
    assert c.verdict == "better"
    assert summary.averaged == []  # a perplexity and a correlation have no mean


@pytest.mark.parametrize(
    ("metric", "factor", "printed"), [("cider", 100, 1), ("vqa_accuracy", 1, 100), ("invented", 1, 1)]
)
def test_shares_are_printed_times_100_and_other_metrics_as_recorded(tmp_path, metric, factor, printed):
    def rename(run):
        (value,) = (v for k, v in run["metrics"].items() if k == run["metric"])
        run.update(metric=metric, metrics={metric: factor * value})

    grid = read_comparison(write_folder(tmp_path, rename))[0]
    run = grid.done("LoRA", Setting("stsb", 2, 0.1)).loc[0]
    assert summarize(grid).at("LoRA", Setting("stsb", 2, 0.1))["scores"][0] == pytest.approx(printed * run.score)


def test_diverged_run_is_left_out_and_named(tmp_path: Path):
    def diverge(run):
        if (run["method"], run["seed"]) == ("structlora", 2):
            run["metrics"][run["metric"]] = math.nan

    score = summarize(read_comparison(write_folder(tmp_path, diverge))[0]).at("StructLoRA", Setting("stsb", 2, 0.1))
    assert sorted(score["scores"]) == [0, 1, 3, 4]
    assert score.remarks == ["seed 2: the score is not finite, the training diverged"]


def test_step_time_is_a_median_of_ratios_on_equal_seeds(folder: Path):
    grid = read_comparison(folder)[0]
    setting = Setting("stsb", 2, 0.1)
    ours, base = (grid.done(method, setting)["seconds.per_step_median"] for method in ("StructLoRA", "LoRA"))
    assert step_ratio(grid, "StructLoRA", [setting]) == pytest.approx(np.median([ours[s] / base[s] for s in range(5)]))
    assert step_ratio(grid, "LoRA", [setting]) == 1.0
    assert math.isnan(step_ratio(grid, "AdaLoRA", [setting]))
    assert on_cpu(grid.done()).all()
