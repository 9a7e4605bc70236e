"""What happened to the edges while a model trained: the first graph, and the difference at every refresh."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Edge = tuple[int, int]
PAGE = 1 << 16


@dataclass(frozen=True, kw_only=True)
class EdgeChange:
    """The difference of two graphs that follow each other in time.

    Attributes:
        step: Optimizer steps done when the later one was first used.
        added: New edges (source, target), sorted.
        removed: Lost edges, sorted.
        kept: Number of edges that stayed.
        weight_change: Mean absolute change of the weights of edges that stayed; summed where entries were merged.
    """

    step: int
    added: list[Edge]
    removed: list[Edge]
    kept: int
    weight_change: float


class EdgeLog(nn.Module):
    """Records edges as differences; part of a model's state, so that it goes on after a checkpoint.

    Args:
        limit: Most entries held, >= 2. Beyond it neighbours are merged two by two, which `replay` does not notice.

    Attributes:
        changes: The differences, oldest first.
    """

    def __init__(self, limit: int = 512) -> None:
        super().__init__()
        self.limit = limit
        self.changes: list[EdgeChange] = []
        self._first_step = -1
        self._first: list[Edge] = []
        self._weights: dict[Edge, float] = {}  # of the last graph

    @property
    def last_step(self) -> int:
        """Step of the newest entry; -1 before the first."""
        return self.changes[-1].step if self.changes else self._first_step

    def record(self, step: int, edge_index: Tensor, edge_weight: Tensor | None = None) -> None:
        """Compare a graph with the one recorded before.

        Args:
            step: Optimizer steps done.
            edge_index: (2, E).
            edge_weight: (E,); None: all 1.
        """
        pairs = [(i, j) for i, j in edge_index.T.tolist()]
        values = [1.0] * len(pairs) if edge_weight is None else edge_weight.detach().tolist()
        before, now = self._weights, dict(zip(pairs, values, strict=True))
        self._weights = now
        if self._first_step < 0:
            self._first_step, self._first = step, sorted(now)
            return
        kept = before.keys() & now.keys()
        moved = sum(abs(now[e] - before[e]) for e in sorted(kept)) / max(len(kept), 1)
        change = EdgeChange(
            step=step,
            added=sorted(now.keys() - before.keys()),
            removed=sorted(before.keys() - now.keys()),
            kept=len(kept),
            weight_change=moved,
        )
        self.changes.append(change)
        if len(self.changes) > self.limit:
            pairs_of = zip(self.changes[::2], self.changes[1::2], strict=False)
            odd = self.changes[-1:] if len(self.changes) % 2 else []
            self.changes = [_merge(a, b) for a, b in pairs_of] + odd

    def replay(self, step: int | None = None) -> Tensor:
        """Return the edges (2, E), sorted, after a number of optimizer steps; default: the last ones recorded."""
        edges = set(self._first)
        for change in self.changes:
            if step is None or change.step <= step:
                edges = (edges - set(change.removed)) | set(change.added)
        return torch.tensor(sorted(edges), dtype=torch.long).view(-1, 2).T

    def to_dict(self) -> dict[str, Any]:
        """Return ``step`` and ``edges`` of the first graph and ``changes``, as plain values."""
        changes = [{**vars(c), "added": _plain(c.added), "removed": _plain(c.removed)} for c in self.changes]
        return {"step": self._first_step, "edges": _plain(self._first), "changes": changes}

    def get_extra_state(self) -> Tensor:
        """Return everything as bytes, for ``state_dict``: safetensors holds nothing but tensors."""
        text = json.dumps({**self.to_dict(), "weights": [[*e, w] for e, w in self._weights.items()]})
        # In whole pages: for every new size of a tensor safetensors makes a type of ctypes, and that stays.
        padded = text.ljust(-len(text) // PAGE * -PAGE)
        return torch.frombuffer(bytearray(padded.encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Restore what `get_extra_state` returned.

        Raises:
            ValueError: If it is something else.
        """
        try:
            found = json.loads(state.cpu().numpy().tobytes())
            first = [(i, j) for i, j in found["edges"]]
            weights = {(i, j): w for i, j, w in found["weights"]}
            changes = [
                EdgeChange(**{**c, **{k: [(i, j) for i, j in c[k]] for k in ("added", "removed")}})
                for c in found["changes"]
            ]
            self._first_step, self._first, self._weights, self.changes = found["step"], first, weights, changes
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError("the edge log of this state is damaged; use another checkpoint") from error

    def extra_repr(self) -> str:
        """Count the entries."""
        return f"changes={len(self.changes)}"


def _plain(edges: list[Edge]) -> list[list[int]]:
    """Return lists in the place of edges, as JSON would."""
    return [list(edge) for edge in edges]


def _merge(a: EdgeChange, b: EdgeChange) -> EdgeChange:
    """Return the difference that `a` and then `b` make."""
    added = (set(a.added) - set(b.removed)) | (set(b.added) - set(a.removed))
    removed = (set(a.removed) - set(b.added)) | (set(b.removed) - set(a.added))
    return EdgeChange(
        step=b.step,
        added=sorted(added),
        removed=sorted(removed),
        kept=a.kept + len(a.removed) - len(removed),
        weight_change=a.weight_change + b.weight_change,
    )
