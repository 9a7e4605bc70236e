"""What a comparison consists of: methods x tasks x ranks x data fractions x seeds, from one YAML file."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from structlora_pyg.checks import ConfigError, Count, CountOrZero, Positive, Rule, Section, bounds, build, nearest, read
from structlora_pyg.study.config import Fraction, RunConfig, flat, override, parse_config, put, read_yaml
from structlora_pyg.study.methods import METHODS
from structlora_pyg.study.run import run_problems

OTHERWISE = {  # keys that every run gets from the grid
    "adapter.r": "ranks",
    "adapter.seed": "seeds",
    "train.seed": "seeds",
    "train.lr": "learning_rates",
    "train.watch_every": "watch_every",
    "train.importance_examples": "importance_examples",
    "train.output_dir": "output_dir",
    "data.train_fraction": "fractions",
    "data.validation_share": "validation and tuning_share",
}
TUNING_SEED = 1000  # first seed of the runs that choose learning rates: none of those that are reported


SOME = Rule("of at least 1 item", bool)
DIFFERENT = Rule("different values, at least one", lambda values: 0 < len(values) == len(set(values)))
Rates = Annotated[list[Positive], DIFFERENT]
Entries = Annotated[dict[str, dict[str, Any]], SOME]
ENTRY = {  # what else an entry may say; all other keys are settings of its runs
    "config": str,
    "learning_rates": Rates,
    "tune": dict[str, Annotated[list[Any], SOME]],
    "unavailable": str,
}


@dataclass(kw_only=True)
class GridConfig(Section):
    """A comparison.

    Args:
        name: Name of the grid; its file in the folder of results is called so.
        title: Title of its table.
        note: What a reader of the table should know.
        baseline: Label of the method that the others are compared with; default none.
        tasks: ``{label: {config: shipped name or file, key.sub: value, ...}}``. ``learning_rates`` in it replaces those
            of the grid. ``unavailable: reason`` leaves a task's cells empty, and the table says why.
        methods: ``{label: {key.sub: value, ...}}``; ``method.name`` among them. ``learning_rates`` in it replaces those
            of the grid and of the task; ``tune: {key.sub: [value, ...]}`` is chosen together with the rate.
        ranks: Values of ``adapter.r``; ``adapter.lora_alpha`` keeps its ratio to it.
        fractions: Values of ``data.train_fraction``, in (0, 1].
        seeds: Number of runs, >= 1: seeds 0, 1, ... of data order, head, start and noise.
        settings: ``{key.sub: value}`` for every run.
        learning_rates: What every method chooses from; a single one is taken as it is.
        tuning_seeds: Runs a learning rate for the choice, >= 1, with the seeds from 1000 on.
        tuning_share: Part of train that the choice is made on and that those runs do not train on, in (0, 1).
        validation: Score every run on that part instead of the evaluation split: for choosing settings.
        watch_every: ``train.watch_every`` of the methods that have LoRA updates.
        importance_examples: ``train.importance_examples`` of the methods with a filter, at the first seed only.
    """

    name: str = "grid"
    title: str = ""
    note: str = ""
    baseline: str | None = None
    tasks: Entries = field(default_factory=dict)
    methods: Entries = field(default_factory=dict)
    ranks: Annotated[list[Count], DIFFERENT] = field(default_factory=lambda: [8])
    fractions: Annotated[list[Fraction], DIFFERENT] = field(default_factory=lambda: [1.0])
    seeds: Count = 5
    settings: dict[str, Any] = field(default_factory=dict)
    learning_rates: Rates = field(default_factory=lambda: [5e-4])
    tuning_seeds: Count = 1
    tuning_share: Annotated[float, bounds(0, 1, open_low=True, open_high=True)] = 0.2
    validation: bool = False
    watch_every: CountOrZero = 0
    importance_examples: CountOrZero = 0

    def conflicts(self) -> list[str]:
        """Return what does not go together, empty if all does; every run is built, none is made."""
        found: list[str] = []
        for kind, entries in (("tasks", self.tasks), ("methods", self.methods)):
            for label, entry in entries.items():
                given = {"config": None, **entry} if kind == "tasks" else entry
                places = {key: f"{kind}.{label}.{key}" for key in ENTRY if key in given}
                found += [p for key, place in places.items() for p in read(given[key], ENTRY[key], place)[1]]
        if found:
            return found
        if not self.name or "/" in self.name or self.name.startswith("."):
            found.append(f"name={self.name!r} becomes the name of a file; leave slashes and leading dots out")
        if self.baseline is not None and self.baseline not in self.methods:
            found.append(f"baseline={self.baseline!r} is none of the methods.{nearest(self.baseline, self.methods)}")
        said: dict[str, list[str]] = {}  # where, by problem
        ready = self.available_tasks()
        for task, rank, method in itertools.product(self.tasks, self.ranks, self.methods):
            try:
                check = run_problems if task in ready else None
                cell = Cell(method, task, rank, self.fractions[0], 0)
                for tuned in {str(choice.tuned): choice.tuned for choice in self.choices(task, method)}.values():
                    self.run(cell, 1e-4, tuned, check=check)
            except ConfigError as error:
                for problem in error.problems:
                    said.setdefault(problem, []).append(f"{method} on {task}, rank {rank}")
        return found + [f"{at[0]}{f' and {len(at) - 1} more' if at[1:] else ''}: {p}" for p, at in said.items()]

    def cells(self) -> list[Cell]:
        """Return every run of the table; seeds are the outermost loop, so that an unfinished grid is even."""
        axes = itertools.product(range(self.seeds), self.tasks, self.ranks, self.fractions, self.methods)
        return [Cell(method, task, rank, fraction, seed) for seed, task, rank, fraction, method in axes]

    def available_tasks(self) -> list[str]:
        """Return the labels of the tasks that are not known to be unavailable."""
        return [task for task, entry in self.tasks.items() if "unavailable" not in entry]

    def tuning_trials(self) -> Iterator[Trial]:
        """Yield the runs that choose learning rates, if there are several: first rank, largest fraction, own seeds."""
        for seed in range(TUNING_SEED, TUNING_SEED + self.tuning_seeds):
            for task, method in itertools.product(self.available_tasks(), self.methods):
                choices = self.choices(task, method)
                for choice in choices if len(choices) > 1 else ():
                    yield self.trial(Cell(method, task, self.ranks[0], max(self.fractions), seed), choice, tuning=True)

    def choices(self, task: str, method: str) -> list[Choice]:
        """Return what a method chooses from on a task."""
        places = (self.methods[method], self.tasks[task], {"learning_rates": self.learning_rates})
        rates = next(p["learning_rates"] for p in places if "learning_rates" in p)
        tune = self.methods[method].get("tune", {})
        combinations = itertools.product(rates, *tune.values())
        return [Choice(float(lr), dict(zip(tune, values, strict=True))) for lr, *values in combinations]

    def trial(self, cell: Cell, choice: Choice, tuning: bool = False) -> Trial:
        """Return the run of a place in the table with what was chosen for it; see `run`."""
        return Trial(self.run(cell, *choice, tuning), cell, choice)

    def run(
        self,
        cell: Cell,
        lr: float,
        tuned: Mapping[str, Any] | None = None,
        tuning: bool = False,
        check: Callable[[RunConfig], list[str]] | None = None,
    ) -> RunConfig:
        """Return the configuration of one run; ``train.output_dir`` is still open.

        Args:
            cell: Place in the table.
            lr: Learning rate.
            tuned: Further settings, see `choices`.
            tuning: Score on a part cut from train.
            check: Returns more problems.

        Raises:
            ConfigError: With every problem of the settings.
        """
        entry = self.tasks[cell.task]
        tree, found = read_yaml(entry["config"]), list[str]()
        for settings in (entry, self.settings, self.methods[cell.method], tuned or {}):
            for key, value in flat({k: v for k, v in settings.items() if k not in ENTRY}).items():
                found += put(tree, str(key), copy.deepcopy(value))
        config, more = build(RunConfig, tree)
        if config is None:
            raise ConfigError([*found, *more])
        adapter, data, train = config.adapter, config.data, config.train
        scaled = adapter.lora_alpha / adapter.r * cell.rank
        adapter.r, adapter.lora_alpha = cell.rank, int(scaled) if scaled == int(scaled) else scaled
        data.train_fraction = float(cell.fraction)
        if tuning or self.validation:
            data.validation_share = self.tuning_share
        train.lr, train.seed, adapter.seed = lr, cell.seed, cell.seed
        if (kind := METHODS.get(config.method.name)) is not None:
            train.watch_every = self.watch_every if kind.has_updates and not tuning else 0
            measured = kind.is_structlora and cell.seed == 0 and not tuning
            train.importance_examples = self.importance_examples if measured else 0
        if found := list(dict.fromkeys([*found, *more, *(check(config) if check else [])])):
            raise ConfigError(found)
        return config


class Cell(NamedTuple):
    """Place of a run in a table: labels of method and task, rank, data fraction, seed."""

    method: str
    task: str
    rank: int
    fraction: float
    seed: int


class Choice(NamedTuple):
    """What a method may run with: a learning rate, and settings of ``tune``."""

    lr: float
    tuned: dict[str, Any]


class Trial(NamedTuple):
    """A run that may have to be made: its configuration, its place in the table, and what it may be chosen for."""

    config: RunConfig
    cell: Cell
    choice: Choice


def load_grid(path: str | Path, overrides: Sequence[str] = (), size: str | None = None) -> GridConfig:
    """Build a `GridConfig` from a YAML file and ``key=value`` overrides; an empty task or method is taken away.

    Args:
        path: YAML file with the fields of `GridConfig` and, if it likes, ``sizes: {name: {field: value}}``.
        overrides: Strings ``key=value``; the value is read as YAML.
        size: One of ``sizes``. Its fields replace those of the grid; ``tasks``, ``methods`` and ``settings`` entry by
            entry. The grid is then called ``<name>-<size>``.

    Raises:
        ConfigError: With every problem found, those of every run included.
    """
    tree, found = read_yaml(path, shipped=False), list[str]()
    sizes = tree.pop("sizes", {})
    if not isinstance(sizes, dict) or not all(isinstance(fields, dict) for fields in sizes.values()):
        raise ConfigError(f"sizes: got {sizes!r}, expected {{name: {{field: value}}}}")
    tree.setdefault("name", Path(path).stem)
    if size is not None and size not in sizes:
        known = f"known: {', '.join(sizes)}" if sizes else "this grid has none"
        found.append(f"size={size!r} is unknown; {known}.{nearest(size, sizes)}")
    elif size is not None:
        tree["name"] = f"{tree['name']}-{size}"
        for key, value in sizes[size].items():
            both = isinstance(value, Mapping) and isinstance(tree.get(key), Mapping)
            tree[key] = {**tree[key], **value} if both else value
    for item in overrides:
        found += override(tree, item)
    for key in ("tasks", "methods"):
        if isinstance(tree.get(key), Mapping):
            tree[key] = {label: entry for label, entry in tree[key].items() if entry is not None}
    grid, more = parse_config(GridConfig, tree)
    found += _set_by_the_grid(tree)
    if found or more:
        raise ConfigError(found + more)
    return grid


def _set_by_the_grid(tree: Mapping[str, Any]) -> list[str]:
    """Return a problem for every setting that would be overwritten."""
    sections = {"settings": tree.get("settings")}
    for kind in ("tasks", "methods"):
        entries = tree.get(kind)
        sections |= {f"{kind}.{k}": v for k, v in entries.items()} if isinstance(entries, Mapping) else {}
    return [
        f"{place}: {key} has no effect, every run gets it from the grid; use {OTHERWISE[key]}"
        for place, section in sections.items()
        if isinstance(section, Mapping)
        for key in map(str, flat(section))
        if key in OTHERWISE
    ]
