"""Who makes which run: any number of processes, on any machines, that share a folder of results.

A run is taken by a lock on a file of its own, which the operating system releases when its owner ends, however that
happens. A run whose owner was killed is therefore taken up by whoever looks next.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout


class Claims:
    """Claims on runs that are missing, or failed before.

    Args:
        folder: The folder of results, on a file system with locks that reach all its machines (NFS 4, Lustre with
            ``flock``, any local disk).
        keys: The keys of the runs.
    """

    def __init__(self, folder: Path, keys: Iterable[str]) -> None:
        self.folder = folder
        self._before = {key: self._version(key) for key in keys}

    def began_with(self, key: str) -> bool:
        """Tell whether the file of a run was there when these claims began."""
        return self._before[key] is not None

    def made(self, key: str) -> bool:
        """Tell whether somebody has written the file of a run since these claims began."""
        return self._version(key) != self._before[key]

    @contextlib.contextmanager
    def take(self, key: str) -> Iterator[bool]:
        """Take a run for as long as the context lasts, and tell whether it was free and is still to be made."""
        file = self.folder / "work" / f"{key}.lock"
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(file, timeout=0)
        try:
            with lock:
                yield not self.made(key)
                if self.made(key):  # nobody needs the lock any more: who has it open looks for the run first
                    file.unlink(missing_ok=True)
        except Timeout:
            yield False

    def free(self, key: str) -> bool:
        """Tell whether nobody makes a run at the moment."""
        with self.take(key) as free:
            return free

    def _version(self, key: str) -> tuple[int, int] | None:
        try:
            found = (self.folder / "runs" / f"{key}.json").stat()
            return found.st_mtime_ns, found.st_ino
        except FileNotFoundError:
            return None
