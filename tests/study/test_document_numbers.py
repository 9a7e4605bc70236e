"""Every number in the documents' tables of results is what the stored runs give, rounded."""

import functools
import json
import math
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from structlora_pyg.study.report.records import Setting, read_comparison, read_runs
from structlora_pyg.study.report.summary import Summary, compare, holm, summarize

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
BENCHMARKS = "docs/evidence/benchmarks.md"
FIRST = "docs/evidence/version_0_1.md"
NUMBER = re.compile(r"(?<![\w.])[-+]?\d[\d,]*(?:\.\d+)?")
RENAMED = {  # rows of the documents that are called otherwise in the grids
    "head alone": "head only",
    "LoRA, start along the gradient": "LoRA, start gradient",
    "StructLoRA, start along the gradient": "StructLoRA, start gradient",
    "full fine-tuning, head at 0.003": "full fine-tuning",
    "VeRA, head at 0.003": "VeRA",
}
DEFAULTS = {  # one row of the document may hold several of the grid
    "StructLoRA, strong gates": ["StructLoRA"],
    "beta 0 / 10": ["beta 0", "beta 10"],
    "init_logit 1 / 4 / 6": ["init_logit 1", "init_logit 4", "init_logit 6"],
    "init_logit 4, beta 0.01: the defaults now": ["init_logit 4, beta 0.01"],
    "filter topk_norm / gumbel_sigmoid": ["filter topk_norm", "filter gumbel_sigmoid"],
    "start shared / along the gradient": ["start shared", "start gradient"],
    "start along the gradient, init_logit 4": ["start gradient, init_logit 4"],
    "start along the gradient, without filter": ["start gradient, without filter"],
    "LoRA, start along the gradient": ["LoRA, start gradient"],
    "lift mixing / basis / gate": ["lift mixing", "lift basis", "lift gate"],
    "edges none / chain / full": ["edges none", "edges depth_chain", "edges full"],
    "GATv2Conv / SAGEConv": ["GATv2Conv", "SAGEConv"],
    "gain learns 100 times as fast, lift tangent / basis": [
        "gain learns 100 times as fast", "lift basis, gain 100 times as fast",
    ],
    "encoding span; lift project; both": ["encoding span", "lift project", "encoding span, lift project"],
    "both, gain 100 times as fast, without filter": [
        "encoding span, lift project, gain 100 times as fast, without filter",
    ],
}  # fmt: skip


@functools.cache
def summaries() -> dict[str, Summary]:
    return {grid.name: summarize(grid) for grid in read_comparison(RESULTS)}


