"""Parts of a data set, from files or the hub; limits drawn with the seed, and cuts that no seed changes."""

from __future__ import annotations

import contextlib
import logging
import socket
import urllib.parse
import urllib.request
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import huggingface_hub
import torch

from structlora_pyg.checks import require, short
from structlora_pyg.study.config import DataConfig
from structlora_pyg.study.tasks.data import (
    TABLE_SUFFIXES,
    DataError,
    Row,
    find,
    needed_file,
    not_found,
    resolve,
    rows_in,
)

logger = logging.getLogger(__name__)

EVALUATION_SPLITS = ("validation", "valid", "val", "dev", "test")
EVALUATION_SHARE = 0.1  # of data that have a training part only
BROKEN_SHARE = 1e-3  # of rows that may be left out where an official file is known to be broken
CUT_SEED = 0  # of validation shares, whatever the seed of the run
T = TypeVar("T")


@dataclass(frozen=True)
class Split:
    """One part of a data set.

    Args:
        name: What errors call it.
        rows: Reads it.
        classes: Names of the classes of a column, where the data set knows them.
        is_hub: Whether it has the columns of the hub, not those of official files.
    """

    name: Path | str
    rows: Callable[[], Iterable[Row]]
    classes: Callable[[str], tuple[str, ...]] = lambda _: ()
    is_hub: bool = False

    def examples(self, make: Callable[[Row], T], broken_rows: bool = False) -> list[T]:
        """Return what `make` gives for each row; with `broken_rows` wrong ones are left out, up to one in a thousand.

        Raises:
            DataError: If a row is wrong, or there is none.
        """
        found, broken = [], []
        for row in self.rows():
            try:
                found.append(make(row))
            except DataError:
                if not broken_rows or row.line is None:
                    raise
                broken.append(row.line)
        if len(broken) > BROKEN_SHARE * len(found):
            raise DataError(
                self.name, line=broken[0], found=f"{len(broken)} of {len(found) + len(broken)} rows with wrong fields",
                expected=f"at most one in {1 / BROKEN_SHARE:.0f}",
            )  # fmt: skip
        if broken:
            logger.warning("%s: left out %d wrong rows, the first in line %d", self.name, len(broken), broken[0])
        if not found:
            raise DataError(self.name, found="no examples", expected="at least one")
        return found


def find_split(
    path: str,
    names: Sequence[Sequence[str]],
    part: int = 0,
    suffixes: Sequence[str] = TABLE_SUFFIXES,
    hub_names: Sequence[Sequence[str]] | None = None,
    config: str | None = None,
    header: Sequence[str] | None = None,
) -> Split:
    """Return a part of a data set, not read yet.

    Args:
        path: Folder with a file for each part, or hub id.
        names: Possible names of each part; the first that is there is taken.
        part: Which part.
        suffixes: Possible kinds of files, of `TABLE_SUFFIXES`.
        hub_names: Names of the parts on the hub, if they are others.
        config: Name of the hub data set's configuration.
        header: Column names of files without a header line.

    Raises:
        DataError: If the part is missing.
    """
    folder = resolve(path)
    if isinstance(folder, str):
        return _hub_split(path, (hub_names or names)[part], config)
    if folder.is_file():
        raise DataError(folder, found="a file", expected=f"a folder with {names[0][0]}{suffixes[0]}")
    files = [[name + suffix for name in some for suffix in suffixes] for some in names]
    if not find(folder, *files[0]) and any(folder.rglob("*.parquet")):  # as the hub has it
        return _hub_split(str(folder), (hub_names or names)[part], None)
    return file_split(needed_file(folder, *files[part]), header)


def file_split(file: Path, header: Sequence[str] | None = None) -> Split:
    """Return the rows of a file, by its kind; see `rows_in`."""
    return Split(file, lambda: rows_in(file, header))


def _hub_split(path: str, names: Sequence[str], config: str | None) -> Split:
    datasets = require("datasets", "study")
    logger.info("reading %s by the package datasets, from the hub if it is no folder", path)
    try:
        with quickly_offline():
            loaded = datasets.load_dataset(str(resolve(path)), config)
    except (OSError, ValueError, RuntimeError) as error:
        found = f"{not_found(path)}, and the hub said: {short(error)}"
        raise DataError(path, found=found, expected="a local path or the id of a data set") from error
    name = next((name for name in names if name in loaded), None)
    if name is None:
        raise DataError(path, found=f"the splits {', '.join(loaded)}", expected=f"a split {' or '.join(names)}")
    data, called = loaded[name], f"{path} (hub, {name})"

    def classes(column: str) -> tuple[str, ...]:
        return tuple(getattr(data.features.get(column), "names", None) or ())

    return Split(called, lambda: (Row(called, i, fields) for i, fields in enumerate(data, 1)), classes, is_hub=True)


