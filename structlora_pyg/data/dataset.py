"""Adapter graphs over training as a PyG dataset.

A folder of graphs holds ``raw/graph-<step>.pt``, one file per step, ``raw/names.json``, the names of the nodes, and
``processed/graphs.pt``, which the dataset makes from them. Everything is read with ``weights_only=True``.
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

from structlora_pyg.files import replace_file, short

NAMES_FILE = "names.json"


class AdapterGraphDataset(InMemoryDataset):
    """Adapter graphs over training, one `torch_geometric.data.Data` a recorded step, in the order of the steps.

    ``structlora train train.record_every=N`` and `GraphRecorder` write such folders; `from_graphs` makes one of graphs
    from elsewhere. The graphs are those of `GraphRecorder`. It is a PyG dataset like any other: indexing, slicing,
    ``DataLoader``, transforms. ``processed/graphs.pt`` is made anew when steps were added.

    Args:
        root: The folder, for instance ``runs/x/graphs``.
        transform: Applied to a graph at every access.
        pre_transform: Applied to every graph before they are collated.
        pre_filter: Says which graphs are kept.
        force_reload: Collate again.

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
        force_reload: bool = False,
    ) -> None:
        if not graph_files(Path(root)):
            raise FileNotFoundError(
                f"{root} holds no adapter graphs; structlora train train.record_every=10 writes them to <run>/graphs"
            )
        self.node_names = _read_names(Path(root))
        super().__init__(str(root), transform, pre_transform, pre_filter, log=False, force_reload=force_reload)
        self.load(self.processed_paths[0])

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

    @property
    def raw_file_names(self) -> list[str]:
        """The files of the steps."""
        return [file.name for file in graph_files(Path(self.root))]

    @property
    def processed_file_names(self) -> list[str]:
        """The collated file."""
        return ["graphs.pt"]

    def process(self) -> None:
        """Collate the graphs of all steps into one file."""
        graphs = [Data.from_dict(_read(Path(path))) for path in self.raw_paths]
        _same_attributes(self.raw_paths, graphs)
        if self.pre_filter is not None:
            graphs = [graph for graph in graphs if self.pre_filter(graph)]
        if self.pre_transform is not None:
            graphs = [self.pre_transform(graph) for graph in graphs]
        if not graphs:
            raise ValueError(f"pre_filter keeps none of the {len(self.raw_paths)} graphs in {self.root}")
        data, slices = self.collate(graphs)
        content = {"origin": self._origin(), "data": data.to_dict(), "slices": slices}
        replace_file(self.processed_paths[0], _bytes(content))

    def load(self, path: str, data_cls: Any = Data) -> None:
        """Load the collated file, safely: PyG's own load falls back on pickle."""
        content = _read(Path(path))
        self.data, self.slices = data_cls.from_dict(content["data"]), content["slices"]

    def _process(self) -> None:
        # PyG's own keeps pre_transform and pre_filter in two pickled files, which run whatever a stranger put there.
        try:
            fresh = _read(Path(self.processed_paths[0]))["origin"] == self._origin()
        except (ValueError, KeyError):  # not there, or damaged: it can be made again
            fresh = False
        if self.force_reload or not fresh:
            self.process()

    def _origin(self) -> list[str]:
        """Return what the collated file depends on."""
        return [*self.raw_file_names, repr(self.pre_transform), repr(self.pre_filter)]


def graph_files(root: Path) -> list[Path]:
    """Return the files of the steps, in the order of the steps."""
    found = [file for file in (root / "raw").glob("graph-*.pt") if re.fullmatch(r"graph-\d+", file.stem)]
    return sorted(found, key=step_of)


def step_of(file: Path) -> int:
    """Return the optimizer step that a file of `graph_files` belongs to."""
    return int(file.stem.removeprefix("graph-"))


def write_graph(root: Path, graph: Data) -> None:
    """Write a graph, with ``step`` (1,), into a folder; what the dataset collated before is removed."""
    (root / "processed" / "graphs.pt").unlink(missing_ok=True)
    replace_file(root / "raw" / f"graph-{int(graph.step):08d}.pt", _bytes(graph.to_dict()))


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


def _bytes(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def _read(file: Path) -> dict[str, Any]:
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises anything on a damaged file
        raise ValueError(f"{file} is damaged ({short(error, 150)}); delete it to do without this step") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds no adapter graph; delete it to do without this step")
    return content


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