def tables(document: str, heading: str) -> list[list[list[str]]]:
    """Return the tables below a heading, each a list of rows of cells, headings first."""
    text = (ROOT / document).read_text(encoding="utf-8")
    (section,) = re.findall(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", text, flags=re.S | re.M)
    found: list[list[list[str]]] = []
    last = -2
    for k, line in enumerate(section.splitlines()):
        if line.strip().startswith("|"):
            cells = [re.sub(r"[*`]", "", cell).strip() for cell in line.strip().strip("|").split("|")]
            if k > last + 1:
                found.append([])
            found[-1].append(cells)
            last = k
    return [[table[0], *table[2:]] for table in found]


def assert_shows(cell: str, expected: list[float], where: str) -> None:
    """Fail unless the numbers of a cell are the expected ones, rounded to the digits that it has."""
    shown = NUMBER.findall(cell.replace("95 % CI", ""))
    assert len(shown) == len(expected), f"{where}: {cell!r} should hold {expected}"
    for text, value in zip(shown, expected, strict=True):
        digits, sign = len(text.partition(".")[2]), "+" if text.startswith("+") else ""
        rounded = {f"{value:{sign},.{digits}f}", f"{value:{sign}.{digits}f}"}
        zero = float(text.replace(",", "")) == 0 == round(value, digits)  # 0.00 and -0.00 are the same
        assert text in rounded or zero, f"{where}: {cell!r} should hold {expected}"


def numbers(summary: Summary, method: str, task: str, what: str, setting: tuple[int, float] = (8, 1.0)) -> list[float]:
    """Return what a cell shows of a method in a grid; no number where it is not compared."""
    at = Setting(task, *setting)
    r, runs = summary.at(method, at), summary.grid.done(method, at)
    if what == "score":
        return [r["mean"], r["sd"]]
    if what == "mean":
        return [r["mean"]]
    if what in ("difference", "p"):
        found = [r["difference"], r["low"], r["high"]] if what == "difference" else [max(r["p"], 0.001)]
        return found if r["paired"] is not None else []
    if what == "rate":
        return [*runs["lr"].unique()]
    return [value] if math.isfinite(value := runs[f"structure.{what}"].mean()) else []


def assert_grid_table(table: list[list[str]], grid: str, columns: list[tuple[str, str]]) -> None:
    summary = summaries()[grid]
    shown = set()
    for label, *cells in table[1:]:
        method = RENAMED.get(label, label)
        shown.add(method)
        for cell, (task, what) in zip(cells, columns, strict=True):
            assert_shows(cell, numbers(summary, method, task, what), f"{grid}, {label}, {task}, {what}")
            if what == "p" and cell:
                verdict = numbers(summary, method, task, "p") and summary.at(method, Setting(task, 8, 1.0))["verdict"]
                assert cell.partition(", ")[2] == ("" if verdict.startswith("no") else verdict)
    assert shown == set(summary.grid.methods)


def few_examples(grid: str) -> Iterator[tuple[str, list[list[float]]]]:
    """Yield what the rows of a table of few examples show: a task, and the numbers of every cell."""
    summary = summaries()[grid]
    for at in (at for at in summary.columns if at.task in set(summary.grid.cells["task"])):
        scores = {method: [*summary.at(method, at)["scores"].values()] for method in summary.grid.methods}
        over = [compare(scores["StructLoRA"], scores[other]) for other in ("LoRA", "LoRA, dropout tuned")]
        shown = [[np.mean(found), np.std(found, ddof=1)] for found in scores.values()]
        yield at.task, [*shown, *([c.difference, c.low, c.high] for c in over)]


@pytest.mark.parametrize(
    ("document", "heading", "grid"),
    [(BENCHMARKS, "Few examples", "proving"), ("README.md", "Results", "proving"), (BENCHMARKS, "Rank 2", "rank2")],
)
def test_few_examples(document: str, heading: str, grid: str):
    table = tables(document, heading)[0]
    for (label, *cells), (task, expected) in zip(table[1:], few_examples(grid), strict=True):
        assert label.startswith(task)
        for cell, numbers_of_cell in zip(cells, expected, strict=True):
            assert_shows(cell, numbers_of_cell, label)


def test_other_systems_on_few_examples():
    summary, (table,) = summaries()["systems"], tables(BENCHMARKS, "Other systems")
    columns = [at for at in summary.columns if at.task in set(summary.grid.cells["task"])]
    scores = {m: [[*summary.at(m, at)["scores"].values()] for at in columns] for m in summary.grid.methods}
    assert table[0][1:] == [at.task for at in columns]
    for label, *cells in table[1:]:
        for cell, found in zip(cells, scores[label], strict=True):
            assert_shows(cell, [np.mean(found), np.std(found, ddof=1)], label)
    said = " ".join((ROOT / BENCHMARKS).read_text(encoding="utf-8").split())
    p = []
    for other, says in {"AdaLoRA": "", "Sensitivity-LoRA": "", "Full fine-tuning": " it is"}.items():
        over = [compare(*pair) for pair in zip(scores["StructLoRA"], scores[other], strict=True)]
        p += [c.p_t for c in over]
        found = ", ".join(f"{c.difference:+.1f} [{c.low:+.1f}, {c.high:+.1f}]" for c in over)
        assert f"over {other}{says} {found}".lower() in said.lower()
    assert sum(corrected < 0.05 for corrected in holm(p[:8])) == 6  # three of four, twice


def test_rates_on_five_digits_each():
    summary = summaries()["rates"]
    scores = {m: [*summary.at(m, summary.columns[0])["scores"].values()] for m in summary.grid.methods}
    said = " ".join((ROOT / BENCHMARKS).read_text(encoding="utf-8").split())
    lora, ours = (
        f"{np.mean(s):.1f} ± {np.std(s, ddof=1):.1f}" for s in (scores["LoRA at 0.01"], scores["StructLoRA at 0.01"])
    )
    over = [
        "{0.difference:+.1f} [{0.low:+.1f}, {0.high:+.1f}]".format(
            compare(scores[f"StructLoRA at {lr}"], scores[f"LoRA at {lr}"])
        )
        for lr in (0.01, 0.003)
    ]
    assert f"LoRA has {lora} at 0.01, and StructLoRA {ours}: {over[0]}. At 0.003 it is {over[1]}." in said
    assert f"at 0.01 it has {lora[:4]} too" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_nothing_is_shown_at_rank_2():
    summary = summaries()["rank2"]
    columns = [at for at in summary.columns if at.task in set(summary.grid.cells["task"])]
    assert min(summary.at("StructLoRA", at)["p"] for at in summary.columns) > 0.05
    assert summary.at("LoRA, dropout tuned", columns[-1])["p"] < 0.05
    assert {*summary.grid.done("StructLoRA", columns[-1])["lr"]} == {0.01}
    assert f"over {summary.tests} comparisons; tuned dropout is" in (ROOT / BENCHMARKS).read_text(encoding="utf-8")


def test_what_survives_among_few_examples():
    summary = summaries()["proving"]
    columns = [at for at in summary.columns if at.task in set(summary.grid.cells["task"])]
    ten, five, every, graphs, *texts, many = (summary.at("StructLoRA", at)["p"] for at in columns)
    said = " ".join((ROOT / BENCHMARKS).read_text(encoding="utf-8").split())
    told = f"p = {ten:.3f} and {five:.3f} on the digits, {graphs:.3f} on the graphs, below 0.001 on 64 and 256 blocks"
    assert told in said
    assert max(texts) < 0.001
    assert every > 0.05
    scores = [[[*summary.at(m, at)["scores"].values()] for m in summary.grid.methods] for at in columns]
    assert f"(p = {many:.3f} after correction, {compare(scores[-1][2], scores[-1][0]).p_t:.3f} before)" in said
    assert summary.at("LoRA, dropout tuned", columns[-1])["p"] < 0.001
    over_dropout = [compare(ours, dropout) for _, dropout, ours in scores]
    about = [at.task for at, c in zip(columns, over_dropout, strict=True) if c.p_t < 0.055]
    assert about == ["digits, 5 each", "digits, all", "text, 64", "text, 256", "text, 1024"]
    assert [at.task for at, p in zip(columns, holm([c.p_t for c in over_dropout]), strict=True) if p < 0.05] == [
        "text, 64"
    ]
    assert f"correction over {summary.tests} comparisons" in said
    mean = summary.at("StructLoRA", summary.columns[-1])
    together = f"+{mean['difference']:.1f} [+{mean['low']:.1f}, +{mean['high']:.1f}], p = {mean['p']:.3f}."
    assert f"four accuracies is ahead: {together}" in said
    scores = [[[*summary.at(m, at)["scores"].values()][6:] for m in ("StructLoRA", "LoRA")] for at in columns]
    unseen = [np.mean(ours) - np.mean(lora) for ours, lora in scores]
    told = "{:+.1f}, {:+.1f} and {:+.1f} points, {:+.1f} and {:+.1f} of perplexity"
    assert told.format(unseen[0], unseen[1], unseen[3], *unseen[4:6]) in said


def test_levels_that_few_examples_end_at():
    cells, level = summaries()["proving"].grid.cells, read_runs(RESULTS)["gates.noise_level"]
    cells = cells[cells["method"] == "StructLoRA"].groupby("task")["key"]
    said = " ".join((ROOT / BENCHMARKS).read_text(encoding="utf-8").split())
    shown = {task: "{:.2f} ± {:.2f}".format(*level[keys].agg(["mean", "std"])) for task, keys in cells}
    assert f"noise level of {shown.pop('text, 64')} on 64 blocks, {shown.pop('text, 256')} on 256, and" in said
    assert f"{shown.pop('digits, all')} with all digits, {shown.pop('text, 1024')} on 1,024 blocks" in said
    assert set(shown.values()) == {"0.50 ± 0.00"}


def test_closing_directions():
    (table,) = tables(BENCHMARKS, "Closing directions")
    rows = json.loads((ROOT / "benchmarks/results/closing.json").read_text())
    for label, *cells in table[1:]:
        system, _, how = label.partition(", ")
        how = {"of least worth": "least", "at random": "random"}[how]
        for cell, share in zip(cells, (0.0, 0.1, 0.25, 0.5), strict=True):
            found = [row[how] for row in rows if (row["system"], row["share"]) == (system, share)]
            assert_shows(cell, [np.mean(found)], label)


def test_other_uses_of_the_graph():
    rows = json.loads((RESULTS / "tournament.json").read_text())
    shown = 0
    for table in tables(BENCHMARKS, "Other uses of the graph"):
        own = {row["row"]: row["losses"] for row in rows if table[0][0].startswith(row["game"])}
        base = table[0][2].removeprefix("against ")
        for label, score, difference in table[1:]:
            assert_shows(score, [np.mean(own[label]), np.std(own[label], ddof=1)], label)
            c = compare(own[label], own[base])
            assert_shows(difference, [c.difference, c.low, c.high] if label != base else [], label)
        assert [row[0] for row in table[1:]] == list(own)
        shown += len(own)
    assert shown == len(rows)


def test_the_rate_that_the_gradient_start_hid():
    runs = read_runs(RESULTS)
    found = runs[(runs["method"] == "lora") & (runs["task"] == "stsb") & (runs["lr"] == 0.003) & (runs["seed"] < 1000)]
    score = 100 * found[(found["steps"] == 120) & (found["rank"] == 8) & (found["fraction"] == 1.0)]["score"]
    (said,) = re.findall(r"the ordinary start at the rate 0.003 has (\S+ ± \S+),", (ROOT / FIRST).read_text())
    assert_shows(said, [score.mean(), score.std()], "LoRA at 0.003")


def test_all_systems_on_stsb():
    (table,) = tables(FIRST, "All systems on STS-B")
    kinds = ["score", "difference", "p", "adjacent_cosine", "relative_drift"]
    assert_grid_table(table, "glue-small", [("stsb", kind) for kind in kinds])


def test_all_systems_on_mrpc_cola_and_rte():
    table, rates = tables(FIRST, "All systems on MRPC, CoLA and RTE")
    columns = [(task, kind) for task in ("mrpc", "cola", "rte") for kind in ("score", "difference")]
    assert_grid_table(table, "glue-long", columns)
    summary = summaries()["glue-rates"]
    for rate, *cells in rates[1:]:
        both = [f"{system} at {rate}" for system in ("StructLoRA", "LoRA")]
        scores = [[*summary.at(method, summary.columns[0])["scores"].values()] for method in both]
        c = compare(*scores)
        assert_shows(cells[0], numbers(summary, both[1], "mrpc", "score"), rate)
        assert_shows(cells[1], numbers(summary, both[0], "mrpc", "score"), rate)
        assert_shows(cells[2], [c.difference, c.low, c.high], rate)


def test_all_systems_on_cifar100():
    (table,) = tables(FIRST, "All systems on CIFAR-100")
    assert_grid_table(table, "main-small", [("cifar100", kind) for kind in ("score", "difference", "p", "rate")])


def test_which_settings_should_be_the_defaults():
    (table,) = tables(FIRST, "Which settings should be the defaults?")
    summary, shown = summaries()["defaults"], set()
    for label, *cells in table[1:]:
        methods = DEFAULTS.get(label, [label])
        shown |= set(methods)
        for cell, task in zip(cells, ("stsb", "passages"), strict=True):
            what = "score" if len(methods) == 1 and "±" in cell else "mean"
            assert_shows(cell, [*chain(*(numbers(summary, m, task, what) for m in methods))], f"{label}, {task}")
    assert set(summary.grid.methods) - shown == {"start gradient, without coordinator"}


def test_rank_and_amount_of_data():
    (table,) = tables(FIRST, "Rank, and amount of data, on STS-B")
    places = [("ranks-small", (2, 1.0)), ("ranks-small", (8, 1.0)), ("data-small", (8, 0.1))]
    for (label, *cells), (grid, setting) in zip(table[1:], places, strict=True):
        ours = [
            (method, what) for method in ("StructLoRA", "StructLoRA, strong gates") for what in ("score", "difference")
        ]
        for cell, (method, what) in zip(cells, [("LoRA", "score"), *ours], strict=True):
            assert_shows(cell, numbers(summaries()[grid], method, "stsb", what, setting), f"{label}, {method}")


def test_room_for_a_difference():
    table, _ = tables(FIRST, "Is there room for a difference?")
    runs = read_runs(RESULTS)
    standing = set().union(*(summary.grid.cells["key"].dropna() for summary in summaries().values()))
    tuning = runs[~runs.index.isin(standing) & (runs["steps"] == 120) & (runs["seed"] == 1000)]
    for (label, *cells), task in zip(table[1:], ("stsb", "mrpc", "cola"), strict=True):
        for cell, method in zip(cells, ("head", "lora", "full", "structlora"), strict=True):
            found = tuning[(tuning["task"] == task) & (tuning["method"] == method)]
            best = {round(100 * score, 1) for score in found["score"]}
            assert float(cell) in best, f"{label}, {method}: {best}"


@pytest.mark.parametrize("name", ["GPS", "GAT"])
def test_graph_networks(name: str):
    stored = json.loads((RESULTS / "gnn.json").read_text())["systems"]
    p = {}
    for base, systems in stored.items():
        for label, found in systems.items():
            if label != "LoRA":
                p[base, label] = compare(found["test"], systems["LoRA"]["test"]).p_t
    corrected = dict(zip(p, holm([*p.values()]), strict=True))
    (table,) = [found for found in tables("docs/evidence/gnn.md", "The result") if found[0][0] == name]
    for label, trained, rate, score, difference, p_holm, _ in table[1:]:
        found, base = stored[name][label], stored[name]["LoRA"]["test"]
        assert_shows(trained, [found["trained"]], label)
        assert_shows(rate, [found["lr"]], label)
        assert_shows(score, [np.mean(found["test"]), np.std(found["test"], ddof=1)], label)
        if label != "LoRA":
            c = compare(found["test"], base)
            assert_shows(difference, [c.difference, c.low, c.high], label)
            assert_shows(p_holm, [corrected[name, label]], label)
    assert {row[0] for row in table[1:]} == set(stored[name])


def test_digits():
    (table,) = tables(FIRST, "Where the difference comes from")
    systems = json.loads((RESULTS / "digits.json").read_text())["systems"]
    base = systems["LoRA (stock PEFT)"]["test"]
    tested = {label: compare(found["test"], base) for label, found in systems.items() if found["test"] != base}
    corrected = dict(zip(tested, holm([c.p_t for c in tested.values()]), strict=True))
    for label, rate, score, difference, p, _ in table[1:]:
        found = systems[label]
        assert_shows(rate, [found["lr"]], label)
        assert_shows(score, [np.mean(found["test"]), np.std(found["test"], ddof=1)], label)
        if label in tested:
            assert_shows(difference, [tested[label].difference, tested[label].low, tested[label].high], label)
            assert_shows(p, [max(corrected[label], 0.001)], label)
    assert {row[0] for row in table[1:]} == set(systems)


def test_a_changed_number_is_noticed():
    with pytest.raises(AssertionError, match="should hold"):
        assert_shows("72.4 ± 3.8", [72.3, 3.8], "STS-B")
    with pytest.raises(AssertionError, match="should hold"):
        assert_shows("72.3", [72.3, 3.8], "STS-B")
