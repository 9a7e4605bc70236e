"""A process killed at random moments ends with what an undisturbed one ends with; a long one leaves nothing open."""

import sys
from pathlib import Path

import pytest

from structlora_pyg.config import StructLoraConfig
from structlora_pyg.study.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from structlora_pyg.study.run_folder import newest_checkpoint

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from crash import crash
from soak import soak


@pytest.mark.parametrize("kills", [pytest.param(3, marks=pytest.mark.slow), pytest.param(50, marks=pytest.mark.long)])
def test_a_run_killed_at_random_moments_ends_bit_for_bit_like_an_undisturbed_one(make_config, tmp_path, kills) -> None:
    found = crash(make_config(max_steps=6, save_every=1, keep_checkpoints=2), tmp_path, kills=kills, seed=1)
    assert found["kills"] == kills
    assert found["runs"] >= 1
    assert found["different"] == 0


def test_a_run_that_generates_in_between_leaves_no_file_open(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("It rains on the hills and it rains in the valleys.\n" * 40)
    config = RunConfig(
        model=ModelConfig(path=str(tiny_llama)),
        data=DataConfig(task="text", path=str(tmp_path / "text.txt"), max_length=16, eval_limit=4),
        adapter=StructLoraConfig(
            r=2, target_modules=["q_proj", "v_proj"], schedule={"warmup_steps": 1}, graph={"refresh_every": 2}
        ),
        train=TrainConfig(batch_size=4, eval_every=4, save_every=4, lr=1e-3),
    )
    found = soak(config, tmp_path / "run", minutes=0.02)
    assert found["optimizer_steps"] == 4 * found["evaluations_and_generations"] > 4
    assert len(set(found["open_files_by_tenth"])) == 1
    assert all(seconds > 0 for seconds in found["step_seconds_by_tenth"])
    assert newest_checkpoint(tmp_path / "run").name == f"checkpoint-{found['optimizer_steps'] - 4}"
