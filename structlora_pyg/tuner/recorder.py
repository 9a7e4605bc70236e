"""Records the adapter graph of a model while it trains."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch_geometric.data import Data

from structlora_pyg.data.dataset import graph_files, plain_tensor, step_of, write_graph, write_names
from structlora_pyg.nn.attention import watched_attention
from structlora_pyg.tuner.model import StructLoraModel

RECORDED = (
    "x", "edge_index", "edge_weight", "edge_attr", "edge_type", "gate", "scaling", "message", "depth", "role",
    "node_type", "block",
)  # fmt: skip
CODES = ("code_A", "code_B")


class GraphRecorder:
    """Writes the adapter graph of a model to a folder that `AdapterGraphDataset` loads.

    In any training loop, call `record` after the optimizer step, on the main process; or give `every`, and nothing has
    to be called but a `record` after the last step. Training is not changed by it. The first record removes the graphs
    of its own and later steps: a run that goes on from a checkpoint replaces what it repeats.

    A graph is kept as a detached CPU ``Data`` in float32, with the attributes of `structlora_pyg.data.graph_builder`
    that the model's graph has (``edge_weight`` is 1 where the graph carries none), ``step`` (1,), and, of layer l of a
    coordinator with attention, ``attention_index_<l>`` (2, E') and ``attention_<l>`` (E', heads), see
    `structlora_pyg.nn.attention`. With N nodes and codes of width F, it takes about 8 N F bytes.

    Args:
        model: The model that is trained.
        root: The folder.
        every: Record by itself, in the first training forward after every so many optimizer steps; 0: do not.
        codes: Keep ``code_A`` and ``code_B`` (N, D, p) too.

    Raises:
        ValueError: If `model` has no adapter graph; if `every` is negative.
    """

    def __init__(self, model: nn.Module, root: str | Path, every: int = 0, codes: bool = False) -> None:
        if not isinstance(model, StructLoraModel):
            raise ValueError(
                f"a {type(model).__name__} has no adapter graph; give the model that get_structlora_model returned"
            )
        if every < 0:
            raise ValueError(f"every must be >= 0, got {every}")
        self.model, self.root, self.every = model, Path(root), every
        self.keys = RECORDED + CODES if codes else RECORDED
        self._begun = False
        self._last = -1
        if every:  # before the model's own hook, in a forward that has not begun yet
            model.get_base_model().register_forward_pre_hook(self._before_forward, prepend=True)

    def record(self, step: int | None = None) -> Data:
        """Write the graph as it is now and return it.

        Args:
            step: Number of finished optimizer steps; default: what the model has counted.
        """
        graph_pass = self.model.graph_pass
        self.model.hooks.count_steps()
        step = graph_pass.step if step is None else step
        with watched_attention(graph_pass) as layers:
            current = self.model.adapter_graph()
        keys = (*self.keys, *graph_pass.graph.features)
        graph = Data(**{key: current[key] for key in keys if key in current})
        if "edge_weight" not in graph:
            graph.edge_weight = torch.ones(graph.num_edges)
        for layer, (edge_index, alpha) in enumerate(layers):
            graph[f"attention_index_{layer}"], graph[f"attention_{layer}"] = edge_index, alpha
        graph.step = torch.tensor([step])
        graph = graph.apply(plain_tensor)
        if not self._begun:
            for file in graph_files(self.root):
                if step_of(file) >= step:
                    file.unlink()
            write_names(self.root, current.name)
            self._begun = True
        write_graph(self.root, graph)
        self._last = step
        return graph

    def _before_forward(self, module: nn.Module, args: tuple) -> None:
        if module.training:
            self.model.hooks.count_steps()
            step = self.model.graph_pass.step
            if step > 0 and step % self.every == 0 and step != self._last:
                self.record(step)
