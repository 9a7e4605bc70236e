"""The benchmark on graph networks: its task is counted exactly, it runs, and its page shows its file."""

from __future__ import annotations

import importlib.util
import itertools
import json
from pathlib import Path

import pytest
import torch
from torch_geometric.utils import erdos_renyi_graph, to_dense_adj

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("gnn_benchmark", ROOT / "benchmarks" / "gnn.py")
gnn = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(gnn)


@pytest.mark.parametrize("seed", range(4))
def test_triangles_and_squares_are_those_found_by_looking(seed: int) -> None:
    torch.manual_seed(seed)
    n = 7
    edge_index = erdos_renyi_graph(n, 0.5)
    a = to_dense_adj(edge_index, max_num_nodes=n)[0].bool()
    triangles, squares = torch.zeros(n), torch.zeros(n)
    for i, j, k in itertools.combinations(range(n), 3):
        if a[i, j] and a[j, k] and a[k, i]:
            triangles[[i, j, k]] += 1
    for chosen in itertools.combinations(range(n), 4):
        first, *others = chosen
        for j, k, m in itertools.permutations(others):
            if j < m and a[first, j] and a[j, k] and a[k, m] and a[m, first]:
                squares[list(chosen)] += 1
    found = gnn.counts(edge_index, n)
    torch.testing.assert_close(found[0].float(), triangles)
    torch.testing.assert_close(found[1].float(), squares)


def test_it_runs_from_graphs_to_table(tmp_path: Path) -> None:
    page, result = tmp_path / "page.md", tmp_path / "gnn.json"
    page.write_text(f"before\n{gnn.BEGIN}\nold\n{gnn.END}\nafter\n")
    gnn.main(["--quick", "--json", str(result)])
    gnn.main(["--table", str(result), str(page)])
    content = json.loads(result.read_text())
    assert {kind: list(found) for kind, found in content["systems"].items()} == gnn.SYSTEMS
    gps = content["systems"]["GPS"]
    assert gps["LoRA"]["test"] == pytest.approx(gps["LoRA (stock PEFT)"]["test"], abs=2)  # the same up to rounding
    trained = {name: found["trained"] for name, found in gps.items()}
    assert trained["LoRA"] == trained["LoRA (stock PEFT)"] == trained["StructLoRA"] < trained["LoRA, attention too"]
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert text.count("| StructLoRA |") == 2


def test_the_page_shows_the_numbers_of_the_file() -> None:
    content = json.loads((ROOT / "benchmarks" / "results" / "gnn.json").read_text())
    assert gnn.table(content) in (ROOT / "docs" / "gnn.md").read_text()
