"""The plan of the package: imports go down only, no module is long, and the whole stays small."""

import ast
import functools
from graphlib import TopologicalSorter
from pathlib import Path

import structlora_pyg

ROOT = Path(structlora_pyg.__file__).parent
FLOORS = ["checks", "stage_config", "config", "data", "nn", "tuner", "analysis", "study", "cli", "__main__"]
# What runs a study, above its methods, tasks and reports.
UPPER = ("study.train", "study.sweep", "study.ablate")
SOURCES = {".".join(f.relative_to(ROOT).with_suffix("").parts): f.read_text("utf-8") for f in ROOT.rglob("*.py")}


@functools.cache
def imports(module: str) -> set[str]:
    """Return the modules of this package that one imports, wherever in it; names for type checkers are none."""
    found, tree = set(), ast.parse(SOURCES[module])
    for_checkers = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and id(node) not in for_checkers:
            path = str(node.module).removeprefix("structlora_pyg").lstrip(".")
            if str(node.module).partition(".")[0] == "structlora_pyg":
                names = [f"{path}.{alias.name}".lstrip(".") for alias in node.names]
                found |= {name if name in SOURCES else path for name in names}
    return {name if name in SOURCES else f"{name}.__init__" for name in found if name} - {module}


def test_imports_go_down_only() -> None:
    up = [
        f"{module} imports {other}"
        for module in SOURCES
        if module != "__init__"
        for other in imports(module)
        if FLOORS.index(other.split(".")[0]) > FLOORS.index(module.split(".")[0])
        or (module.startswith(("study.report.", "study.methods.", "study.tasks.")) and other in UPPER)
    ]
    assert not up


def test_no_modules_import_each_other_in_a_circle() -> None:
    TopologicalSorter({module: imports(module) for module in SOURCES}).prepare()  # raises CycleError


def test_modules_and_package_are_small() -> None:
    lines = {module: text.count("\n") for module, text in SOURCES.items()}
    assert {module: count for module, count in lines.items() if count > 350} == {}
    assert len(lines) <= 85  # both numbers may only go down
    assert sum(lines.values()) <= 18_007
