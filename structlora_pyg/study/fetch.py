"""What a configuration needs from the hub, put where the configuration looks for it; and results put on the hub."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import errors

from structlora_pyg.checks import ConfigError, require, short
from structlora_pyg.study.config import RunConfig
from structlora_pyg.study.tasks import TASKS
from structlora_pyg.study.tasks.data import FILE_SUFFIXES, HUB_IDS, places
from structlora_pyg.study.tasks.splits import quickly_offline

GLUE = "nyu-mll/glue"  # one repository, a folder for each task
MODEL_FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")
SOURCES = {  # of what is not on the hub in the form that a task reads
    "coco": "https://cocodataset.org/#download",
    "imagenet": "https://image-net.org/download.php",
    "piqa": "https://yonatanbisk.com/piqa",
    "vqav2": "https://visualqa.org/download.html",
}


@dataclass(frozen=True)
class Need:
    """A model or a data set that a configuration names.

    Args:
        setting: ``model.path`` or ``data.path``.
        path: Its value.
        repo: Its id on the hub; None where the hub does not have it.
        patterns: Which files of the repository are wanted.
        place: Where it goes; None: the hub's own cache, where an id is looked for.
        found: Where it lies already; None if it does not.
    """

    setting: str
    path: str
    repo: str | None
    patterns: tuple[str, ...]
    place: Path | None
    found: Path | None

    @property
    def is_data(self) -> bool:
        """Whether it is a data set."""
        return self.setting == "data.path"

    def files(self, folder: Path | None = None, download: bool = False) -> dict[str, int]:
        """Return names and sizes in bytes of the files on the hub; download them to a folder, or the hub's cache.

        Raises:
            OSError: If the hub does not answer, or does not have them.
        """
        kind, allow = ("dataset" if self.is_data else "model"), list(self.patterns)
        load = partial(huggingface_hub.snapshot_download, str(self.repo), repo_type=kind, allow_patterns=allow)
        load = partial(load, ignore_patterns=None if self.is_data else "*/*", local_dir=folder)  # */*: other formats
        try:
            with quickly_offline():
                found: Any = load(dry_run=True)
                if not found:
                    raise OSError(f"it has no file {' or '.join(allow)}")
                if download:
                    load()
        except (OSError, ValueError, errors.HTTPError) as error:
            raise OSError(f"{self.setting}: {self.repo} cannot be fetched from the hub: {short(error)}") from error
        return {file.filename: file.file_size for file in found}


def needs(config: RunConfig) -> list[Need]:
    """Return the model and the data of a configuration; nothing where the task brings them."""
    if TASKS[config.data.task].brings_data:
        return []
    found = []
    for setting, path in (("model.path", config.model.path), ("data.path", config.data.path)):
        first, tried = path.partition("/")[0], places(path)
        repo = HUB_IDS.get(first, path if path.count("/") == 1 and not path.endswith(FILE_SUFFIXES) else None)
        patterns: tuple[str, ...] = MODEL_FILES
        if setting == "data.path":
            patterns = (f"{config.data.task}/*.parquet" if repo == GLUE else "*.parquet",)
        elif config.model.library == "timm":
            patterns = ("model.safetensors", "config.json")
        there = next((place for place in tried if place.exists()), None)
        found.append(Need(setting, path, repo, patterns, tried[0] if first in HUB_IDS else None, there))
    return found


def fetch(need: Need) -> None:
    """Download a need; what was interrupted goes on where it stopped.

    Parquet files go to ``data/<split>-*.parquet``, where the package datasets finds every split by its name.

    Raises:
        OSError: If the hub does not answer, or the place cannot be written to.
    """
    if need.place is None:  # as the run will load it
        if need.is_data:
            config = need.patterns[0].partition("/")[0] if need.repo == GLUE else None
            with quickly_offline():
                require("datasets", "study").load_dataset(need.repo, config)
        else:
            need.files(download=True)
        return
    aside = need.place.with_name(f"{need.place.name}.part")  # a whole folder or none
    names = need.files(aside, download=True)
    if need.place.suffix == ".safetensors":
        (aside / "model.safetensors").replace(need.place)
        shutil.rmtree(aside)
        return
    if need.is_data:
        (aside / "data").mkdir(exist_ok=True)
        for name in names:
            (aside / name).replace(aside / "data" / Path(name).name)
    shutil.rmtree(aside / ".cache", ignore_errors=True)
    aside.replace(need.place)


def make_repo(repo: str) -> str:
    """Make a repository for a model on the hub, unless it is there, and return its address.

    Raises:
        OSError: If the hub does not answer, or you may not write there.
    """
    try:
        with quickly_offline():
            return str(huggingface_hub.HfApi().create_repo(repo, exist_ok=True))
    except (OSError, ValueError, errors.HTTPError) as error:
        raise OSError(f"--hub={repo} cannot be written to ({short(error)}); log in with: hf auth login") from error


def check_needs(wanted: list[Need]) -> None:
    """Raise a `ConfigError` that names everything that is neither here nor on the hub, and where to get it."""
    found = []
    for need in wanted:
        if need.found is None and need.repo is None:
            source = SOURCES.get(need.path.partition("/")[0])
            advice = f"; get it from {source}" if source else f"; give a file, a folder or a hub id: {need.setting}=..."
            found.append(
                f"{need.setting}={need.path}: neither at {need.place or places(need.path)[0]} nor on the hub{advice}"
            )
    if found:
        raise ConfigError(found)
