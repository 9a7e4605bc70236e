"""DeepSpeed through Accelerate: ZeRO-2 and ZeRO-3 train what one process trains."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import zero
from helpers.tiny import ARCHITECTURES
from safetensors import safe_open
from safetensors.torch import load_file

pytest.importorskip("deepspeed", reason="no DeepSpeed: pip install deepspeed")
FILE = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zero") / "base"
    torch.manual_seed(0)
    ARCHITECTURES["llama"].model().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def alone(base: Path) -> Path:
    """Return the adapter of one process."""
    zero.train_alone(base.parent / "alone", base)
    return base.parent / "alone" / FILE


@pytest.mark.slow
@pytest.mark.parametrize("how", [("2",), ("3",), ("3", "loaded-cut"), ("2", "trainer"), ("3", "trainer")], ids=" ".join)
def test_zero_counts_its_steps_and_exports_what_one_process_exports(base, alone, tmp_path, how) -> None:
    """Its optimizer holds copies of the parameters: unnoticed, the warm-up would never end."""
    stage, *rest = how
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    environment["PYTHONPATH"] = ":".join(map(str, Path(__file__).parents[1:3]))
    command = [sys.executable, "-m", "helpers.zero", stage, str(base), str(tmp_path), *rest]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    one = load_file(alone)
    for rank in "01":
        assert ((tmp_path / f"frozen-{rank}.txt").read_text() == "0") == (stage == "3")
        if stage == "3":
            assert "q_proj is cut over the processes" in (tmp_path / f"merge-{rank}.txt").read_text()
        shared = tmp_path / rank / FILE
        assert safe_open(shared, "pt").metadata() == safe_open(alone, "pt").metadata()  # the base's fingerprint
        two = load_file(shared)
        assert one.keys() == two.keys()
        for name in one:
            torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=5e-5 if rest == ["trainer"] else 1e-5)
