"""Adapter graphs over training as a PyG dataset.

A folder of graphs holds ``raw/graph-<step>.pt``, one file per step, and ``raw/names.json``, the names of the nodes.
Everything is read with ``weights_only=True``.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch_geometric.data import Data, InMemoryDataset

from structlora_pyg.checks import replace_file, short

NAMES_FILE = "names.json"


class AdapterGraphDataset(InMemoryDataset):
    """Adapter graphs over training, one `torch_geometric.data.Data` per recorded step, in the order of the steps.

    ``structlora train train.record_every=N`` and `GraphRecorder` write such folders; `from_graphs` makes one of graphs
    from elsewhere. The graphs are those of `GraphRecorder`. It is a PyG dataset like any other: indexing, slicing,
    ``DataLoader``, transforms. Graphs are small, so the files of the steps are read anew each time, and no processed
    file can be out of date.

    Args:
        root: The folder, for instance ``runs/x/graphs``.
        transform: Applied to a graph at every access.
        pre_transform: Applied to every graph once, when it is read.
        pre_filter: Says which graphs are kept.

    Attributes:
        node_names: Names of the N nodes, the same in every graph; empty if they are not known.

    Raises:
        FileNotFoundError: If the folder holds no graphs.
        ValueError: If a file is damaged, or graphs do not have the same attributes.
    """

    def __init__(
        self,
        root: str | Path,
        transform: Callable | None = None,
        pre_transform: Callable | None = None,
        pre_filter: Callable | None = None,
    ) -> None:
        files = graph_files(Path(root))
        if not files:
            raise FileNotFoundError(
                f"{root} holds no adapter graphs; structlora train train.record_every=10 writes them to <run>/graphs"
            )
        super().__init__(str(root), transform, pre_transform, pre_filter, log=False)
        self.node_names = _read_names(Path(root))
        graphs = [_read(file) for file in files]
        _same_attributes([str(file) for file in files], graphs)
        if pre_filter is not None:
            graphs = [graph for graph in graphs if pre_filter(graph)]
        if pre_transform is not None:
            graphs = [pre_transform(graph) for graph in graphs]
        if not graphs:
            raise ValueError(f"pre_filter keeps none of the {len(files)} graphs in {root}")
        self.data, self.slices = self.collate(graphs)

    @classmethod
    def from_graphs(cls, graphs: Sequence[Data], root: str | Path, **kwargs: Any) -> AdapterGraphDataset:
        """Write graphs to a new folder and return its dataset.

        Args:
            graphs: Graphs of the same nodes, such as `StructLoraModel.adapter_graph` returns, each with its own
                ``step``. The ``name`` of the first becomes `node_names`.
            root: A folder that holds no graphs yet.
            **kwargs: Arguments of the class.

        Raises:
            FileExistsError: If the folder holds graphs.
            ValueError: No graph; graphs without a step, with the same step, or with different attributes.
        """
        root = Path(root)
        if graph_files(root):
            raise FileExistsError(f"{root} holds adapter graphs already; choose another folder")
        if not graphs:
            raise ValueError("graphs is empty; give at least one")
        if lacking := [k for k, graph in enumerate(graphs) if "step" not in graph]:
            raise ValueError(f"graph {lacking[0]} has no step; set graph.step to the optimizer steps taken")
        steps = [int(graph.step) for graph in graphs]
        if len(set(steps)) < len(steps):
            raise ValueError(f"every graph needs a step of its own; got {steps}")
        plain = [_without_name(graph, step) for graph, step in zip(graphs, steps, strict=True)]
        _same_attributes([f"graph {k}" for k in range(len(plain))], plain)
        if "name" in graphs[0]:
            write_names(root, graphs[0].name)
        for graph in plain:
            write_graph(root, graph)
        return cls(root, **kwargs)

    @property
    def steps(self) -> list[int]:
        """Finished optimizer steps at each graph."""
        return [int(self.get(i).step) for i in self.indices()]


def graph_files(root: Path) -> list[Path]:
    """Return the files of the steps, in the order of the steps."""
    found = [file for file in (root / "raw").glob("graph-*.pt") if re.fullmatch(r"graph-\d+", file.stem)]
    return sorted(found, key=step_of)


def step_of(file: Path) -> int:
    """Return the optimizer step that a file of `graph_files` belongs to."""
    return int(file.stem.removeprefix("graph-"))


def write_graph(root: Path, graph: Data) -> None:
    """Write a graph, with ``step`` (1,), into a folder."""
    buffer = io.BytesIO()
    torch.save(graph.to_dict(), buffer)
    replace_file(root / "raw" / f"graph-{int(graph.step):08d}.pt", buffer.getvalue())


def write_names(root: Path, names: Sequence[str]) -> None:
    """Write the names of the nodes into a folder of graphs."""
    replace_file(root / "raw" / NAMES_FILE, json.dumps(list(names)) + "\n")


def _read_names(root: Path) -> list[str]:
    file = root / "raw" / NAMES_FILE
    if not file.is_file():
        return []
    try:
        return [str(name) for name in json.loads(file.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{file} cannot be read ({short(error)}); delete it to do without names") from error


def _read(file: Path) -> Data:
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises anything on a damaged file
        raise ValueError(f"{file} is damaged ({short(error, 150)}); delete it to do without this step") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds no adapter graph; delete it to do without this step")
    return Data.from_dict(content)


def plain_tensor(tensor: Tensor) -> Tensor:
    """Return a copy on the CPU, detached, in float32 where it is a floating-point tensor."""
    tensor = tensor.detach().cpu().clone()  # a file of a view would hold all that the view is a part of
    return tensor.float() if tensor.is_floating_point() else tensor


def _without_name(graph: Data, step: int) -> Data:
    plain = Data(**{key: value for key, value in graph.to_dict().items() if key != "name"}).apply(plain_tensor)
    plain.step = torch.tensor([step])
    return plain


def _same_attributes(files: Sequence[str], graphs: Sequence[Data]) -> None:
    first = set(graphs[0].keys())
    for file, graph in zip(files, graphs, strict=True):
        if different := sorted(first ^ set(graph.keys())):
            raise ValueError(
                f"{file} and {files[0]} differ in {', '.join(different)}; graphs of one folder need the same attributes"
            )
