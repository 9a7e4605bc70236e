"""A trained adapter merged into the weights of its base."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from peft.utils.other import TrainableTokensWrapper
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm
from transformers.pytorch_utils import Conv1D

from structlora_pyg.tuner.distributed import is_cut
from structlora_pyg.tuner.export import plain_factors
from structlora_pyg.tuner.layers import base_weight

if TYPE_CHECKING:
    from structlora_pyg.tuner.model import StructLoraModel

logger = logging.getLogger(__name__)


def merge_and_unload(model: StructLoraModel, progressbar: bool = False) -> nn.Module:
    """Merge in float32 or wider, cast once, log the rounding error, return the base module; see `StructLoraModel`."""
    graph_pass = model.graph_pass
    adapters, name = graph_pass.adapters, graph_pass.adapters.adapter_name
    owners: dict[int, str] = {}
    for path, layer in adapters.layers.items():
        weight = base_weight(layer)
        if owners.setdefault(id(weight), path) != path:
            raise ValueError(
                f"{owners[id(weight)]} and {path} share one base weight (layer_replication, or tied weights), which "
                "cannot hold both updates; export the adapter instead"
            )
        if is_cut(weight) or isinstance(weight, DTensor):
            raise ValueError(
                f"{path} is cut over the processes, which cannot merge into it. Call export(folder) on every process, "
                "load the folder onto a whole base (structlora_pyg.load_lora), and merge there"
            )
        if not weight.is_floating_point() or type(weight) is not nn.Parameter:
            raise ValueError(
                f"{path} is quantised ({type(weight).__name__}): merging into it would round the update away. Export "
                "the adapter, turn a copy of the base into floating point "
                "(structlora_pyg.study.methods.quantization.dequantize_4bit), load the adapter onto it with "
                "peft.PeftModel, and merge there"
            )
        if layer.lora_bias[name] and layer.get_base_layer().bias is None:
            raise ValueError(f"{path} has no bias that lora_bias could be merged into; export the adapter instead")
        if layer.merged:
            raise ValueError("the adapter is merged already; call unmerge_adapter() first")
    if model.active_adapters != [name]:
        model.set_adapter(name)  # PEFT takes the heads of the adapter that is active
    factors, truncation = plain_factors(graph_pass)
    if not all(torch.isfinite(a).all() and torch.isfinite(b).all() for a, b in factors.values()):
        raise ValueError("the factors are not finite; go back to the last good checkpoint")
    worst = 0.0
    for path, (a, b) in tqdm(factors.items(), desc="merging", disable=not progressbar):
        worst = max(worst, _merge_layer(adapters.layers[path], name, a, b))
    logger.info(
        "merged %d layers; relative rounding error of the update at most %.1e, of truncation %.1e",
        len(factors),
        worst,
        truncation,
    )
    for module in model.modules():
        if isinstance(module, TrainableTokensWrapper):
            module.token_adapter.merge(safe_merge=True, adapter_names=[name])
    return model.unload()


@torch.no_grad()
def _merge_layer(layer: Any, name: str, a: Tensor, b: Tensor) -> float:
    """Add s B A to the base weight of a layer and return the relative rounding error of the update."""
    base = layer.get_base_layer()
    if name in layer.lora_variant:  # DoRA and its kin merge by rules of their own
        for factor, value in ((layer.lora_A[name], a), (layer.lora_B[name], b)):
            factor.weight.copy_(value)
            factor.set(value)
        layer.merge(safe_merge=True, adapter_names=[name])
        return 0.0
    weight = base_weight(layer)
    delta = layer.scaling[name] * (b @ a).to(weight.device)
    delta = delta.T if isinstance(base, Conv1D) or getattr(layer, "fan_in_fan_out", False) else delta
    wide = torch.promote_types(weight.dtype, torch.float32)
    merged = weight.to(wide) + delta
    if not torch.isfinite(merged).all():
        raise ValueError("merging would write non-finite weights; the base or the adapter is damaged")
    rounded = merged.to(weight.dtype)
    error = (rounded.to(wide) - merged).norm() / delta.norm().clamp(min=1e-30)
    weight.data = rounded
    if layer.lora_bias[name]:
        base.bias.data += layer.lora_B[name].bias * layer.scaling[name]
    return float(error)
