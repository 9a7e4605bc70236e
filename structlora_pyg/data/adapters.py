"""The adapter set: an ordered view on the LoRA factors inside a PEFT model."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

FUSED_NAMES = ("qkv", "c_attn", "in_proj")  # projections that hold q, k and v one after the other


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """One low-rank update; a node of the graph.

    Attributes:
        name: Path of the adapted layer in the base model, with ``[q]`` behind it for a slice of a fused projection.
        layer: Path of the adapted layer in the adapted model.
        role: The name with every number replaced by ``*``: adapters of one role do the same job at different depths.
            A number at the end of a name within a numbered block stays: it is a place in the block
            (``convs.0.mlp.3`` has the role ``convs.*.mlp.3``).
        depth: Position among the adapters of the same role, from 0.
        block: The name up to its first number: adapters of one block stand side by side.
        r: Rank.
        scaling: lora_alpha / r, the factor before B A.
        ranks: The rows of the layer's lora_A (columns of lora_B) that belong to it.
        rows: The rows of the layer's lora_B that belong to it.
        in_features: Width d_in of the input.
        out_features: Width d_out of the output (of the slice).
    """

    name: str
    layer: str
    role: str
    depth: int
    block: str
    r: int
    scaling: float
    ranks: slice
    rows: slice
    in_features: int
    out_features: int


class AdapterSet(Sequence[Adapter]):
    """The adapters of a model in forward order, stackable by shape.

    Args:
        base_model: The module PEFT injected into.
        adapter_name: PEFT's name of the adapter.
        fused_slices: Slices of fused projections that are adapters of their own; None: the layer as a whole.

    Raises:
        ValueError: If there is no adapter, one that is not a linear map, or one whose layer is offloaded.
    """

    def __init__(self, base_model: nn.Module, adapter_name: str, fused_slices: Sequence[str] | None = None) -> None:
        self.adapter_name = adapter_name
        self.layers: dict[str, Any] = {}  # both LoraLayer and nn.Module, a type that has no name
        found: list[dict[str, Any]] = []
        for path, module in base_model.named_modules():
            if not isinstance(module, LoraLayer) or adapter_name not in module.lora_A:
                continue
            if not isinstance(module.lora_A[adapter_name], nn.Linear):
                raise ValueError(
                    f"{path} is a {type(module.get_base_layer()).__name__}, which is not a linear map from d_in to "
                    "d_out; leave it out of target_modules, or name it in exclude_modules"
                )
            self.layers[path] = module
            found += _views(path, module, adapter_name, fused_slices)
        if not found:
            raise ValueError("the model has no adapter; check target_modules, exclude_modules, layers_to_transform")
        offloaded = [path for path, layer in self.layers.items() if layer.lora_A[adapter_name].weight.is_meta]
        if 0 < len(offloaded) < len(self.layers):
            raise ValueError(
                f"device_map keeps {len(offloaded)} adapted layers off the devices that compute, first {offloaded[0]}: "
                "PEFT makes adapters without weights there. Spread the model over more devices, or leave those layers "
                "out with layers_to_transform"
            )
        self._arrange(found)

    def _arrange(self, found: list[dict[str, Any]]) -> None:
        """Name roles, depths and blocks, and group the adapters by shape."""
        depths: dict[str, int] = defaultdict(int)
        self._adapters: list[Adapter] = []
        for view in found:
            numbers = list(re.finditer(r"(?<![^.])\d+(?=\.|\[|$)", view["name"]))
            block = view["name"][: numbers[0].end()] if numbers else ""
            if len(numbers) > 1 and not view["name"][numbers[-1].end() :]:
                numbers.pop()
            role = view["name"]
            for number in reversed(numbers):
                role = f"{role[: number.start()]}*{role[number.end() :]}"
            self._adapters.append(Adapter(**view, role=role, depth=depths[role], block=block))
            depths[role] += 1
        self.roles = list(depths)
        self.blocks = list(dict.fromkeys(a.block for a in self))
        shapes: dict[tuple[int, int, int], list[int]] = defaultdict(list)
        for i, a in enumerate(self):
            shapes[a.in_features, a.out_features, a.r].append(i)
        self.groups = list(shapes.values())

    def __len__(self) -> int:
        return len(self._adapters)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        return self._adapters[index]

    def __repr__(self) -> str:
        return f"AdapterSet({len(self)} adapters, {len(self.roles)} roles, {len(self.blocks)} blocks)"

    def factors(self, device: torch.device) -> Iterator[tuple[list[int], Tensor, Tensor]]:
        """Yield per shape: indices of its n adapters, A (n, r, d_in) and B (n, d_out, r), at least float32.

        B lies in memory as (n, r, d_out), as A does: products with a stack of such matrices are one large product.

        Raises:
            RuntimeError: If FSDP has cut the factors.
        """
        if any(isinstance(p, DTensor) for p in self.parameters()):
            raise RuntimeError(
                "FSDP has cut the adapters, but the graph pass reads all of them. Let it cut the frozen base only: "
                "model, optimizer = structlora_pyg.study.distributed.shard(accelerator, model, base, optimizer)"
            )
        for group in self.groups:
            pairs = [self.pair(self[i]) for i in group]
            dtype = torch.promote_types(pairs[0][0].dtype, torch.float32)
            A = torch.stack([a.to(device, dtype) for a, _ in pairs])
            B = torch.stack([b.to(device, dtype).mT for _, b in pairs]).mT
            yield group, A, B

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield lora_A and lora_B of every layer."""
        for layer in self.layers.values():
            yield layer.lora_A[self.adapter_name].weight
            yield layer.lora_B[self.adapter_name].weight

    def pair(self, adapter: Adapter) -> tuple[Tensor, Tensor]:
        """Return the parameters A (r, d_in) and B (d_out, r) of an adapter."""
        layer = self.layers[adapter.layer]
        A, B = layer.lora_A[self.adapter_name].weight, layer.lora_B[self.adapter_name].weight
        if A.size(0) == adapter.r and B.size(0) == adapter.out_features:
            return A, B  # the whole layer; the backward pass of a slice would copy it
        return A[adapter.ranks], B[adapter.rows, adapter.ranks]


def _views(path: str, module: Any, adapter_name: str, slices: Sequence[str] | None) -> Iterator[dict]:
    """Yield the fields of one adapter for a whole layer, or of one adapter per slice."""
    r, scaling = module.r[adapter_name], module.scaling[adapter_name]
    name = path.replace(".base_layer", "")  # the output projection of an adapted attention
    shape = {"layer": path, "scaling": scaling, "in_features": module.in_features}
    if slices is None or not is_fused(path, module.get_base_layer()):
        rows = slice(0, module.out_features)
        yield {**shape, "name": name, "r": r, "ranks": slice(0, r), "rows": rows, "out_features": module.out_features}
        return
    part, rank = module.out_features // 3, r // len(slices)
    for i, key in enumerate(slices):
        start = "qkv".index(key) * part
        yield {
            **shape,
            "name": f"{name}[{key}]",
            "r": rank,
            "ranks": slice(i * rank, (i + 1) * rank),
            "rows": slice(start, start + part),
            "out_features": part,
        }


def is_fused(path: str, base: nn.Module) -> bool:
    """Tell whether a module is a projection that holds q, k and v, by its name or as an attention of torch."""
    return isinstance(base, nn.MultiheadAttention) or path.rpartition(".")[2] in FUSED_NAMES
