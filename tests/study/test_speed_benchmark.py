"""The speed benchmark measures what it says, and its guard can fail."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import growth  # noqa: E402
import speed  # noqa: E402

TINY = {
    "targets": "q_proj,v_proj",
    "width": 64,
    "dtype": "float32",
    "tokens": 16,
    "layers": 2,
    "batch": 2,
    "r": 2,
    "compile": False,
    "checkpointing": True,
    "threads": 1,
    "device": "cpu",
}


def test_every_system_takes_steps_and_is_compared_with_stock_lora(tmp_path: Path) -> None:
    table = speed.measure(TINY, None, rounds=2)
    assert list(table["systems"]) == list(speed.makers(TINY))
    assert table["clock"] == "processor time"
    for name, row in table["systems"].items():
        assert row["ratio"] > 0
        assert row["memory"] > 0.5
        assert sum(row["parts"].values()) == pytest.approx(1, abs=0.3)
        assert ("graph_pass" in row) == (name.startswith("StructLoRA") or name == "fused LoRA")
    table["merged"] = speed.merged_inference(TINY, rounds=2)
    assert table["merged"]["same_modules"]
    (tmp_path / "speed.json").write_text(json.dumps({"tables": [table, table]}))
    speed.figure(tmp_path / "speed.json", tmp_path / "speed.png")
    assert (tmp_path / "speed.png").stat().st_size > 1000


def test_the_guard_names_what_became_slower() -> None:
    good = {name: {"ratio": most, "graph_pass": speed.SHARE_LIMIT} for name, most in speed.LIMITS.items()}
    assert speed.check({"systems": good}) == []
    bad = {name: {"ratio": row["ratio"] + 0.01, "graph_pass": 2 * speed.SHARE_LIMIT} for name, row in good.items()}
    assert len(speed.check({"systems": bad})) == len(speed.LIMITS) + 1


def test_peak_memory_counts_what_is_alive_at_once() -> None:
    import torch

    with speed.Peak() as peak:
        for _ in range(5):
            kept = torch.zeros(1000)
            kept = kept + 1
    assert peak.most == 8000  # the old one and the new one
    assert kept.numel() == 1000


def test_growth_is_measured_from_real_graph_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--most", "64", "--repeats", "1", "--conv", "GCNConv", "--device", "cpu"]
    files = ["--json", str(tmp_path / "growth.json"), "--figure", str(tmp_path / "growth.png")]
    monkeypatch.setattr(sys, "argv", ["growth.py", *options, *files])
    growth.main()
    curves = json.loads((tmp_path / "growth.json").read_text())["curves"]
    assert [c["grows"] for c in curves] == list(growth.SIZES)
    adapters = curves[0]
    assert adapters["sizes"] == [16, 64]
    assert adapters["bytes"][1] > 3 * adapters["bytes"][0]
    assert growth.exponent([1, 2, 4, 8], [1.0, 4.0, 16.0, 64.0]) == pytest.approx(2)
