"""DeepSpeed through Accelerate: ZeRO-2 trains what one process trains, ZeRO-3 is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import zero
from safetensors.torch import load_file

pytest.importorskip("deepspeed", reason="no DeepSpeed: pip install deepspeed")


def launch(stage: int, folder: Path) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).parents[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root), "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, zero.__file__, str(stage), str(folder)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_zero_2_counts_its_steps_and_exports_what_one_process_exports(tmp_path: Path) -> None:
    """Its optimizer holds copies of the parameters: unnoticed, the warm-up would never end."""
    done = launch(2, tmp_path / "shared")
    assert done.returncode == 0, done.stderr
    model, optimizer, batches = zero.start()
    model.train()
    for batch in batches:
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.export(tmp_path / "alone")
    assert model.coordination.active
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("alone", "shared"))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_zero_3_is_refused_at_the_first_forward(tmp_path: Path) -> None:
    done = launch(3, tmp_path / "shared")
    assert done.returncode == 1
    assert "DeepSpeed ZeRO-3 takes the adapters apart" in done.stderr
