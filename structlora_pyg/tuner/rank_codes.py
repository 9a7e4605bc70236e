"""The rank codes A x of a forward: what the label terms and the per-input compression of the filter read."""

from __future__ import annotations

import torch
from torch import Tensor

from structlora_pyg.data.adapters import AdapterSet
from structlora_pyg.data.graph_builder import GraphBuilder


class RankCodes:
    """Collects the rank codes of every adapted layer, averaged over the tokens of an example that are not padding.

    Args:
        mask: (batch, tokens) attention mask of the forward, where it has one.
    """

    def __init__(self, mask: Tensor | None = None) -> None:
        self._mask = mask
        self._codes: dict[int, Tensor] = {}

    def add(self, position: int, t: Tensor) -> None:
        """Add the codes `t` (batch, ..., r) of the layer at `position` in the adapter set."""
        if t.dim() > 2:
            tokens = t.flatten(1, -2)
            if isinstance(self._mask, Tensor) and self._mask.shape == tokens.shape[:2]:
                weight = self._mask.to(tokens).unsqueeze(-1)
                t = (tokens * weight).sum(1) / weight.sum(1).clamp(min=1)
            else:
                t = tokens.mean(1)
        self._codes[position] = t

    def pooled(self, adapters: AdapterSet, graph: GraphBuilder) -> Tensor:
        """Return the codes (batch, K) in the order of the graph's directions.

        Raises:
            RuntimeError: If a layer has not run, or ran on inputs of another batch.
        """
        positions = {path: i for i, path in enumerate(adapters.layers)}
        try:
            pieces = [self._codes[positions[a.layer]][:, a.ranks].to(graph.scaling.device) for a in adapters]
            order = [i for _, i in sorted((graph.cell[i], i) for i in range(len(adapters)))]
            return torch.cat([pieces[i] for i in order], dim=1)
        except (KeyError, RuntimeError) as error:
            raise RuntimeError(
                "rank codes could not be collected: every adapted layer has to run once a forward, on inputs whose "
                "first dimension is the batch. Use compression=gate and label_term=none for this model"
            ) from error
