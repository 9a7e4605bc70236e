"""What a run, a grid and a line of a training log hold: the schema of the files that reports are made from.

The reader owns the schema and the writers import it. Numbers that may be undefined are null. Entries that are not
listed are allowed and kept, so that a later version can add some.
"""

from __future__ import annotations

import reprlib
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError, model_validator

SCHEMA = 1  # version of the files of grids and runs
Number = float | None
Key = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{16}$")]  # the name of a run's file


class Schema(BaseModel):
    """An object with at least these entries, of exactly these types (an int may stand for a float)."""

    model_config = ConfigDict(strict=True, extra="allow")


class Structure(Schema):
    """How alike the adapters' updates are, see `structlora_pyg.analysis`; all numbers null where they are undefined."""

    adjacent_cosine: Number = None
    drift_energy: Number = None
    relative_drift: Number = None
    gradient_cosine: Number = None
    open_gates: Number = None
    mean_gate: Number = None
    dirichlet: list[Number] | None = None


class Losses(Schema):
    """The loss of a step, whole and in its parts."""

    loss: Number
    task: Number
    auxiliary: Number


class Line(Schema):
    """A line of ``metrics.jsonl``: a step, a look at the structure, or an evaluation."""

    step: int
    epoch: Number = None
    loss: Number = None
    task: Number = None
    auxiliary: Number = None
    grad_norm: Number = None
    lr: Number = None
    seconds: Number = None
    structure: Structure | None = None
    evaluation: dict[str, Number] | None = None


class Look(Structure):
    """The structure at a step."""

    step: int


class Curves(Schema):
    """How a run developed: the loss at some steps, and the structure at others."""

    step: list[int]
    loss: list[Number]
    structure: list[Look]


class FinalStructure(Structure):
    """The structure of the exported adapter: cosines between all pairs of adapters, in the order of the names."""

    names: list[str]
    similarity: list[list[float]]

    @model_validator(mode="after")
    def _is_square(self) -> FinalStructure:
        count = len(self.names)
        if len(self.similarity) != count or any(len(row) != count for row in self.similarity):
            raise ValueError(f"its 'structure.similarity' has another size than its {count} names")
        return self


class Gates(Schema):
    """Gates at the end: the share that is open, their mean, and one row of values per adapter."""

    open: Number
    mean: Number
    values: list[list[float]]


class Parameters(Schema):
    """Numbers of parameters: trained in the adapter, in heads, existing in training only, and in the base model."""

    adapter: int
    heads: int
    training_only: int
    base: int


class Seconds(Schema):
    """Times of a run."""

    per_step_median: Number
    training: float
    total: Number = None


class Results(Schema):
    """``results.json``: what a finished run leaves."""

    method: str
    metric: str
    higher_is_better: bool
    metrics: dict[str, Number]
    steps: int
    parameters: Parameters
    losses: dict[str, Losses] | None = None
    seconds: Seconds
    peak_memory_bytes: int | None
    curves: Curves
    structure: FinalStructure | None
    gates: Gates | None
    importance: dict[str, Number] | None
    export: dict[str, Number]
    device: str
    processes: int
    versions: dict[str, str]
    config: dict[str, Any]
    config_hash: str | None = None
    alarms: list[str] = []

    @model_validator(mode="after")
    def _has_its_metric(self) -> Results:
        if self.metric not in self.metrics:
            raise ValueError(f"its metric {self.metric!r} is not among its metrics {sorted(self.metrics)}")
        return self


class Run(Schema):
    """``runs/<key>.json``, done or failed: where it stands in a comparison."""

    key: Key
    status: str
    reason: str | None = None
    method: str
    task: str
    rank: int
    fraction: float
    seed: int
    lr: float


class StoredRun(Run):
    """A run that can be found by its configuration."""

    config: dict[str, Any]


class FinishedRun(Results, Run):
    """A run with what it gave."""


class Cell(Schema):
    """A place in a grid: the key of its run, or why there is none."""

    method: str
    task: str
    rank: int
    fraction: float
    seed: int
    key: Key | None
    why: str | None = None


class Grid(Schema):
    """``grids/<name>.json``: the rows and columns of a table, and which run stands where."""

    name: str
    title: str
    note: str | None = None
    paper: Literal["table1", "table2", "table3", "table4", "table5"] | None = None
    baseline: str | None = None
    validation: bool = False
    methods: list[str]
    tasks: list[str]
    ranks: list[int]
    fractions: list[float]
    seeds: list[int]
    cells: list[Cell]


def misfit(data: Any, schema: type[Schema]) -> str | None:
    """Return the first thing in which `data` is not as `schema` says; None if all is well."""
    try:
        schema.model_validate(data)
        return None
    except ValidationError as error:
        found = error.errors(include_url=False)[0]
    if found["type"] == "value_error":
        return found["msg"].removeprefix("Value error, ")
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in found["loc"]).removeprefix(".")
    if found["type"] == "missing":
        return f"it has no {place!r}"
    said = found["msg"][:1].lower() + found["msg"][1:]
    return f"its {place!r} is {reprlib.repr(found['input'])}: {said}" if place else said
