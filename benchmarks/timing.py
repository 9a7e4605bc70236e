"""What the cost studies share: a clock, peak memory, the number of threads, and the head of their results."""

from __future__ import annotations

import json
import platform
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Clock:
    """Seconds of work: processor time of the thread, or wall clock on a GPU and with several threads."""

    def __init__(self, device: str, threads: int) -> None:
        self.cuda = device.startswith("cuda")
        self.name = "wall clock" if self.cuda or threads > 1 else "processor time"
        self.now = time.perf_counter if self.name == "wall clock" else time.thread_time

    def __call__(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return self.now()


class Peak(TorchDispatchMode):
    """Largest sum of the sizes of all tensors that operations have made or touched, in bytes, `without` some."""

    def __init__(self, without: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.most = 0
        self.alive: dict[int, int] = {t.untyped_storage()._cdata: 0 for t in without}

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, Tensor) and (key := (storage := t.untyped_storage())._cdata) not in self.alive:
                self.alive[key] = storage.nbytes()
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._free, key)
        return result

    def _free(self, key: int) -> None:
        self.now -= self.alive.pop(key, 0)


def peak_bytes(run: Callable[[], Any], cuda: bool, without: Iterable[Tensor] = ()) -> int:
    """Return the most memory that `run` holds beyond what is there before, in bytes; on a CPU beyond `without`."""
    if cuda:
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    with Peak(without) as peak:
        run()
    return peak.most


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run torch on so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def default_device() -> str:
    """Return ``cuda`` if there is a GPU, otherwise ``cpu``."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def write_result(path: Path, device: str, threads: int, **content: Any) -> None:
    """Write a result as JSON, with the command that made it, the device and the version of torch."""
    cuda = device.startswith("cuda")
    named = torch.cuda.get_device_name() if cuda else f"{platform.machine()} CPU, {threads} thread(s)"
    head = {"command": " ".join(["python", *sys.argv]), "device": named, "torch": torch.__version__}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**head, **content}, indent=1) + "\n", encoding="utf-8")
