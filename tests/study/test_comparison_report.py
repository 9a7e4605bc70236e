"""The report of a comparison holds every cell and says what is missing."""

import html
import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pandas as pd
import pytest
from helpers.comparison_folder import METHODS, REASON, edit_grid, write_folder

from structlora_pyg.study.report.page import Section
from structlora_pyg.study.report.records import PLACE, Grid, pack, read_comparison
from structlora_pyg.study.report.report import _lead, forest_figures, line_figures, training_figure, write_comparison
from structlora_pyg.study.report.summary import Summary, summarize
from structlora_pyg.study.report.tables import (
    NONE,
    cost_table,
    difference_table,
    other_metrics_table,
    score_table,
    structure_table,
)

FIGURES = ("rank", "data", "differences", "training")
EMPTY = {"step": [], "loss": [], "structure": []}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("comparison"))


@pytest.fixture(scope="module")
def grid(folder: Path) -> Grid:
    return read_comparison(folder)[0]


@pytest.fixture(scope="module")
def summary(grid: Grid) -> Summary:
    return summarize(grid)


@pytest.fixture(scope="module")
def written(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_comparison([folder], tmp_path_factory.mktemp("report") / "new")


def changed_runs(folder: Path, **changes) -> Path:
    return write_folder(folder, lambda run: run.update(changes))


def small(folder: Path, **changes) -> Path:
    """Write a folder of a single setting without structure, whose report is made in a moment."""
    changed_runs(folder, structure=None, gates=None, importance=None, curves=EMPTY)
    return edit_grid(only(folder, tasks=["stsb"], ranks=[8], fractions=[1.0]), lambda grid: grid.update(changes))


def only(folder: Path, **kept) -> Path:
    """Leave those cells of a folder alone, for instance ``only(folder, ranks=[8])``."""
    names = {"methods": "method", "tasks": "task", "ranks": "rank", "fractions": "fraction", "seeds": "seed"}

    def cut(grid: dict) -> None:
        cells = [c for c in grid["cells"] if all(c[names[k]] in values for k, values in kept.items())]
        grid.update(kept, cells=cells)

    return edit_grid(folder, cut)


def said(written: dict[str, Path]) -> str:
    """Return the words of the page, one space between them."""
    return " ".join(html.unescape(re.sub("<[^>]*>", " ", written["report.html"].read_text())).split())


def rows_of(section: Section) -> list[list[str]]:
    return section.table.to_numpy().tolist()


def columns_of(section: Section) -> list[str]:
    return list(section.table.columns)


def test_report_writes_its_documents_and_every_figure(written: dict[str, Path]):
    figures = {f"figures/ranks-{name}.svg" for name in FIGURES}
    assert set(written) == {"report.tex", "report.html", "report.csv"} | figures
    assert all(path.stat().st_size > 1000 for path in written.values())
    for name in figures:
        ElementTree.parse(written[name])
    assert written["report.html"].read_text().count("Dirichlet energy, relative: StructLoRA 0.5.") == 1


def test_packed_folder_makes_the_same_report_every_time(tmp_path: Path):
    folder = small(tmp_path / "runs")
    files = pack([folder], tmp_path / "packed")
    assert set(files) == {"runs.csv", "runs.jsonl.gz", "grids.jsonl.gz"}
    first, again = (
        write_comparison([source], tmp_path / "report" / source.name) for source in (folder, tmp_path / "packed")
    )
    assert [name for name in first if first[name].read_bytes() != again[name].read_bytes()] == []


def test_scores_have_one_row_per_method_and_one_column_per_setting(summary):
    table = score_table(summary)
    assert [row[0] for row in rows_of(table)] == list(METHODS)
    assert columns_of(table)[1:3] == [("STS-B", "r = 2", "10 %"), ("STS-B", "r = 2", "100 %")]
    assert [task for task, *_ in columns_of(table)][1::4] == ["STS-B", "CoLA", "mean"]
    assert all(re.fullmatch(r"\d\d\.\d ± \d\.\d[ᵃᵇᶜ]?", cell) for row in rows_of(table)[:3] for cell in row[1:])


def test_bold_is_only_what_is_shown_to_be_better(summary):
    scores, differences = score_table(summary), difference_table(summary)
    assert all(rows_of(differences)[i][j].startswith("better") for i, j in differences.bold)
    assert len(scores.bold) == len(differences.bold) > 0
    assert sum(i == 1 for i, _ in scores.bold) < len(columns_of(scores)) - 1


def test_failed_and_missing_cells_have_footnotes(summary, written: dict[str, Path]):
    table = score_table(summary)
    (failed,) = [note.split()[0] for note in table.notes if note.endswith(REASON)]
    assert rows_of(table)[3][1] == NONE + failed
    (missing,) = [note.split()[0] for note in table.notes if note.endswith("not run yet (3 of 5 seeds: 0, 1, 2)")]
    assert rows_of(table)[2][7].endswith(missing)
    for text in (said(written), written["report.tex"].read_text()):
        assert REASON in text
        assert "not run yet (3 of 5 seeds: 0, 1, 2)" in text
    assert "runs 138 of 160 done, 10 failed, 10 cannot be made" in said(written)


def test_what_does_not_vary_is_named_once_and_not_in_the_columns(tmp_path: Path):
    summary = summarize(read_comparison(only(write_folder(tmp_path), tasks=["stsb"], ranks=[8]))[0])
    table = score_table(summary)
    assert columns_of(table) == ["", "10 %", "100 %"]
    assert "All columns: STS-B, rank 8." in table.caption
    assert columns_of(difference_table(summary))[:3] == ["", "data", "seeds"]
    single = summarize(read_comparison(only(tmp_path, fractions=[1.0]))[0])
    table = score_table(single)
    assert columns_of(table) == ["", "STS-B"]  # which still has a heading
    assert "All columns: rank 8, all training data." in table.caption
    assert line_figures(single, "ranks") == []


def test_validation_scores_are_called_that_everywhere(tmp_path: Path):
    small(tmp_path / "runs", validation=True)
    grid = read_comparison(tmp_path / "runs")[0]
    assert structure_table(grid) is None is training_figure(grid, "ranks")  # there is none in these runs
    text = said(write_comparison([tmp_path / "runs"], tmp_path / "report"))
    assert text.count("measured on a part cut from the training data") == 3
    assert "tested comparisons on validation data" in text


def test_lead_claims_what_the_verdicts_allow(summary):
    lead, verdicts = _lead([summary]), " ".join(row[-1] for row in rows_of(difference_table(summary)))
    better, worse, open_ = map(verdicts.count, ("better", "worse", "no difference shown"))
    tested = f"of {better + worse + open_} tested comparisons (means over tasks among them)"
    assert f"{tested}, better than LoRA in {better}: StructLoRA" in lead
    assert f"no difference shown in {open_}; worse than LoRA in {worse}: AdaLoRA ({worse})." in lead


def test_metrics_beside_the_primary_one_have_a_table(grid):
    table = other_metrics_table(grid)
    assert columns_of(table) == ["", "task", "rank", "data", "Spearman correlation x 100", "loss"]
    assert rows_of(table)[0][:4] == ["LoRA", "STS-B", "r = 2", "10 %"]
    assert re.fullmatch(r"7\d\.\d ± \d\.\d", rows_of(table)[0][4])
    assert rows_of(table)[-1][4:] == [NONE, "1.200 ± 0.000"]  # CoLA has no such correlation


def test_costs_give_parameters_rates_and_ratios(grid):
    table = cost_table(grid)
    row = next(row for row in rows_of(table) if row[:3] == ["StructLoRA", "STS-B", "r = 8"])
    assert row[3:8] == ["73,728", "769", "5,000", "0.32", "0.0005 (10 %), 0.001 (100 %)"]
    assert re.fullmatch(r"1\.2\d x", row[8])
    assert "Peak memory: not measured on CPU." in table.caption
    assert "rough" in table.caption
    assert not any("ms" in column for column in columns_of(table))


def test_gpu_runs_show_milliseconds_and_memory(tmp_path: Path):
    folder = changed_runs(tmp_path, device="NVIDIA H100, 1", peak_memory_bytes=3 * 2**20, processes=2)
    table = cost_table(read_comparison(folder)[0])
    assert columns_of(table)[-3:] == ["step time", "ms per step", "peak memory, MiB"]
    assert 690 < float(rows_of(table)[0][-2]) < 730
    assert rows_of(table)[0][-1] == "3"
    assert "NVIDIA H100" in table.caption
    assert "A run used up to 2 processes." in table.caption
    assert "rough" not in table.caption


def test_structure_is_described_with_rank_correlations(grid):
    table = structure_table(grid)
    moves = ["noise level", "filter moves, %", "coordinator moves, %"]
    assert columns_of(table)[4:11] == ["adjacent cosine", "relative drift", *moves, "open gates, %", "removal ~ gate"]
    assert "gate ~ first order" not in columns_of(table)  # nothing was measured
    plain, ours = rows_of(table)[:2]
    assert (plain[0], *plain[6:10]) == ("LoRA", *[NONE] * 4)
    assert re.fullmatch(r"0\.\d{3} ± 0\.\d{3}", ours[4])
    assert ours[6:9] == ["1.40 ± 0.00", "12.50 ± 0.00", "0.73 ± 0.00"]


def test_forest_plot_fills_what_is_shown(summary):
    (section,) = forest_figures(summary, "ranks")
    points = [line for line in section.figure.axes[0].lines if line.get_marker() != "None"]
    filled = [x for line in points if line.get_markerfacecolor() == line.get_color() for x in line.get_xdata()]
    tested = summary.results[summary.results["difference"].notna()]
    drawn = sorted((y, x) for line in points for x, y in zip(*line.get_data(), strict=True))
    assert [x for _, x in drawn] == pytest.approx(list(tested["difference"]))
    assert len(filled) == tested["verdict"].isin(["better", "worse"]).sum()


def test_rows_that_agree_to_rounding_are_named_and_not_judged(tmp_path: Path):
    folder = write_folder(tmp_path / "runs")
    grid = json.loads((folder / "grids" / "ranks.json").read_text())
    keys = {tuple(cell[name] for name in PLACE): cell["key"] for cell in grid["cells"]}
    for (method, *place), key in keys.items():
        if method == "DoRA" and (tmp_path / "runs/runs" / f"{key}.json").exists():
            source = json.loads((folder / "runs" / f"{keys[('LoRA', *place)]}.json").read_text())
            source["metrics"][source["metric"]] *= 1 + 1e-6
            (folder / "runs" / f"{key}.json").write_text(json.dumps({**source, "key": key, "method": "dora"}))
    summary = summarize(read_comparison(folder)[0])
    found = summary.results[summary.results["method"] == "DoRA"]["verdict"]
    assert set(found) == {"did the same thing"}
    caption = score_table(summary).caption
    assert (
        "These rows did the same thing, all their scores agree to rounding: STS-B r = 2 10 %: LoRA, DoRA; " in caption
    )
    assert "did the same thing in 12;" in _lead([summary])


def test_lines_show_the_means_of_the_table(summary):
    ax = line_figures(summary, "ranks")[0].figure.axes[0]
    assert ax.get_title(loc="left") == "STS-B, 10 %"
    expected = [summary.at("LoRA", s)["mean"] for s in summary.columns if (s.task, s.fraction) == ("stsb", 0.1)]
    assert list(ax.lines[0].get_ydata()) == pytest.approx(expected)


def test_every_cell_is_a_row_of_numbers_for_other_programs(summary, written: dict[str, Path]):
    cells = pd.read_csv(written["report.csv"])
    assert len(cells) == len(cells[["method", "task", "rank", "fraction"]].drop_duplicates()) == 48
    expected = summary.results
    pd.testing.assert_frame_equal(cells[["mean", "p"]], expected[["mean", "p"]])


def test_several_folders_make_one_report(tmp_path: Path):
    titles = {"cpu": {}, "gpu": {"title": "On a GPU"}, "again": {}}
    folders = [small(tmp_path / name, **title) for name, title in titles.items()]
    written = write_comparison(folders, tmp_path / "report")
    text = said(written)
    assert written["report.html"].read_text().count("<h2>") == 3
    assert "runs 60 of 60 done" in text
    assert "figures/cpu-0-ranks-differences.svg" in written
    assert "figures/gpu-1-ranks-differences.svg" in written


def test_every_table_is_in_the_latex_file(written: dict[str, Path]):
    text = written["report.tex"].read_text(encoding="utf-8")
    captions = re.findall(r"\\caption\{(.*)\} \\label", text)
    assert len(captions) == text.count(r"\begin{longtable}") == text.count(r"\end{longtable}") == 5
    assert captions[0] == "Rank and share of the data: scores"
    assert text.count("{") == text.count("}")
    for body in re.findall(r"\\endlastfoot\n(.*?)\\end\{longtable", text, flags=re.S):
        assert len({len(re.findall(r"(?<!\\)&", line)) for line in body.strip().splitlines()}) == 1
    assert not re.search(r"(?<!\\)%(?!\n)", re.sub(r"^%.*$", "", text, flags=re.M))
    assert text.isascii()


def test_nothing_is_written_for_no_folder_or_one_that_cannot_be_read(folder: Path, tmp_path: Path):
    other = write_folder(tmp_path / "runs", schema=7)
    for folders, said in (([folder, other], "schema 7"), ([], "at least one folder")):
        with pytest.raises(ValueError, match=said):
            write_comparison(folders, tmp_path / "report")
    assert not (tmp_path / "report").exists()


def test_grid_before_its_first_run_has_a_report(tmp_path: Path):
    edit_grid(write_folder(tmp_path / "runs"), lambda grid: [cell.update(key=None) for cell in grid["cells"]])
    text = said(write_comparison([tmp_path / "runs"], tmp_path / "report"))
    assert "no comparison has the two seeds yet that a test needs" in text
    assert "not run yet (0 of 5 seeds)" in text
    assert "runs 0 of 160 done" in text


def test_names_that_look_like_markup_stay_text(tmp_path: Path):
    small(tmp_path / "runs", title="<b>A & B</b> 100 % | _x_", note="# [link](x)")
    written = write_comparison([tmp_path / "runs"], tmp_path / "report")
    assert "&lt;b&gt;A &amp; B&lt;/b&gt;" in written["report.html"].read_text()
    assert r"$<$b$>$A \& B$<$/b$>$ 100 \% $|$ \_x\_" in written["report.tex"].read_text()


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no LaTeX")
def test_the_tables_are_latex(written: dict[str, Path], tmp_path: Path) -> None:
    body = written["report.tex"].read_text(encoding="utf-8")
    head = r"\documentclass{article}\usepackage{booktabs,longtable}\begin{document}"
    (tmp_path / "all.tex").write_text(head + body + r"\end{document}", encoding="utf-8")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "all.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
