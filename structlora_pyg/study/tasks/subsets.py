"""Which examples are used: limits and fractions drawn with the seed, and cuts that no seed changes."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch

from structlora_pyg.study.tasks.rows import DataError

CUT_SEED = 0  # of validation shares and of BoolQ without train.jsonl, whatever the seed of the run


def subsample(count: int, limit: int | None, seed: int, name: str = "limit") -> list[int]:
    """Return the indices, in rising order, of `limit` of `count` examples drawn with the seed; all if it is None.

    Args:
        count: Number of examples there are.
        limit: Number of examples wanted.
        seed: The same seed and numbers give the same indices on every machine.
        name: Name of the setting, for the error.

    Raises:
        DataError: If more are wanted than there are; such a limit would have no effect.
    """
    if limit is None:
        return list(range(count))
    if limit > count:
        raise DataError(name, found=f"{limit}", expected=f"at most the {count} examples there are; lower or remove it")
    drawn = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:limit]
    return sorted(drawn.tolist())


def fraction(count: int, share: float, seed: int) -> list[int]:
    """Return the indices, in rising order, of a share of `count` examples drawn uniformly with the seed.

    Args:
        count: Number of examples there are.
        share: Part of them wanted, in (0, 1]; the number is rounded, and at least 1.
        seed: With one seed and number, a smaller share is a part of a larger one.
    """
    return subsample(count, max(1, round(count * share)), seed)


def cut(groups: Sequence[Hashable], share: float) -> tuple[list[int], list[int]]:
    """Return the indices of a training and a held-out part, which depend on nothing but the arguments.

    Args:
        groups: The group of every example; a group stays on one side.
        share: Part of the examples that is held out, in (0, 1).
    """
    members: dict[Hashable, list[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)
    order = torch.randperm(len(members), generator=torch.Generator().manual_seed(CUT_SEED)).tolist()
    sides = list(members.values())
    train: list[int] = []
    for i in order:
        # A little slack: 22 * (1 - 0.5) must not become 10.
        if len(train) + len(sides[i]) <= len(groups) * (1 - share) + 1e-6:
            train += sides[i]
    chosen = set(train)
    return sorted(train), [i for i in range(len(groups)) if i not in chosen]


def checked_cut(groups: Sequence[Hashable], share: float, path: str) -> tuple[list[int], list[int]]:
    """Return the parts of `cut`; raise if one of them is empty, naming the path of the data."""
    train, held_out = cut(groups, share)
    if not train or not held_out:
        raise DataError(
            path, found=f"{len(groups)} training examples", expected=f"enough to cut validation_share={share:g} from"
        )
    return train, held_out
