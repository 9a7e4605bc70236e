"""The adapter set: an ordered view on the LoRA factors inside a PEFT model."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch_geometric.nn as pyg_nn
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.variants import BlockDiagonalLinear
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

FUSED_NAMES = ("qkv", "c_attn")  # projections that hold q, k and v one after the other
MAPS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, BlockDiagonalLinear)  # what lora_A and lora_B are


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
        ranks: The rows of the layer's lora_A that belong to it.
        rows: The rows of the layer's lora_B that belong to it.
        columns: The columns of the layer's lora_B that belong to it.
        in_features: Width d_in of the input; of a convolution, channels times kernel; of an embedding, its rows.
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
    columns: slice
    in_features: int
    out_features: int


class AdapterSet(Sequence[Adapter]):
    """The adapters of a model in forward order, stackable by shape.

    Args:
        base_model: The module PEFT injected into.
        adapter_name: PEFT's name of the adapter.
        fused_slices: Slices of fused projections that are adapters of their own; None: the layer as a whole.

    Raises:
        ValueError: If there is no adapter, or one whose layer is offloaded; `fused_slices` of a layer whose parts are
            not known.
    """

    def __init__(self, base_model: nn.Module, adapter_name: str, fused_slices: Sequence[str] | None = None) -> None:
        self.adapter_name = adapter_name
        self.layers: dict[str, Any] = {}  # both LoraLayer and nn.Module, a type that has no name
        found: list[dict[str, Any]] = []
        for path, module in base_model.named_modules():
            if isinstance(module, LoraLayer) and _is_low_rank(module, adapter_name):
                self.layers[path] = module
        storages = Counter(p.untyped_storage().data_ptr() for p in self.parameters() if not p.is_meta)
        for path, module in list(self.layers.items()):
            if any(storages[p.untyped_storage().data_ptr()] > 1 and p.numel() for p in self.raw(path)):
                del self.layers[path]  # of tied layers, whose factors are one memory; they stay PEFT's
            else:
                found += self._views(path, module, fused_parts(base_model, path, module, fused_slices))
        if not found:
            raise ValueError(
                f"there is no adapter {adapter_name!r} here, or only on layers that share its weights; check "
                "target_modules, exclude_modules and layers_to_transform"
            )
        offloaded = [path for path in self.layers if self.raw(path)[0].is_meta]
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
                "FSDP has cut the adapters, but the graph pass reads all of them. Let it cut the frozen base only, as "
                "`structlora train` under `accelerate launch` does; see docs/guides/devices.md"
            )
        for group in self.groups:
            pairs = [self.pair(self[i]) for i in group]
            dtype = torch.promote_types(pairs[0][0].dtype, torch.float32)
            A = torch.stack([a.to(device, dtype) for a, _ in pairs])
            B = torch.stack([b.to(device, dtype).mT for _, b in pairs]).mT
            yield group, A, B

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield lora_A and lora_B of every layer."""
        for path in self.layers:
            yield from self.raw(path)

    def sides(self, path: str) -> tuple[Any, Any]:
        """Return what holds lora_A and lora_B of a layer: two modules, or two `nn.ParameterDict` of an embedding."""
        layer, name = self.layers[path], self.adapter_name
        if name in layer.lora_A:
            return layer.lora_A[name], layer.lora_B[name]
        down, up = layer.lora_embedding_A, layer.lora_embedding_B  # of all adapters; once coordinated, each has its own
        return tuple(vars(side).get("factors", {}).get(name, side) for side in (down, up))  # type: ignore[return-value]

    def raw(self, path: str) -> tuple[nn.Parameter, nn.Parameter]:
        """Return the parameters of a layer as PEFT made them, whatever the layer runs with."""
        key = "weight" if self.adapter_name in self.layers[path].lora_A else self.adapter_name
        down, up = (vars(side).get(key, side._parameters.get(key)) for side in self.sides(path))  # a view under FSDP 1
        return down, up

    def keys(self, path: str) -> tuple[str, str]:
        """Return the names of lora_A and lora_B of a layer in PEFT's files."""
        kind = "{}.weight" if self.adapter_name in self.layers[path].lora_A else "{}"
        sides = ("lora_A", "lora_B") if kind != "{}" else ("lora_embedding_A", "lora_embedding_B")
        down, up = (f"base_model.model.{path}.{kind.format(side)}" for side in sides)
        return down, up

    def plain_name(self, path: str) -> str:
        """Return the name of an adapted layer, or parameter, in the base model."""
        name = path.replace(".base_layer", "")  # the output projection of an attention, a second parameter of a module
        parameter = getattr(self.layers[path], "parameter_name", None)
        return name if parameter is None else f"{name}.{parameter}"

    @property
    def switched_off(self) -> bool:
        """Whether no layer uses the adapter: disabled, merged, another one is active, or stands in its place."""
        path, layer = next(iter(self.layers.items()))
        off = layer.disable_adapters or layer.merged or self.adapter_name not in layer.active_adapters
        return bool(off or not hasattr(self.sides(path)[0], "effective"))

    def is_linear(self, path: str) -> bool:
        """Tell whether the update of a layer is lora_B lora_A as a whole."""
        linear = all(isinstance(side, nn.Linear) for side in self.sides(path))
        return linear and getattr(self.layers[path], "num_experts", 1) == 1

    def pair(self, adapter: Adapter) -> tuple[Tensor, Tensor]:
        """Return the parameters A (r, d_in) and B (d_out, r) of an adapter."""
        A, B = self.raw(adapter.layer)
        if A.dim() < 2 or B.dim() < 2:
            raise ValueError(f"{adapter.layer} has shards of DeepSpeed ZeRO-3 / FSDP for factors; gather them first")
        return self.part(adapter, A.flatten(1), B.flatten(1))

    def part(self, adapter: Adapter, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """Return what of the factors of a layer, as matrices, belongs to an adapter."""
        if A.size(0) == adapter.r and B.size(0) == adapter.out_features:
            return A, B  # the whole layer; the backward pass of a slice would copy it
        return A[adapter.ranks], B[adapter.rows, adapter.columns]

    def join(self, path: str, pieces: list[tuple[int, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Return A (r, d_in) and B (d_out, r) of a layer, from the factors of its adapters and zeros."""
        if len(pieces) == 1 and pieces[0][2].size(0) == self.raw(path)[1].size(0):
            return pieces[0][1], pieces[0][2]
        pieces = sorted(pieces, key=lambda piece: self[piece[0]].ranks.start)
        A = torch.cat([a for _, a, _ in pieces])
        columns = A.size(0) if A.size(0) != self.raw(path)[0].size(0) else self.raw(path)[1].size(1)
        B, start = pieces[0][2].new_zeros(self.raw(path)[1].size(0), columns), 0
        for i, a, b in pieces:
            grown = a.size(0) != self[i].r  # by the dense lift
            B[self[i].rows, slice(start, start + a.size(0)) if grown else self[i].columns] = b
            start += a.size(0)
        return A, B

    def _views(self, path: str, module: Any, parts: dict[str, slice]) -> Iterator[dict]:
        """Yield the fields of one adapter for a whole layer, or of one adapter per slice, group or expert."""
        down, up = self.raw(path)
        base = module.get_base_layer()
        experts, groups = getattr(module, "num_experts", 1), getattr(base, "groups", 1)
        blocks, groups = (getattr(side, "nblocks", n) for side, n in zip(self.sides(path), (1, groups), strict=True))
        rank, width = down.size(0), up.size(0)
        name = self.plain_name(path)
        common = {"layer": path, "scaling": module.scaling[self.adapter_name], "in_features": down[0].numel()}
        whole = slice(0, width)
        places: list[tuple[str, slice, slice, slice | None]]
        if parts:
            r = rank // len(parts)
            places = [(f"[{k}]", slice(i * r, i * r + r), rows, None) for i, (k, rows) in enumerate(parts.items())]
        elif experts > 1:  # PEFT keeps rank within expert in lora_A, expert within rank in lora_B
            r = rank // experts
            places = [(f"[{e}]", slice(e * r, e * r + r), whole, slice(e, rank, experts)) for e in range(experts)]
        elif blocks > 1:  # of BD-LoRA's lora_A: every block of ranks reads inputs of its own
            r = rank // blocks
            places = [(f"[{k}]", slice(k * r, k * r + r), whole, None) for k in range(blocks)]
        elif groups > 1:  # lora_B is a grouped convolution, or of BD-LoRA: every group of outputs reads its own ranks
            r, out = up.size(1), width // groups
            places = [
                (f"[{g}]", slice(g * r, g * r + r), slice(g * out, g * out + out), slice(0, r)) for g in range(groups)
            ]
        else:
            r, places = rank, [("", slice(0, rank), whole, None)]
        for key, ranks, rows, columns in places:
            yield {
                **common,
                "name": name + key,
                "r": r,
                "ranks": ranks,
                "rows": rows,
                "columns": ranks if columns is None else columns,
                "out_features": rows.stop - rows.start,
            }


def _is_low_rank(layer: Any, name: str) -> bool:
    """Tell whether a layer has an adapter whose parts are two matrices."""
    if name in layer.lora_embedding_A:
        return True
    return name in layer.lora_A and all(isinstance(side[name], MAPS) for side in (layer.lora_A, layer.lora_B))


def fused_parts(model: nn.Module, path: str, layer: Any, slices: Sequence[str] | None) -> dict[str, slice]:
    """Return the outputs of every slice that is an adapter of its own, none for a layer that is adapted as a whole.

    Args:
        model: Its configuration, if it has one, says how the layer is cut.
        path: Name of the layer.
        layer: The layer, adapted or not.
        slices: A subset of q, k and v, or None.

    Raises:
        ValueError: For a fused layer whose parts do not lie one after the other, or whose widths are not known.
    """
    base = layer.get_base_layer() if isinstance(layer, LoraLayer) else layer
    if not slices or not is_fused(path, base):
        return {}
    d_in, d_out = linear_widths(base)
    multi_query = getattr(getattr(model, "config", None), "multi_query", None)
    if multi_query is not False and d_out == 3 * d_in:
        widths = [d_in] * 3
    elif multi_query and (d_out - d_in) % 2 == 0:
        widths = [d_in, (d_out - d_in) // 2, (d_out - d_in) // 2]
    else:
        raise ValueError(
            f"{path} ({d_in} to {d_out}) is not q, k and v one after the other as far as the model's configuration "
            "says; leave fused_slices out, or exclude_modules"
        )
    starts = [0, widths[0], widths[0] + widths[1]]
    return {k: slice(starts["qkv".index(k)], starts["qkv".index(k)] + widths["qkv".index(k)]) for k in slices}


def is_fused(path: str, base: nn.Module) -> bool:
    """Tell whether a module is a projection that holds q, k and v, by its name or as an attention of torch."""
    return isinstance(base, nn.MultiheadAttention) or path.rpartition(".")[2] in FUSED_NAMES


def linear_widths(module: nn.Module) -> tuple[int, int]:
    """Return (d_in, d_out) of a linear layer; (0, 0) of any other."""
    if isinstance(module, Conv1D):
        return tuple(module.weight.shape)  # type: ignore[return-value]
    if isinstance(module, pyg_nn.Linear):
        return module.in_channels, module.out_channels
    if isinstance(module, nn.MultiheadAttention):
        return module.embed_dim, 3 * module.embed_dim
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    return 0, 0
