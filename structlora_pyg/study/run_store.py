"""The runs of a comparison on disk, found by what they depend on."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from structlora_pyg.checks import build
from structlora_pyg.config import SECTIONS
from structlora_pyg.files import replace_file
from structlora_pyg.study.methods import METHODS
from structlora_pyg.study.report.records import read_record
from structlora_pyg.study.run_config import RunConfig
from structlora_pyg.study.run_folder import config_to_dict, flat
from structlora_pyg.study.schema import StoredRun


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


class Runs:
    """The files of runs in a folder of results, found by configuration.

    A stored configuration is read by the code of today before it is compared, so that a setting that has been added
    since, at the default that keeps the old behaviour, does not part a run from its file.

    Args:
        folder: The folder of results.

    Raises:
        RecordError: If a file is damaged or was written by another version.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, str] = {}
        for file in sorted((folder / "runs").glob("*.json")):
            record = read_record(file, StoredRun)
            config, problems = build(RunConfig, record["config"])
            if not problems and config.method.name in METHODS:
                self._files[run_key(config)] = file.stem

    def get(self, config: RunConfig) -> dict[str, Any] | None:
        """Return what a run gave; None if it has not been run."""
        key = self._files.get(run_key(config))
        return None if key is None else read_record(self._path(key))

    def key(self, config: RunConfig) -> str | None:
        """Return the name of a run's file, without suffix; None if it has not been run."""
        return self._files.get(run_key(config))

    def done(self, config: RunConfig) -> bool:
        """Tell whether a run has succeeded; a failed one is tried again."""
        record = self.get(config)
        return record is not None and record["status"] == "done"

    def add(self, config: RunConfig, record: dict[str, Any]) -> None:
        """Write a run's file."""
        write_run(self.folder, run_key(config), record)
        self.added(config)

    def added(self, config: RunConfig) -> dict[str, Any]:
        """Take a run in whose file somebody else has written, and return what it gave."""
        key = run_key(config)
        self._files[key] = key
        return read_record(self._path(key))

    def made_since(self, config: RunConfig) -> bool:
        """Tell whether the file of a run says by now that it has succeeded."""
        return self.added(config)["status"] == "done"

    def _path(self, key: str) -> Path:
        return self.folder / "runs" / f"{key}.json"


def write_run(folder: Path, key: str, record: dict[str, Any]) -> None:
    """Write the file of a run into a folder of results."""
    replace_file(folder / "runs" / f"{key}.json", json.dumps(record, allow_nan=False) + "\n")
