"""Stock PyG transforms on the adapter graph, between filter and coordinator.

A transform works on the structure (edges, their weights, the number of nodes), so it runs when edges change, not at
every step. Features it adds, such as positional encodings, stand beside the codes in the coordinator's input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch_geometric.transforms as T
from torch import Tensor
from torch_geometric.data import Data

from structlora_pyg.checks import make_part


class StructureTransforms:
    """A sequence of transforms of edges and nodes.

    Args:
        specs: Each a class name in `torch_geometric.transforms` or dotted path, a mapping of such a ``name`` and
            keyword arguments, or a transform object.
        virtual_nodes: Number of nodes that the transforms may add.
        seed: Seed of what they draw (Laplacian eigenvectors have random signs).

    Raises:
        ValueError: Unknown transform; wrong arguments.
    """

    def __init__(self, specs: Sequence[Any], virtual_nodes: int = 0, seed: int = 0) -> None:
        self.transforms = [make_transform(spec) for spec in specs]
        self.virtual_nodes, self.seed = virtual_nodes, seed

    def __call__(
        self, edge_index: Tensor, edge_weight: Tensor, num_nodes: int
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return the new edges (2, E), their weights (E,), and the features (N', k) that were added, by name.

        What a transform appends to x, as `LocalDegreeProfile` does, is called ``pe``.

        Raises:
            ValueError: A transform that fails, changes nothing, or changes the number of nodes otherwise than declared.
        """
        x = torch.zeros(num_nodes, 0)
        data = Data(x=x, edge_index=edge_index.cpu(), edge_weight=edge_weight.cpu(), num_nodes=num_nodes)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            for transform in self.transforms:
                data = self._apply(transform, data)
        expected = num_nodes + self.virtual_nodes
        if data.num_nodes != expected:
            raise ValueError(
                f"the transforms turn {num_nodes} nodes into {data.num_nodes}; adapters cannot vanish, and added nodes "
                f"have to be declared: graph.virtual_nodes={max(data.num_nodes - num_nodes, 0)}"
            )
        weight = data.edge_weight if "edge_weight" in data and data.edge_weight is not None else None
        if "edge_attr" in data and data.edge_attr is not None and data.edge_attr.dim() == 1:
            weight = data.edge_attr  # GDC and its kin return weights under this name
        if weight is None or weight.numel() != data.edge_index.size(1):  # new edges that were given no weight
            table = torch.ones(expected, expected)
            table[edge_index[0].cpu(), edge_index[1].cpu()] = edge_weight.cpu().float()
            weight = table[data.edge_index[0], data.edge_index[1]]
        features = {key: data[key] for key in data.node_attrs() if key != "x" and data[key].dim() == 2}
        if data.x.size(1):
            features["pe"] = torch.cat([data.x, features["pe"]], dim=-1) if "pe" in features else data.x
        device = edge_index.device
        padded = {
            key: torch.nn.functional.pad(value, (0, 0, 0, expected - len(value))).float().to(device)
            for key, value in features.items()
        }
        return data.edge_index.to(device), weight.float().to(device), padded

    def _apply(self, transform: Any, data: Data) -> Data:
        name = type(transform).__name__
        before = data.clone()
        try:
            result = transform(data)
        except Exception as error:  # whatever a foreign transform raises becomes one clear message
            raise ValueError(f"the transform {name} fails on the adapter graph: {error}") from error
        if not isinstance(result, Data) or result.edge_index is None:
            raise ValueError(f"the transform {name} does not return Data with edge_index; choose another one")
        if _same(before, result):
            raise ValueError(
                f"the transform {name} has no effect on the adapter graph: transforms see edges and nodes, not codes. "
                "Remove it, or write a Data -> Data filter"
            )
        return result


def make_transform(spec: Any) -> Any:
    """Return a transform from a name, a mapping of ``name`` and arguments, a class, or an object."""
    return make_part(
        spec, {}, {name: getattr(T, name) for name in T.__all__}, "transform of torch_geometric.transforms"
    )


def _same(a: Data, b: Data) -> bool:
    def alike(key: str) -> bool:
        x, y = a.get(key), b.get(key)
        return x is y or (torch.is_tensor(x) and torch.is_tensor(y) and torch.equal(x, y))

    return a.num_nodes == b.num_nodes and all(alike(k) for k in {*a.keys(), *b.keys()})
