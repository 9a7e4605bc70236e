"""Look at a LoRA adapter that anybody trained with PEFT, without its base model."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch_geometric.data import Data

from structlora_pyg.analysis.structure import Structure, structure_of
from structlora_pyg.data.adapters import Adapter, AdapterSet
from structlora_pyg.data.encoding import Encoding
from structlora_pyg.data.graph_builder import GraphBuilder

KEY = re.compile(r"(?:base_model\.model\.)?(?P<layer>.+)\.lora_(?P<side>[AB])(?:\.\w+)?\.weight$")


class StoredAdapters(AdapterSet):
    """The adapters of a PEFT LoRA folder.

    Args:
        folder: A folder with ``adapter_config.json`` and ``adapter_model.safetensors``.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If the adapter is not a LoRA of linear layers, or a file is damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        self.adapter_name, self.layers = "default", {}
        config, found = _read_config(folder), []
        self._pairs = _read_factors(folder)
        for layer, (a, b) in self._pairs.items():
            if a.dim() != 2 or b.dim() != 2 or b.size(1) != a.size(0):
                raise ValueError(
                    f"{folder}: {layer} has factors {tuple(a.shape)} and {tuple(b.shape)}, which are no linear map of "
                    "rank r; only LoRA of linear layers can be inspected"
                )
            sizes = {"r": a.size(0), "in_features": a.size(1), "out_features": b.size(0)}
            views = {"ranks": slice(0, a.size(0)), "rows": slice(0, b.size(0)), "columns": slice(0, a.size(0))}
            name = layer.replace(".base_layer", "")
            found.append({"name": name, "layer": layer, "scaling": _scaling(config, layer), **sizes, **views})
        self._arrange(sorted(found, key=lambda view: _natural(view["name"])))

    def pair(self, adapter: Adapter) -> tuple[Tensor, Tensor]:
        """Return A (r, d_in) and B (d_out, r) of an adapter."""
        return self._pairs[adapter.layer]


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

    adapters: StoredAdapters
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
    adapters = StoredAdapters(folder)
    pairs = [adapters.pair(a) for a in adapters]
    encoding = Encoding([a.in_features for a in adapters], [a.out_features for a in adapters])
    builder = GraphBuilder(adapters, encoding, edges="depth_chain")
    graph = builder(list(adapters.factors(torch.device("cpu"))))
    graph.name = list(builder.node_names)
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


def _read_config(folder: Path) -> LoraConfig:
    if not (folder / "adapter_config.json").is_file():
        raise FileNotFoundError(
            f"{folder} holds no adapter_config.json; give a folder written by save_pretrained or export"
        )
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{folder / 'adapter_config.json'} cannot be read: {error}") from error
    if not isinstance(config, LoraConfig):
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise ValueError(f"{folder} holds a {kind} adapter, not a LoRA; only peft_type=LORA can be inspected")
    patterns = [config.rank_pattern or {}, config.alpha_pattern or {}]
    numbers = [config.r, config.lora_alpha]
    numbers += [value for pattern in patterns if isinstance(pattern, Mapping) for value in pattern.values()]
    good = all(isinstance(n, (int, float)) and not isinstance(n, bool) and n > 0 for n in numbers)
    if not good or not all(isinstance(pattern, Mapping) for pattern in patterns):
        file = folder / "adapter_config.json"
        raise ValueError(f"{file} is damaged: r, lora_alpha, rank_pattern and alpha_pattern must hold numbers > 0")
    return config


def _read_factors(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; pickled adapters (.bin) are not read, save as safetensors")
    try:
        state: Mapping[str, Tensor] = load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    sides: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        match = KEY.match(key)
        if match:
            sides.setdefault(match["layer"], {})[match["side"]] = value.float()
    broken = [layer for layer, both in sides.items() if set(both) != {"A", "B"}]
    if broken or not sides:
        what = f"{broken[0]} has only one of lora_A and lora_B" if broken else "there is no lora_A and lora_B in it"
        raise ValueError(f"{file}: {what}; it is not a complete LoRA of linear layers")
    return {layer: (both["A"], both["B"]) for layer, both in sides.items()}


def _scaling(config: LoraConfig, layer: str) -> float:
    ranks, alphas = config.rank_pattern or {}, config.alpha_pattern or {}
    r = ranks.get(get_pattern_key(list(ranks), layer), config.r)
    alpha = alphas.get(get_pattern_key(list(alphas), layer), config.lora_alpha)
    return float(alpha / (math.sqrt(r) if config.use_rslora else r))


def _natural(name: str) -> list[tuple[int, Any]]:
    """Return a sort key under which layer 10 comes after layer 9."""
    return [(0, int(p)) if p.isdigit() else (1, p) for p in name.split(".")]
