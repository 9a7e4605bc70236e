"""The damaged files of ``test_fuzz.py``, chosen by which of them reach new lines of the library (atheris, libFuzzer).

PYTHONPATH=tests python tests/helpers/fuzz_coverage.py  # every kind, 2,000 files each
PYTHONPATH=tests python tests/helpers/fuzz_coverage.py grid 10000  # one kind
PYTHONPATH=tests python tests/helpers/fuzz_coverage.py grid 1 crash-...  # once more what libFuzzer kept of a failure
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["structlora_pyg"]):
    import structlora_pyg.study.report.look  # noqa: F401
    import structlora_pyg.study.train  # noqa: F401
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from study.test_fuzz import TARGETS, damage_and_load, written

OPTIONS = ("-max_len=8192", "-len_control=0", "-rss_limit_mb=8192", "-verbosity=0")


def fuzz(name: str, wanted: int, options: list[str]) -> None:
    """Load so many damaged folders of a kind; ends the process."""
    folder = Path(tempfile.mkdtemp())
    (folder / "seeds").mkdir()
    (folder / "files").mkdir()
    draw = random.Random(0)
    for i in range(16):  # hypothesis needs some hundred bytes to make a file from
        (folder / "seeds" / str(i)).write_bytes(draw.randbytes(draw.randint(200, 8000)))
    root, loaded = written(name, folder / "files"), 0

    @settings(database=None, suppress_health_check=list(HealthCheck))
    @given(data=st.data())
    def one(data: st.DataObject) -> None:
        nonlocal loaded
        damage_and_load(name, root, data)
        loaded += 1

    def one_input(content: bytes) -> None:
        one.hypothesis.fuzz_one_input(content)
        if loaded >= wanted:
            sys.stdout.write(f"{name}: {loaded} damaged files read or refused\n")
            sys.stdout.flush()
            os._exit(0)

    atheris.Setup([sys.argv[0], *OPTIONS, *(options or [str(folder / "seeds")])], one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        fuzz(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
    for kind in TARGETS:
        subprocess.run([sys.executable, __file__, kind, "2000"], check=True)
