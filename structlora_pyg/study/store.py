"""The runs of a folder of results: found by what their outcome depends on, and made by one process at a time.

A folder of results holds ``runs/<key>.json``, what a run gave. The key is a hash of what the run depends on, so grids
that share a folder share runs, and any number of processes, on any machines, can work on one at once. A run is taken by
a lock on a file of its own, which the operating system releases when its owner ends, however that happens: a run whose
owner was killed is taken up by whoever looks next.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from structlora_pyg.checks import replace_file
from structlora_pyg.config import SECTIONS
from structlora_pyg.study.config import RunConfig
from structlora_pyg.study.config_files import config_to_dict, flat, parse_config
from structlora_pyg.study.methods import METHODS
from structlora_pyg.study.report.records import damage_named, read_record

Version = tuple[int, int]  # of a file: when it was written, and its inode


def run_key(config: RunConfig) -> str:
    """Return 16 hexadecimal digits for what the outcome of a run depends on.

    Where it writes is left out; so is what a method does not read of the adapter, so that a baseline is run once,
    whatever the StructLoRA beside it, and a method without rank once for all ranks.
    """
    method = METHODS[config.method.name]
    unread = {"alarms"} if method.is_structlora else {"alarms", *SECTIONS}
    unread |= set() if method.ranked else {"r", "lora_alpha"}
    kept = {
        key: value
        for key, value in flat(config_to_dict(config)).items()
        if key not in ("train.output_dir", "train.keep_checkpoints")
        and not (key.startswith("adapter.") and key.split(".")[1] in unread)
    }
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


class RunStore:
    """The runs of a folder of results.

    A stored configuration is read by the code of today before it is compared, so that a setting that has been added
    since, at the default that keeps the old behavior, does not separate a run from its file.

    Args:
        folder: The folder of results, on a file system whose locks reach all its machines (NFS 4, Lustre with
            ``flock``, any local disk).

    Attributes:
        first_seen: The version that each run's file had when this store was opened.

    Raises:
        RecordError: If a file is damaged or was written by another version.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        files = sorted((folder / "runs").glob("*.json"))
        self.first_seen = {file.stem: _version(file) for file in files}
        self._records: dict[str, dict[str, Any]] = {}
        self._files: dict[str, str] = {}
        for file in files:
            record = read_record(file)
            with damage_named(file):
                config, problems = parse_config(RunConfig, dict(record["config"]))
            if not problems and config.method.name in METHODS:
                key = run_key(config)
                self._records[key], self._files[key] = record, file.stem

    def get(self, config: RunConfig) -> dict[str, Any] | None:
        """Return what a run gave; None if it has not been run."""
        return self._records.get(run_key(config))

    def file_of(self, config: RunConfig) -> str | None:
        """Return the name of a run's file, without suffix; None if it has not been run."""
        return self._files.get(run_key(config))

    def is_done(self, config: RunConfig) -> bool:
        """Tell whether a run has succeeded; a failed one is tried again."""
        record = self.get(config)
        return record is not None and record["status"] == "done"

    def is_made(self, key: str) -> bool:
        """Tell whether anybody has written the file of a run since this store was opened."""
        return _version(_file(self.folder, key)) != self.first_seen.get(key)

    def is_free(self, key: str) -> bool:
        """Tell whether a run is still to be made and nobody is making it at the moment."""
        with take(self.folder, key, self.first_seen.get(key)) as free:
            return free

    def reload(self, key: str) -> dict[str, Any]:
        """Read the file of a run that somebody has written, and return what it holds."""
        self._records[key], self._files[key] = read_record(_file(self.folder, key)), key
        return self._records[key]


@contextlib.contextmanager
def take(folder: Path, key: str, first_seen: Version | None) -> Iterator[bool]:
    """Take a run for as long as the context lasts, and tell whether it was free and is still to be made.

    Args:
        folder: The folder of results.
        key: See `run_key`.
        first_seen: See `RunStore.first_seen`; a file of another version means that the run has been made since.
    """
    file = folder / "work" / f"{key}.lock"
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(file, timeout=0):
            yield _version(_file(folder, key)) == first_seen
            if _version(_file(folder, key)) != first_seen:
                file.unlink(missing_ok=True)  # nobody needs it now: whoever has it open looks for the run first
    except Timeout:
        yield False


def write_run(folder: Path, key: str, record: dict[str, Any]) -> None:
    """Write the file of a run into a folder of results."""
    replace_file(_file(folder, key), json.dumps(record, allow_nan=False) + "\n")


def _file(folder: Path, key: str) -> Path:
    return folder / "runs" / f"{key}.json"


def _version(file: Path) -> Version | None:
    with contextlib.suppress(FileNotFoundError):
        found = file.stat()
        return found.st_mtime_ns, found.st_ino
    return None
