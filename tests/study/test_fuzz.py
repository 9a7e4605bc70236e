"""Damaged files go through every loader: each ends in success or in one of our documented errors, and changes nothing.

A few hundred mutations run by default; ``make fuzz`` runs thousands for every kind of file.
"""

import copy
import gzip
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml
from helpers import official
from helpers.comparison_folder import done_run, write_folder
from helpers.tiny import ARCHITECTURES, loss
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from structlora_pyg import (
    AdapterGraphDataset,
    ConfigError,
    StructLoraConfig,
    StructLoraModel,
    get_structlora_model,
    inspect_adapter,
)
from structlora_pyg.study.config import DataConfig, load_config, read_yaml
from structlora_pyg.study.grid import load_grid
from structlora_pyg.study.report.look import read_run
from structlora_pyg.study.report.records import RecordError, read_comparison
from structlora_pyg.study.run_folder import STATE_FILE, CheckpointError, config_to_dict, load_state, to_json
from structlora_pyg.study.tasks import DataError
from structlora_pyg.study.tasks.data import Row
from structlora_pyg.study.tasks.images import read_images
from structlora_pyg.study.tasks.language import conversation
from structlora_pyg.study.tasks.picture_texts import read_captions, read_questions
from structlora_pyg.study.tasks.sentences import read_examples
from structlora_pyg.study.tasks.splits import own_splits

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", 10))
EXPLORE = "FUZZ_EXAMPLES" in os.environ  # else the same examples every time: nobody's tests should fail by chance
TINY = ARCHITECTURES["llama"]
NUMBERS = st.integers() | st.floats() | st.sampled_from([0, -1, 2**63, 1e308, float("nan")])
JUNK = st.recursive(
    st.none()
    | st.booleans()
    | NUMBERS
    | st.text(max_size=8)
    | st.sampled_from(["../../etc/passwd", "os.system", "5e-4"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)


@dataclass(frozen=True)
class Target:
    """A folder that loads, what loads it, and the errors that it documents."""

    write: Callable[[Path], Any]
    load: Callable[[Path], Any]
    errors: tuple[type[Exception], ...]


def _config(folder: Path) -> None:
    (folder / "run.yaml").write_text(yaml.safe_dump(read_yaml("rte")))


def _grid(folder: Path) -> None:
    tree = {
        "tasks": {"rte": {"config": "rte"}}, "methods": {"LoRA": {"method.name": "lora", "learning_rates": [1e-4]}},
        "baseline": "LoRA", "ranks": [2, 8], "seeds": 2, "settings": {"train.max_steps": 3}, "fractions": [0.5],
        "sizes": {"mini": {"seeds": 1}},
    }  # fmt: skip
    (folder / "grid.yaml").write_text(yaml.safe_dump(tree))


def _model() -> StructLoraModel:
    config = StructLoraConfig(r=2, target_modules=TINY.targets, schedule={"warmup_steps": 0}, encoding={"size": 2})
    return get_structlora_model(TINY.model(), config)


def _adapter(folder: Path) -> None:
    model = _model().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(2):
        loss(model, TINY.batch()).backward()
        optimizer.step()
    model.save_pretrained(str(folder))


def _checkpoint(folder: Path) -> None:
    torch.save({"step": 4, "processes": 1, "optimizer": {"state": {0: torch.zeros(3)}}}, folder / STATE_FILE)


def _comparison(folder: Path) -> None:
    write_folder(folder)
    grid = json.loads((folder / "grids" / "ranks.json").read_text())
    kept = {cell["key"] for cell in grid["cells"][:2]}
    grid["cells"] = grid["cells"][:2]
    (folder / "grids" / "ranks.json").write_text(json.dumps(grid))
    for file in (folder / "runs").iterdir():
        if file.stem not in kept:
            file.unlink()


def _run(folder: Path) -> None:
    (folder / "config.json").write_text(to_json(config_to_dict(load_config("rte"))))
    (folder / "results.json").write_text(json.dumps(done_run("0" * 16, "StructLoRA", "stsb", 8, 1.0, 0)))
    step = {"step": 1, "epoch": 0.1, "loss": 0.9, "auxiliary": 0.1, "total": 1.0, "lr": 1e-3, "seconds": 0.1}
    look = {"step": 1, "structure": {"adjacent_cosine": 0.1, "mean_gate": None, "dirichlet": [1.0, 0.5]}}
    lines = [step, look, {"step": 1, "evaluation": {"accuracy": 0.5}}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _graphs(folder: Path) -> None:
    AdapterGraphDataset.from_graphs([_model().adapter_graph()], folder / "graphs")


def _load_graphs(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as copy_of:  # loading writes the collated file
        AdapterGraphDataset(shutil.copytree(folder, Path(copy_of) / "graphs"))


def _restore(folder: Path) -> None:
    StructLoraModel.from_pretrained(TINY.model(), folder)


def _task(name: str) -> Target:
    return Target(
        lambda folder: official.write_glue(folder, name), lambda folder: read_examples(name, str(folder)), (DataError,)
    )


def _csv(folder: Path) -> None:
    (folder / "train.csv").write_text('text,label\n"It rains, ""now"".",1\nit\'s wet,0.5\n')


def _parquet(folder: Path) -> None:
    pd.DataFrame({"text": ["it rains", "it is wet"], "label": [1.0, 0.5]}).to_parquet(folder / "train.parquet")


def _chats(folder: Path) -> None:
    turns = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
    rows = [{"messages": turns}, {"prompt": "a", "completion": "b"}, {"instruction": "a", "input": "", "output": "c"}]
    (folder / "train.json").write_text(json.dumps(rows))


def _own_rows(folder: Path, task: str) -> None:
    data = DataConfig(task=task, path=str(folder))

    def example(row: Row) -> object:
        return conversation(row, data) if task == "sft" else (row.text("text"), row.number("label"))

    for split in own_splits(data):
        split.examples(example)


TARGETS: dict[str, Target] = {
    "config": Target(_config, lambda f: load_config(f / "run.yaml"), (ConfigError,)),
    "grid": Target(_grid, lambda f: list(load_grid(f / "grid.yaml").tuning_trials()), (ConfigError,)),
    "adapter": Target(_adapter, inspect_adapter, (ValueError, FileNotFoundError)),
    "state": Target(_adapter, _restore, (ValueError, FileNotFoundError)),
    "checkpoint": Target(_checkpoint, lambda f: load_state(f / STATE_FILE), (CheckpointError,)),
    "comparison": Target(_comparison, read_comparison, (RecordError,)),
    "run": Target(_run, read_run, (ValueError, FileNotFoundError)),
    "graphs": Target(_graphs, _load_graphs, (ValueError, FileNotFoundError)),
    "glue": _task("mrpc"),
    "stsb": _task("stsb"),
    "csv": Target(_csv, lambda f: _own_rows(f, "regression"), (DataError,)),
    "chats": Target(_chats, lambda f: _own_rows(f, "sft"), (DataError,)),
    "parquet": Target(_parquet, lambda f: _own_rows(f, "regression"), (DataError,)),
    "boolq": Target(official.write_boolq, lambda f: read_examples("boolq", str(f)), (DataError,)),
    "piqa": Target(official.write_piqa, lambda f: read_examples("piqa", str(f)), (DataError,)),
    "cifar": Target(official.write_cifar, lambda f: [read_images(str(f), part) for part in (0, 1)], (DataError,)),
    "coco": Target(official.write_coco, lambda f: read_captions(str(f)), (DataError,)),
    "vqa": Target(official.write_vqa, lambda f: read_questions(str(f)), (DataError,)),
    "easy_vqa": Target(official.write_easy_vqa, lambda f: read_questions(str(f)), (DataError,)),
}


def written(name: str, folder: Path) -> Path:
    """Write an undamaged folder of a kind, which has to load, and return the part that is to be damaged."""
    target = TARGETS[name]
    target.write(folder)
    inside = list(folder.iterdir())
    root = inside[0] if len(inside) == 1 and inside[0].is_dir() else folder
    target.load(root)
    return root


def damage_and_load(name: str, root: Path, data: st.DataObject) -> None:
    """Damage a file, load its folder, and see that it was read or refused and that nothing else changed."""
    target = TARGETS[name]
    before = {p: p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}
    victim = data.draw(st.sampled_from(sorted(before)), label="file")
    damaged = data.draw(_damaged(victim, before[victim]), label="content")
    try:
        victim.write_bytes(damaged)
        target.load(root)
    except target.errors:
        pass
    finally:
        after = {p: p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}
        victim.write_bytes(before[victim])
    assert after == {**before, victim: damaged}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: written(name, tmp_path_factory.mktemp(name)) for name in TARGETS}


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=EXAMPLES, derandomize=not EXPLORE, deadline=20_000, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_damaged_file_is_read_or_refused_and_nothing_else_changes(name, data, folders) -> None:
    damage_and_load(name, folders[name], data)


def _damaged(file: Path, content: bytes) -> st.SearchStrategy[bytes]:
    ways = [_bytes(content)]
    if file.suffix in (".json", ".yaml"):
        ways.append(_tree(content, file.suffix))
    if file.suffix == ".gz":
        ways.append(_bytes(gzip.decompress(content)).map(gzip.compress))
    return st.one_of(ways)


@st.composite
def _bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """Cut, repeat, overwrite or insert somewhere, a few times."""
    for _ in range(draw(st.integers(1, 3))):
        at, length = draw(st.integers(0, len(content))), draw(st.integers(0, 40))
        junk = draw(st.sampled_from([b"", b"\0", b"\xff\xfe", b"\t", b"\n", b'"', b"{", b"-1", b"9" * 400, b"nan"]))
        kind = draw(st.sampled_from(["overwrite", "cut off", "repeat", "flip"]))
        if kind == "cut off":
            content = content[:at]
        elif kind == "repeat":
            content = content[: at + length] + content[at:]
        elif kind == "flip" and at < len(content):
            content = content[:at] + bytes([content[at] ^ (1 << length % 8)]) + content[at + 1 :]
        else:
            content = content[:at] + junk + content[at + length :]
    return content


@st.composite
def _tree(draw: st.DrawFn, content: bytes, suffix: str) -> bytes:
    """Put junk in the place of a value, or of a whole section, or take it away."""
    tree = copy.deepcopy(json.loads(content) if suffix == ".json" else yaml.safe_load(content))
    for _ in range(draw(st.integers(1, 2))):
        node, key = draw(st.sampled_from(_places(tree)))
        if draw(st.integers(0, 4)) == 0:
            del node[key]
        elif draw(st.integers(0, 4)) == 0 and isinstance(node, dict):
            node[draw(st.text(max_size=6))] = draw(JUNK)
        else:
            node[key] = draw(JUNK)
    text = json.dumps(tree) if suffix == ".json" else yaml.safe_dump(tree, allow_unicode=True)
    return text.encode("utf-8", "surrogatepass")


def _places(tree: Any) -> list[tuple[Any, Any]]:
    found: list[tuple[Any, Any]] = []
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        found += [(tree, key), *_places(value)]
    return found or [({"": None}, "")]
