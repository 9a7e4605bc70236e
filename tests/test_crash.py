"""A training process that is killed at random moments ends with what an undisturbed one ends with."""

from __future__ import annotations

import sys
from pathlib import Path

from runs import MakeConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from crash import crash


def test_a_run_killed_at_random_moments_ends_bit_for_bit_like_an_undisturbed_one(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    found = crash(make_config(max_steps=6, save_every=1, keep_checkpoints=2), tmp_path, kills=5, seed=1)
    assert found["kills"] == 5
    assert found["runs"] >= 1
    assert found["different"] == 0