@contextlib.contextmanager
def quickly_offline() -> Iterator[None]:
    """Let the hub client answer from its cache at once where the hub's name cannot be resolved.

    It would try again for half a minute. Behind a proxy names need not be resolved here, so nothing is changed there.
    """
    host = urllib.parse.urlsplit(huggingface_hub.constants.ENDPOINT).hostname
    kept = huggingface_hub.constants.HF_HUB_OFFLINE
    try:
        if not urllib.request.getproxies():
            socket.getaddrinfo(host, 443)
    except OSError:
        huggingface_hub.constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE = kept


def own_splits(data: DataConfig) -> list[Split]:
    """Return the training part of a user's data set, and the evaluation part if it is needed and there.

    Raises:
        DataError: If there is no training part, or the path is a file of another kind.
    """
    place = resolve(data.path)
    if isinstance(place, Path) and place.is_file():
        if not place.name.removesuffix(".gz").endswith(TABLE_SUFFIXES):
            raise DataError(place, found="another kind of file", expected=f"one of {', '.join(TABLE_SUFFIXES)}")
        return [file_split(place)]
    names = [("train",), EVALUATION_SPLITS]
    found = [find_split(data.path, names)]
    with contextlib.suppress(DataError):  # there need not be any
        found += [] if data.validation_share else [find_split(data.path, names, 1)]
    return found


def own_parts(parts: Sequence[Sequence[T]], data: DataConfig, seed: int) -> list[list[T]]:
    """Return the training and the evaluation examples of what `own_splits` gave.

    Where there is no evaluation part, `validation_share` or a tenth is held out.
    """
    if len(parts) == 1:
        parts = hold_out(parts[0], data.validation_share or EVALUATION_SHARE, data.path)
    return drawn(parts, data, seed)


def two_parts(
    read: Callable[[int], Sequence[T]], share: float, path: str, group: Callable[[T], Hashable] | None = None
) -> list[Sequence[T]]:
    """Return training and evaluation examples, which `read` gives as the parts 0 and 1.

    With a `share` > 0 evaluation is on this share cut from the training part by `hold_out`, and the other part is not
    even opened.
    """
    train = read(0)
    return [*hold_out(train, share, path, group)] if share else [train, read(1)]


def subsample(count: int, limit: int | None, seed: int) -> list[int]:
    """Return the indices, in rising order, of `limit` of `count` examples drawn with the seed; at most all.

    The same seed and numbers give the same indices on every machine.
    """
    if limit is None or limit >= count:
        return list(range(count))
    return sorted(torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:limit].tolist())


def drawn(splits: Sequence[Sequence[T]], data: DataConfig, seed: int) -> list[list[T]]:
    """Return the training and the evaluation examples that the limits or `train_fraction` leave.

    With one seed, a smaller fraction is a part of a larger one.
    """
    train, evaluated = splits
    limit = max(1, round(len(train) * data.train_fraction)) if data.train_limit is None else data.train_limit
    chosen = subsample(len(train), limit, seed)
    kept = subsample(len(evaluated), data.eval_limit, seed)
    return [[train[i] for i in chosen], [evaluated[i] for i in kept]]


def hold_out(
    items: Sequence[T], share: float, path: str, group: Callable[[T], Hashable] | None = None
) -> list[list[T]]:
    """Return a training and a held-out part, which depend on nothing but the arguments.

    Args:
        items: The examples.
        share: Part of the examples that is held out, in (0, 1).
        path: What an error calls the data.
        group: Returns the group of an example; a group stays on one side. Default: each is its own.

    Raises:
        DataError: If a part would be empty.
    """
    members: dict[Hashable, list[int]] = {}
    for i, item in enumerate(items):
        members.setdefault(group(item) if group else i, []).append(i)
    sides, chosen = list(members.values()), set[int]()
    for i in torch.randperm(len(sides), generator=torch.Generator().manual_seed(CUT_SEED)).tolist():
        if len(chosen) + len(sides[i]) <= len(items) * (1 - share) + 1e-6:  # 22 * (1 - 0.5) must not become 10
            chosen.update(sides[i])
    if not 0 < len(chosen) < len(items):
        found = f"{len(items)} training examples in {len(sides)} groups"
        raise DataError(path, found=found, expected=f"enough to hold out {share:g} of them (data.validation_share)")
    return [[items[i] for i in range(len(items)) if (i in chosen) is side] for side in (True, False)]
