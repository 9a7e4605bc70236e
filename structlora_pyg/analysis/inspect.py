"""Look at a LoRA adapter that anybody trained with PEFT, without its base model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch_geometric.data import Data

from structlora_pyg.analysis.structure import Structure, structure_of
from structlora_pyg.data.adapters import AdapterSet
from structlora_pyg.data.graph_builder import GraphBuilder


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What `inspect_adapter` finds.

    Attributes:
        adapters: The adapters, in the order of their names.
        graph: The adapter graph (``depth_chain``), with ``name``.
        structure: Drift, coherence and similarities.
        norm: (N,) Frobenius norms of the updates.
        effective_rank: (N,) exponential of the entropy of the normalised singular values, in [1, r]; 0 for no update.
        redundancy: (N,) share of the rank that is not used, 1 - effective_rank / r, in [0, 1].
    """

    adapters: AdapterSet
    graph: Data
    structure: Structure
    norm: Tensor
    effective_rank: Tensor
    redundancy: Tensor

    def most_alike(self, count: int = 5) -> list[tuple[str, str, float]]:
        """Return the pairs of adapters with the largest absolute cosine: two names and the cosine."""
        names, n = self.structure.names, len(self.structure.names)
        first, second = torch.triu_indices(n, n, offset=1)
        values = self.structure.similarity[first, second]
        order = values.abs().argsort(descending=True)[:count]
        return [(names[first[k]], names[second[k]], float(values[k])) for k in order]

    def summary(self) -> str:
        """Return the findings as text for a terminal."""
        s, width = self.structure, max(len(a.name) for a in self.adapters)
        lines = [
            f"{len(self.adapters)} adapters of {len(self.adapters.roles)} roles in {len(self.adapters.blocks)} blocks",
            f"adjacent-layer cosine  {s.adjacent_cosine:.4f}",
            f"drift energy           {s.drift_energy:.4g} ({s.relative_drift:.4g} times the mean squared norm)",
            f"mean redundancy        {float(self.redundancy.mean()):.3f}",
            "",
            f"{'adapter':<{width}}  {'r':>3}  {'norm':>10}  {'effective rank':>14}  {'redundancy':>10}",
        ]
        for a, norm, rank, unused in zip(self.adapters, self.norm, self.effective_rank, self.redundancy, strict=True):
            lines.append(f"{a.name:<{width}}  {a.r:>3}  {norm:>10.4g}  {rank:>14.2f}  {unused:>10.3f}")
        lines += ["", "most alike"]
        lines += [f"  {cosine:+.4f}  {one}  {two}" for one, two, cosine in self.most_alike()]
        return "\n".join(lines)


@torch.no_grad()
def inspect_adapter(folder: str | Path) -> Inspection:
    """Return graph and structure of a PEFT LoRA folder; the base model is not needed.

    Args:
        folder: A folder with ``adapter_config.json`` and ``adapter_model.safetensors``. Of a DoRA the low-rank part is
            inspected; its magnitudes are not.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If the adapter is not a LoRA of linear layers, or a file is damaged.
    """
    builder = GraphBuilder.from_model(folder)
    adapters, graph = builder.adapters, builder()
    graph.name = list(builder.node_names)
    pairs = [adapters.pair(a) for a in adapters]
    found = structure_of(adapters, pairs)
    ranks = torch.tensor([_effective_rank(a.double(), b.double()) for a, b in pairs])
    return Inspection(
        adapters=adapters,
        graph=graph,
        structure=found,
        norm=found.gram.diagonal().clamp(min=0).sqrt(),
        effective_rank=ranks,
        redundancy=1 - ranks / torch.tensor([float(a.r) for a in adapters]),
    )


def _effective_rank(a: Tensor, b: Tensor) -> float:
    """Return exp(entropy) of the normalised singular values of B A (Roy and Vetterli, 2007)."""
    singular = torch.linalg.svdvals(torch.linalg.qr(b).R @ torch.linalg.qr(a.mT).R.mT)
    if float(singular.sum()) == 0.0:
        return 0.0
    p = singular / singular.sum()
    return math.exp(float(-(p * p.clamp(min=1e-300).log()).sum()))
