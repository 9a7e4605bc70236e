"""What the subcommands of ``structlora`` take besides a configuration; ``--help`` prints these docstrings."""

from __future__ import annotations

import builtins
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal


@dataclass(kw_only=True)
class DemoOptions:
    """Options of ``demo``.

    Args:
        output_dir: Folder for the report and the runs; a demo that was interrupted goes on where it stopped.
        seeds: Number of paired seeds, >= 2.
        quick: Two seeds and few steps, to see that everything works.
    """

    output_dir: str = "runs/demo"
    seeds: int = 5
    quick: bool = False

    def problems(self) -> list[str]:
        """Return every problem of the values."""
        found = [] if self.seeds >= 2 else [f"seeds must be >= 2 for a paired comparison, got {self.seeds}"]
        if self.quick and self.seeds != DemoOptions.seeds:
            found.append(f"seeds={self.seeds} has no effect with quick=true, which runs 2; leave one of them out")
        return found


@dataclass(kw_only=True)
class TrainOptions:
    """Options of ``train``.

    Args:
        resume: Continue the run in train.output_dir from its newest checkpoint.
    """

    resume: bool = False

    def problems(self) -> list[str]:
        """Return every problem of the values."""
        return []


@dataclass(kw_only=True)
class ValidateOptions:
    """Options of ``validate``: none."""

    def problems(self) -> list[str]:
        """Return every problem of the values."""
        return []


@dataclass(kw_only=True)
class DescribeOptions:
    """Options of ``describe``.

    Args:
        graph: File to draw the adapter graph to (.svg, .png or .pdf).
    """

    graph: str | None = None

    def problems(self) -> list[str]:
        """Return every problem of the values."""
        return _drawable("graph", self.graph)


@dataclass(kw_only=True)
class ExportOptions:
    """Options of ``export``.

    Args:
        checkpoint: A checkpoint folder of ``train``; its run gives the configuration.
        output: Folder to write to.
        merge: Write the base model with merged weights instead of an adapter.
        ragged: Write each layer at the rank its open gates leave.
        trust_remote_code: Import what the run's configuration names by dotted path, such as your own convolution.
    """

    checkpoint: str = ""
    output: str = ""
    merge: bool = False
    ragged: bool = False
    trust_remote_code: bool = False

    def problems(self) -> list[str]:
        """Return every problem of the values."""
        found = [
            f"{name} is missing; give {name}=folder" for name in ("checkpoint", "output") if not getattr(self, name)
        ]
        if self.merge and self.ragged:
            found.append("ragged has no effect with merge=true; leave one out")
        return found


@dataclass(kw_only=True)
class InspectOptions:
    """Options of ``inspect``.

    Args:
        adapter: A LoRA folder of PEFT; may be given without ``adapter=``.
        graph: File to draw the adapter graph to (.svg, .png or .pdf).
        similarity: File to draw the similarities of the layers to (.svg, .png or .pdf).
        html: File for one page with table and drawings (.html).
    """

    adapter: str = ""
    graph: str | None = None
    similarity: str | None = None
    html: str | None = None

    def problems(self) -> list[str]:
        """Return every problem of the values."""
        found = [] if self.adapter else ["no folder given: structlora inspect path/to/adapter"]
        if self.html is not None and Path(self.html).suffix != ".html":
            found.append(f"html={self.html!r} must end in .html")
        return found + [p for n in ("graph", "similarity") for p in _drawable(n, getattr(self, n))]


@dataclass(kw_only=True)
class LookOptions:
    """Options of ``look``.

    Args:
        run: Folder of a finished or running ``train``; may be given without ``run=``.
        output_dir: Folder for look.html and figures; default: the run's.
    """

    run: str = ""
    output_dir: str | None = None

    def problems(self) -> list[str]:
        """Return every problem of the values."""
        return [] if self.run else ["no folder given: structlora look runs/x"]


@dataclass(kw_only=True)
class ConvsOptions:
    """Options of ``convs``.

    Args:
        json: Print JSON, for programs.
    """

    json: bool = False

    def problems(self) -> list[str]:
        """Return every problem of the values."""
        return []


@dataclass(kw_only=True)
class CompareOptions:
    """Options of ``compare``.

    Args:
        output_dir: Folder of results; comparisons and processes, on any machines, may share it.
        size: One of the sizes that the grid comes in, for instance mini; default: as it stands.
        jobs: Runs side by side, >= 1.
        list: Name every method and task in a line, and run nothing.
        json: The same as JSON, for programs.
    """

    output_dir: str = "runs/compare"
    size: str | None = None
    jobs: int = 1
    list: bool = False
    json: bool = False

    def problems(self) -> builtins.list[str]:
        """Return every problem of the values."""
        found = [] if self.jobs >= 1 else [f"jobs must be >= 1, got {self.jobs}"]
        if self.json and not self.list:
            found.append("json has no effect without list")
        return found


@dataclass(kw_only=True)
class AblateOptions:
    """Options of ``ablate``.

    Args:
        seeds: Runs a row, >= 1, with the seeds 0, 1, ...; rows are compared seed by seed.
        list_mode: product: a row for every combination of values. list: one key changed at a time.
        controls: Add what a gain has to be told from: LoRA, no filter, no coordinator, no edges, random edges,
            shuffled nodes, a frozen coordinator, a perceptron of the same size without messages.
        learning_rates: What every row chooses from on a part cut from train; default: train.lr for all rows.
        output_dir: Folder of runs and report; comparisons and processes may share it, and then share runs.
        jobs: Runs side by side, >= 1.
        dry_run: Name the rows and what they change, and run nothing.
    """

    seeds: int = 5
    list_mode: Literal["product", "list"] = "product"
    controls: bool = False
    learning_rates: list[Any] = field(default_factory=list)
    output_dir: str = "runs/ablate"
    jobs: int = 1
    dry_run: bool = False

    def problems(self) -> list[str]:
        """Return every problem of the values."""
        found = [f"{n} must be >= 1, got {getattr(self, n)}" for n in ("seeds", "jobs") if getattr(self, n) < 1]
        try:
            self.learning_rates = [float(rate) for rate in self.learning_rates]  # YAML reads 1e-3 as text
        except (TypeError, ValueError):
            found.append(f"learning_rates must be a list of numbers such as [1e-3,3e-3], got {self.learning_rates}")
        return found


@dataclass(kw_only=True)
class ReportOptions:
    """Options of ``report``.

    Args:
        folders: Folders of results of ``compare``; may be given without ``folders=``.
        output_dir: Folder for report.html, report.md, report.tex and figures; default: the first folder.
    """

    folders: list[str] = field(default_factory=list)
    output_dir: str | None = None

    def problems(self) -> list[str]:
        """Return every problem of the values."""
        return [] if self.folders else ["no folder given: structlora report runs/compare"]


def _drawable(name: str, file: str | None) -> list[str]:
    good = file is None or Path(file).suffix in (".svg", ".png", ".pdf")
    return [] if good else [f"{name}={file!r} must end in .svg, .png or .pdf"]
