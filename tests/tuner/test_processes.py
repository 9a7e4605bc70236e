"""Two processes train what one trains on the same examples, and both hold the same graph."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.runs import adapter_of, folder_of, lines_of, tiny_config, without_dropout

from structlora_pyg.study import train as training
from structlora_pyg.study.config import RunConfig
from structlora_pyg.study.run import Run
from structlora_pyg.study.tasks.sentences import SentenceTask

pytestmark = pytest.mark.slow

# 21 examples, 8 a step: the last step of an epoch has 5, so that one process has 3 of them and the other 2.
VARIANTS: dict[str, dict[str, Any]] = {
    "hybrid edges": {"graph": {"edges": "hybrid", "refresh_every": 2, "threshold": 0.0}},
    "learned edges": {"graph": {"edges": "learned", "refresh_every": 2, "top_k": 1}},
    "rank codes": {"filter": {"compression": "vib", "beta": 0.1}},
}
SILENT = "silent process"  # as the first one, but the loss of the first process has no gradient
SCRIPT = """
import pickle, sys
from test_processes import record
for config in pickle.load(open(sys.argv[1], "rb")):
    record(config)
"""


def record(config: RunConfig) -> None:
    """Train, and write what this process ends with."""
    made, loss = [], SentenceTask.loss
    rank = os.environ.get("RANK", "alone")
    silent = rank == "0" and SILENT in config.train.output_dir

    def kept(*args: Any) -> Run:
        made.append(Run(*args))
        return made[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "Run", kept)
        patch.setattr(SentenceTask, "loss", lambda *a: loss(*a) * (0.0 if silent else 1.0))
        training.train(config, progress=False)
    model = made[0].method.model
    graph = model.adapter_graph()
    state = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    sketch = model.graph_pass.sketch
    state |= {name: graph[name] for name in ("edge_index", "edge_weight", "gate", "x")}
    state |= {"refreshes": sketch.refreshes, "average": sketch.average, "pending": sketch.pending} if sketch else {}
    torch.save(state, folder_of(config) / f"ends-with-{rank}.pt")


@pytest.fixture(scope="module")
def ends(tiny_bert, rte_folder, tmp_path_factory) -> dict[str, tuple[RunConfig, RunConfig]]:
    """Return per variant the finished runs of one and of two processes."""
    folder = tmp_path_factory.mktemp("processes")
    bert = without_dropout(tiny_bert, folder / "bert-without-dropout")

    def config(name: str, batch_size: int) -> RunConfig:
        made = tiny_config(
            bert, rte_folder, folder / f"{name}-{batch_size}", VARIANTS.get(name, VARIANTS["hybrid edges"]),
            max_steps=7, batch_size=batch_size, save_every=7,
        )  # fmt: skip
        made.data.train_limit = 21
        return made

    pairs = {name: (config(name, 8), config(name, 4)) for name in (*VARIANTS, SILENT)}
    (folder / "configs.pkl").write_bytes(pickle.dumps([two for _, two in pairs.values()]))
    (folder / "run.py").write_text(SCRIPT)
    tests = Path(__file__).parent
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(folder / "run.py"),
         str(folder / "configs.pkl")],
        check=True,
        timeout=600,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": f"{tests}:{tests.parent}"},
    )  # fmt: skip
    for one, _ in pairs.values():
        record(one)
    return pairs


def ended(config: RunConfig, rank: str) -> dict[str, torch.Tensor]:
    return torch.load(folder_of(config) / f"ends-with-{rank}.pt", weights_only=True)


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_processes_train_what_one_trains_on_the_same_examples(variant: str, ends: Any) -> None:
    one, two = ends[variant]
    assert json.loads((folder_of(two) / "results.json").read_text())["processes"] == 2
    for a, b in zip(lines_of(one), lines_of(two), strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert b[name] == pytest.approx(a[name], rel=1e-5), (a["step"], name)
    # Sums are formed in another order: rounding, 6e-8 in float32, of some hundred terms in 7 steps.
    alone, first = ended(one, "alone"), ended(two, "0")
    assert alone.keys() == first.keys()
    for name in alone:
        torch.testing.assert_close(first[name], alone[name], rtol=1e-4, atol=1e-6, msg=name)
    assert adapter_of(one).keys() == adapter_of(two).keys()
    for name, value in adapter_of(one).items():
        torch.testing.assert_close(adapter_of(two)[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("variant", [*VARIANTS, SILENT])
def test_both_processes_hold_the_same_adapter_and_the_same_graph(variant: str, ends: Any) -> None:
    first, second = (ended(ends[variant][1], rank) for rank in "01")
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    assert first["edge_index"].size(1) > 0
    if variant != "learned edges":
        assert first["refreshes"] == 3
