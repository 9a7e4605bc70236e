"""The folder of a run: its configuration, its log of steps, and the rules that keep two runs out of one folder."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from peft import LoraConfig

from structlora_pyg.checks import ConfigError, build
from structlora_pyg.files import replace_file, short
from structlora_pyg.study.checkpoints import CheckpointError, checkpoints
from structlora_pyg.study.run_config import RunConfig

CONFIG_FILE = "config.json"
LOCK_FILE = ".lock"
METRICS_FILE = "metrics.jsonl"
RESULTS_FILE = "results.json"
GRAPHS_FOLDER = "graphs"


def config_to_dict(config: RunConfig) -> dict[str, Any]:
    """Return a configuration as plain values; of PEFT's own settings only those that are not the default."""
    default, lora = LoraConfig(), config.adapter.to_lora_config()
    names = [f.name for f in dataclasses.fields(LoraConfig) if f.init]
    changed = {n: getattr(lora, n) for n in names if getattr(lora, n) != getattr(default, n)}
    sections = {name: dataclasses.asdict(getattr(config, name)) for name in ("model", "data", "method", "train")}
    return json.loads(to_json({**sections, "adapter": {**changed, **config.adapter.own_fields()}}))


def config_hash(config: RunConfig) -> str:
    """Return 16 hexadecimal digits that two runs share if they differ in nothing but ``train.output_dir``."""
    values = {k: v for k, v in flat(config_to_dict(config)).items() if k != "train.output_dir"}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def check_folder(folder: Path, config: RunConfig, resume: bool) -> None:
    """Refuse before any work what would overwrite a run or continue another one.

    Raises:
        FileExistsError, NotADirectoryError, PermissionError, CheckpointError, ConfigError: As `train` says.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"train.output_dir={str(folder)!r} is a file; give a folder")
    finished, begun = (folder / RESULTS_FILE).exists(), (folder / CONFIG_FILE).exists() or checkpoints(folder)
    if finished:
        raise FileExistsError(f"{folder} holds a finished run ({RESULTS_FILE}); choose another train.output_dir")
    if not resume:
        if begun:
            raise FileExistsError(
                f"{folder} holds an unfinished run; continue it with --resume, or choose another train.output_dir"
            )
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(f"{folder} cannot be written to; choose another train.output_dir")
        return
    if not begun:
        raise CheckpointError(f"{folder} holds no run to resume; start without resume")
    _compare_config(folder / CONFIG_FILE, config)


def _compare_config(file: Path, config: RunConfig) -> None:
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
        before = flat(tree)
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{file} cannot be read ({short(error)}); start without resume, in another train.output_dir"
        ) from error
    stored, problems = build(RunConfig, tree)
    if not problems:
        before = flat(config_to_dict(stored))  # what is new since has its default
    now = flat(config_to_dict(config))
    keys = sorted(k for k in before.keys() | now.keys() if before.get(k) != now.get(k) and k != "train.output_dir")
    if keys:
        raise ConfigError(
            [f"{k}: the run in {file.parent} was started with {before.get(k)!r}, not {now.get(k)!r}" for k in keys]
        )


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep other processes from training in a folder, on all of a cluster's machines that share it with locks.

    Raises:
        FileExistsError: If one does already.
    """
    try:
        with FileLock(folder / LOCK_FILE, timeout=0):
            yield
    except Timeout:
        raise FileExistsError(
            f"another process trains in {folder}; wait for it, or choose another train.output_dir"
        ) from None


def start_run(folder: Path, config: RunConfig) -> None:
    """Write the configuration."""
    replace_file(folder / CONFIG_FILE, to_json(config_to_dict(config)))


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested keys joined by dots."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        deeper = isinstance(value, Mapping) and value
        found |= flat(value, f"{prefix}{key}.") if deeper else {f"{prefix}{key}": value}
    return found


def to_json(value: Any) -> str:
    """Return JSON text with a final newline; what JSON has no form for becomes text."""
    return json.dumps(value, indent=2, allow_nan=False, default=_plain) + "\n"


def _plain(value: Any) -> Any:
    """Return what JSON has no form for: sets as sorted lists, the rest as text."""
    return sorted(value) if isinstance(value, (set, frozenset)) else str(value)


class Log:
    """``metrics.jsonl``: one line a step and one an evaluation, on disk at once.

    Args:
        folder: Folder of the run.
        active: Whether this process writes.
        keep: Lines of later steps, written after the checkpoint the run continues from, are dropped.
    """

    def __init__(self, folder: Path, active: bool, keep: int) -> None:
        self.file, self.active = folder / METRICS_FILE, active
        kept = [line for line in self.lines() if line["step"] <= keep]
        if active:
            replace_file(self.file, "".join(json.dumps(line) + "\n" for line in kept))

    def write(self, **values: Any) -> None:
        """Append one line."""
        if self.active:
            with self.file.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(values, allow_nan=False) + "\n")

    def lines(self) -> list[dict[str, Any]]:
        """Return the lines; one that a crash cut short can only be the last and is left out."""
        if not self.file.exists():
            return []
        found: list[dict[str, Any]] = []
        for line in self.file.read_text(encoding="utf-8").splitlines():
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return found
