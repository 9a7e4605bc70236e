"""What the documents show, runs."""

import functools
import pkgutil
import re
import shlex
from pathlib import Path

import pytest
from helpers.slow import slow_but

from structlora_pyg import cli
from structlora_pyg.study.ablate import ablation
from structlora_pyg.study.config import load_config
from structlora_pyg.study.grid import load_grid
from structlora_pyg.study.tasks import small

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted(p for p in (ROOT / "docs").rglob("*.md") if p.parent.name != "tutorials")]
TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.md"))
SHORT = [p for p in TUTORIALS if p.stem in ("adapter_graph", "your_own_coordinator", "your_own_filter")]


@functools.cache
def load_once(file: Path, settings: tuple[str, ...], size: str | None) -> None:
    load_grid(file, settings, size)


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.M | re.S)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_python_blocks_run_one_after_the_other(page: Path, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")
    names: dict = {}
    for block in blocks(page, "python"):
        exec(compile(block, page.name, "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_shown_commands_are_commands_with_valid_configurations(page: Path) -> None:
    lines = [line.partition("  #")[0].strip() for block in blocks(page, "bash") for line in block.splitlines()]
    targets = (ROOT / "Makefile").read_text()
    for line in (line for line in lines if line and not line.startswith("#")):
        words = [word for word in shlex.split(line) if not re.match(r"[A-Z_]+=", word)]
        if words[:3] == ["srun", "bash", "-c"]:
            words = shlex.split(words[3])
        if not words or words[0] == "export":
            continue
        if words[0] == "accelerate":
            assert (ROOT / words[words.index("--config_file") + 1]).is_file(), line
            at = words.index("-m")
            assert words[at + 1] == "structlora_pyg", line
            words = ["structlora", *words[at + 2 :]]
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", targets, flags=re.M), line
        elif words[0] == "structlora":
            given = cli.parse(words[1:])
            if given.command == "compare" and given.config:
                load_once(ROOT / given.config, tuple(given.settings), given.size)
            elif given.command == "ablate":
                ablation(given.config, given.settings, given.seeds, given.list_mode, given.controls)
            elif getattr(given, "config", None):
                load_config(given.config, given.settings)
        elif words[0] == "python":
            assert (ROOT / words[1]).is_file(), line
        else:
            assert words[0] in (".", "pip"), line


@pytest.mark.slow
def test_commands_of_the_readme_run_in_an_empty_folder(tmp_path, monkeypatch, capsys) -> None:
    """Each as it stands, one after the other, on a base that knows little; those of make and pip are for a shell."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(small.DIGITS_RECIPE, "steps", 5)
    lines = [line for block in blocks(ROOT / "README.md", "bash") for line in block.splitlines()]
    mine = [shlex.split(line)[1:] for line in lines if line.startswith("structlora ")]
    assert len(mine) >= 8
    for words in mine:
        assert cli.main(words) == 0, words
    said = capsys.readouterr().out
    for part in ("12 of 2 roles", "12 nodes", "GATv2Conv", "training only"):
        assert part in said
    files = ("out/graph.svg", "runs/digits/look.html", "out/merged/model.safetensors")
    assert [file for file in files if not Path(file).is_file()] == []


@pytest.mark.parametrize("page", slow_but(SHORT, TUTORIALS), ids=lambda p: p.stem)
def test_tutorials_run_from_top_to_bottom(page: Path, tmp_path, monkeypatch, capsys) -> None:
    """Python runs, commands succeed, a block that begins with ``# name`` is that file too, and quotes were printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    names: dict = {}
    found = re.findall(r"^```(python|yaml|bash)\n(.*?)^```", page.read_text(), flags=re.M | re.S)
    assert len(found) >= 3
    for language, block in found:
        if file := re.match(r"# (\w+\.\w+)\n", block):
            Path(file[1]).write_text(block)
        if language == "python":
            exec(compile(block, page.name, "exec"), names)
        for line in block.splitlines() if language == "bash" else ():
            assert cli.main(shlex.split(line)[1:]) == 0, line
    said = " ".join(capsys.readouterr().out.split())
    for quote in re.findall(r"^> (.+(?:\n> .+)*)", page.read_text(), flags=re.M):
        words = " ".join(quote.replace("\n>", "\n").split())
        assert re.search(re.escape(words).replace(r"\.\.\.", ".*"), said), words


def test_the_figures_of_a_page_are_drawn_again_by_the_commands_that_it_shows() -> None:
    shown = blocks(ROOT / "docs" / "guides" / "looking.md", "bash")[0]
    rule = (ROOT / "Makefile").read_text().partition("\nfigures:")[2].partition("\n\n")[0]
    assert [line for line in shown.splitlines() if f"$(BIN)/{line}\n" not in rule] == []
    for figure in (ROOT / "docs" / "figures").glob("look-*.svg"):
        assert f" {figure.stem.removeprefix('look-')}" in rule.replace(",", " ")


def test_the_grid_that_is_shown_is_a_grid(tmp_path) -> None:
    (text,) = blocks(ROOT / "docs" / "guides" / "comparisons.md", "yaml")
    file = tmp_path / "grid.yaml"
    file.write_text(text)
    assert len(load_grid(file).cells()) == 2 * 2 * 5


@pytest.mark.slow
def test_the_comparison_that_is_shown_runs(tmp_path, real_data, monkeypatch, capsys) -> None:
    monkeypatch.setenv("STRUCTLORA_DATA", str(real_data))
    grid, out = ROOT / "benchmarks" / "configs" / "ranks.yaml", tmp_path / "mini"
    shorter = ["seeds=1", "ranks=[2]", "settings.train.max_steps=3", "settings.data.eval_limit=16"]
    shorter.append("settings.train.mixed_precision=no")  # a processor without bfloat16 takes seconds for a step
    assert cli.main(["compare", "--config", str(grid), "--size", "mini", "--output-dir", str(out), *shorter]) == 0
    assert cli.main(["report", str(out)]) == 0
    assert "STS-B" in (out / "report.html").read_text()


def test_every_module_name_and_file_that_a_document_names_exists() -> None:
    for page in (*PAGES, *TUTORIALS, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"):
        text = page.read_text()
        for file in re.findall(r"`((?:tests|benchmarks|docs|structlora_pyg)/[\w./]+)`", text):
            assert (ROOT / file).exists(), f"{page.name}: {file}"
        for place in set(re.findall(r"`(structlora_pyg\.[\w.]+)`", text)):
            pkgutil.resolve_name(place)  # raises where there is none


def test_links_between_the_documents_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            found = (page.parent / target).with_suffix(".md") if target.endswith(".ipynb") else page.parent / target
            assert found.exists(), f"{page.name}: {target}"
