"""A training process that is killed at random moments ends with what an undisturbed one ends with."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from helpers.runs import MakeConfig

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from crash import crash


@pytest.mark.parametrize("kills", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_a_run_killed_at_random_moments_ends_bit_for_bit_like_an_undisturbed_one(
    make_config: MakeConfig, tmp_path: Path, kills: int
) -> None:
    found = crash(make_config(max_steps=6, save_every=1, keep_checkpoints=2), tmp_path, kills=kills, seed=1)
    assert found["kills"] == kills
    assert found["runs"] >= 1
    assert found["different"] == 0
