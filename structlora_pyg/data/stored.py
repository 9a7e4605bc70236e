"""The adapters in a folder that PEFT wrote, without their base model."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from structlora_pyg.data.adapters import Adapter, AdapterSet

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
