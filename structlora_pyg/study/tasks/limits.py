"""Which examples of a data set are used: its parts, limits drawn with the seed, and cuts that no seed changes."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TypeVar

import torch

from structlora_pyg.study.config import DataConfig
from structlora_pyg.study.tasks.data import TABLE_SUFFIXES, DataError, Split, file_split, find_splits, resolve

EVALUATION_SPLITS = ("validation", "valid", "val", "dev", "test")
EVALUATION_SHARE = 0.1  # of data that have a training part only
CUT_SEED = 0  # of validation shares, whatever the seed of the run
T = TypeVar("T")


def own_splits(data: DataConfig) -> list[Split]:
    """Return the training part of a user's data set, and the evaluation part if it is needed and there.

    Raises:
        DataError: If there is no training part, or the path is a file of another kind.
    """
    place = resolve(data.path)
    if place is not None and place.is_file():
        if not place.name.removesuffix(".gz").endswith(TABLE_SUFFIXES):
            raise DataError(place, found="another kind of file", expected=f"one of {', '.join(TABLE_SUFFIXES)}")
        return [file_split(place)]
    parts = [("train",), EVALUATION_SPLITS]
    return find_splits(data.path, parts[: 1 if data.validation_share else 2], last_is_optional=True)


def own_parts(parts: Sequence[Sequence[T]], data: DataConfig, seed: int) -> list[list[T]]:
    """Return the training and the evaluation examples of what `own_splits` gave.

    Where there is no evaluation part, `validation_share` or a tenth is held out.
    """
    if len(parts) == 1:
        parts = hold_out(parts[0], data.validation_share or EVALUATION_SHARE, data.path)
    return drawn(parts, data, seed)


def subsample(count: int, limit: int | None, seed: int, name: str = "limit") -> list[int]:
    """Return the indices, in rising order, of `limit` of `count` examples drawn with the seed; all if it is None.

    The same seed and numbers give the same indices on every machine.

    Raises:
        DataError: If more are wanted than there are, as such a limit would have no effect; it calls the limit `name`.
    """
    if limit is None:
        return list(range(count))
    if limit > count:
        raise DataError(name, found=f"{limit}", expected=f"at most the {count} examples there are; lower or remove it")
    return sorted(torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:limit].tolist())


def drawn(splits: Sequence[Sequence[T]], data: DataConfig, seed: int) -> list[list[T]]:
    """Return the training and the evaluation examples that the limits or `train_fraction` leave.

    With one seed, a smaller fraction is a part of a larger one.

    Raises:
        DataError: If a limit asks for more than there are.
    """
    train, evaluated = splits
    limit = max(1, round(len(train) * data.train_fraction)) if data.train_limit is None else data.train_limit
    chosen = subsample(len(train), limit, seed, "data.train_limit")
    kept = subsample(len(evaluated), data.eval_limit, seed, "data.eval_limit")
    return [[train[i] for i in chosen], [evaluated[i] for i in kept]]


def hold_out(items: Sequence[T], share: float, path: str, groups: Sequence[Hashable] | None = None) -> list[list[T]]:
    """Return a training and a held-out part, which depend on nothing but the arguments.

    Args:
        items: The examples.
        share: Part of the examples that is held out, in (0, 1).
        path: What an error calls the data.
        groups: The group of every example; a group stays on one side. Default: each is its own.

    Raises:
        DataError: If a part would be empty.
    """
    members: dict[Hashable, list[int]] = {}
    for i, group in enumerate(range(len(items)) if groups is None else groups):
        members.setdefault(group, []).append(i)
    sides, chosen = list(members.values()), set[int]()
    for i in torch.randperm(len(sides), generator=torch.Generator().manual_seed(CUT_SEED)).tolist():
        if len(chosen) + len(sides[i]) <= len(items) * (1 - share) + 1e-6:  # 22 * (1 - 0.5) must not become 10
            chosen.update(sides[i])
    if not 0 < len(chosen) < len(items):
        found = f"{len(items)} training examples in {len(sides)} groups"
        raise DataError(path, found=found, expected=f"enough to hold out {share:g} of them (data.validation_share)")
    return [[items[i] for i in range(len(items)) if (i in chosen) is side] for side in (True, False)]
