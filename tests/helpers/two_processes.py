"""Runs of several processes on one CPU: ``python -m helpers.two_processes KIND CONFIG.pkl [resume] ...``.

KIND is ddp or fsdp. ``loop FOLDER`` trains in a loop of its own; ``naive FOLDER`` leaves out what it has to do there.

The libraries are imported once; then every run forks its processes. FSDP2 is Accelerate's own: it only has to be told
that a CPU may have it, which its set-up keeps for accelerators.
"""

import multiprocessing
import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROCESSES = 2


def launch(*words: str | Path, processes: int = PROCESSES, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run this file on its arguments and return what it said."""
    tests = Path(__file__).parents[1]
    fixed = {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{tests}:{tests.parent}", "PROCESSES": str(processes)}
    command = [sys.executable, "-m", "helpers.two_processes", *map(str, words)]
    return subprocess.run(command, env={**os.environ, **fixed, **environment}, capture_output=True, text=True)


def forked(target: Callable[..., None], processes: int, *arguments: Any) -> int:
    """Run a function of rank and `arguments` in processes that find each other; return how many have failed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}

    def ranked(rank: int) -> None:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        target(rank, *arguments)

    ranks = [multiprocessing.get_context("fork").Process(target=ranked, args=(rank,)) for rank in range(processes)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    return sum(process.exitcode != 0 for process in ranks)


def in_process(rank: int, kind: str, file: str, resume: bool) -> None:
    from structlora_pyg.study import distributed
    from structlora_pyg.study.train import train

    if kind in ("loop", "naive"):
        return own_loop(kind, file)
    if kind == "fsdp":
        distributed.Accelerator = accelerator_with_fsdp()
    with open(file, "rb") as stream:
        train(pickle.load(stream), resume=resume, progress=False)


def own_loop(kind: str, folder: str) -> None:
    """Train as docs/guides/devices.md shows; `naive` leaves out what is special."""
    from helpers.zero import start, write_why_not_merged

    from structlora_pyg.study.distributed import average, shard

    model, optimizer, batches = start()
    base = set(model.get_base_model().parameters()) - {p for p in model.parameters() if p.requires_grad}
    accelerator = accelerator_with_fsdp()(mixed_precision="no")
    if kind == "loop":
        model, optimizer = shard(accelerator, model, base, optimizer)
    else:
        model, optimizer = accelerator.prepare(model, optimizer)
    model.train()
    rank = accelerator.process_index
    for batch in batches:
        mine = {name: value[rank : rank + 1] for name, value in batch.items()}
        accelerator.backward(model(**mine).loss)
        average(model, accelerator)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.export(folder)
    write_why_not_merged(model, Path(folder, f"merge-{rank}.txt"))


def accelerator_with_fsdp() -> type:
    from accelerate import Accelerator, DistributedType
    from accelerate.utils import FullyShardedDataParallelPlugin

    class OnCpu(Accelerator):
        def __init__(self, mixed_precision: str, **options) -> None:
            super().__init__(**options)
            self.state._mixed_precision, self.native_amp = mixed_precision, mixed_precision == "bf16"
            self.state.distributed_type = DistributedType.FSDP
            # The names of the blocks come from the environment, as `accelerate launch` puts them there.
            self.state.fsdp_plugin = FullyShardedDataParallelPlugin(
                fsdp_version=int(os.environ.get("FSDP_VERSION", "2")), auto_wrap_policy="transformer_based_wrap"
            )

    return OnCpu


def main(words: list[str]) -> int:
    os.environ["ACCELERATE_USE_CPU"] = "true"
    import torch

    import structlora_pyg.study.train  # noqa: F401

    torch.set_num_threads(1)
    processes, failed = int(os.environ["PROCESSES"]), 0
    while words:
        kind, file, resume = words[0], words[1], words[2:3] == ["resume"]
        words = words[3 if resume else 2 :]
        failed += forked(in_process, processes, kind, file, resume)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
