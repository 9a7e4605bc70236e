"""Out of training: plain LoRA folders, and adapters merged into the weights of their base."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.utils.other import TrainableTokensWrapper
from safetensors.torch import load, save, save_model
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from structlora_pyg.files import replace_file
from structlora_pyg.tuner.distributed import is_cut, whole
from structlora_pyg.tuner.fingerprint import check_base
from structlora_pyg.tuner.graph_pass import GraphPass, join
from structlora_pyg.tuner.layers import CUSTOM_LAYERS, Attention, base_weight

logger = logging.getLogger(__name__)

ADAPTER_FILE = "adapter_model.safetensors"
Factors = dict[str, tuple[Tensor, Tensor]]  # A (r, d_in) and B (d_out, r) by layer


@torch.no_grad()
def plain_factors(graph_pass: GraphPass) -> tuple[Factors, float]:
    """Return (A, B) in float32 of every adapted layer with gates and coordination folded in, and the largest error.

    A lift that keeps the rank is exact (error 0). ``dense`` is cut to the adapter's rank by SVD; the error is relative
    to the norm of the update.

    Raises:
        ValueError: Factors that are not finite.
    """
    _, lifted = graph_pass.evaluated()
    adapters, worst = graph_pass.adapters, 0.0
    parts: dict[str, list[tuple[int, Tensor, Tensor]]] = {}
    for group, A, B in lifted:
        r = adapters[group[0]].r
        if A.size(1) > r:
            A, B, error = truncate(A, B, r)
            worst = max(worst, error)
        for i, a, b in zip(group, A, B, strict=True):
            parts.setdefault(adapters[i].layer, []).append((i, a, b))
    return {path: join(adapters, pieces, adapters.layers[path].out_features) for path, pieces in parts.items()}, worst


def truncate(A: Tensor, B: Tensor, r: int) -> tuple[Tensor, Tensor, float]:
    """Return the best factors of rank r of B A (stacked), and the largest relative error in Frobenius norm."""
    q_b, r_b = torch.linalg.qr(B)
    q_a, r_a = torch.linalg.qr(A.mT)
    u, s, vh = torch.linalg.svd(r_b @ r_a.mT)
    total = s.square().sum(-1)
    lost = s[:, r:].square().sum(-1) / total.clamp(min=1e-30)
    root = s[:, :r].sqrt()
    new_b = q_b @ (u[:, :, :r] * root.unsqueeze(1))
    new_a = (root.unsqueeze(-1) * vh[:, :r]) @ q_a.mT
    return new_a, new_b, float(lost.max().sqrt())


def check_trained(graph_pass: GraphPass, ragged: bool) -> None:
    """Refuse an adapter that was not trained, or that cannot be written as it is asked for.

    Raises:
        RuntimeError: No optimizer step was seen.
        ValueError: `ragged` with ``torch.nn.MultiheadAttention``.
    """
    if any(isinstance(layer, Attention) for layer in graph_pass.adapters.layers.values()):
        if ragged:
            raise ValueError(
                "ragged=True cannot be written for torch.nn.MultiheadAttention: PEFT builds its two adapters at one "
                "rank. Leave ragged out"
            )
        logger.warning(
            "the adapter is on torch.nn.MultiheadAttention; load it with structlora_pyg.load_lora: PEFT 0.21 adds the "
            "update of the output projection twice"
        )
    if graph_pass.step == 0:
        raise RuntimeError(
            "no optimizer step was seen: the adapter is untrained. Was the model never run in training mode, or the "
            "optimizer built before get_structlora_model, or given other parameters than model.parameters()?"
        )
    if not graph_pass.active:
        logger.warning(
            "training ended after %d optimizer steps, within the warm-up of %d: the adapter is a plain LoRA. Lower "
            "schedule.warmup_steps",
            graph_pass.step,
            graph_pass.warmup_steps,
        )


def write(
    model: PeftModel, graph_pass: GraphPass, folder: Path, facts: dict[str, str], ragged: bool = False
) -> dict[str, float]:
    """Write a plain PEFT LoRA folder and verify it, also of a model that was not trained yet.

    Gates, coordination and differing scalings are folded into lora_A and lora_B. Every layer gets the same rank
    (zero-padding is exact), because serving engines drop ``rank_pattern``.

    Args:
        model: The model; it is not changed.
        graph_pass: Its graph pass.
        folder: Where to write. Files in it are replaced at once, after verification.
        facts: What the file says about the base, see `fingerprint.base_facts`.
        ragged: Cut closed directions out and write each layer at its own rank.

    Returns:
        See `StructLoraModel.export`.

    Raises:
        RuntimeError: If verification fails.
        ValueError: Non-finite factors.
    """
    adapters, name = graph_pass.adapters, graph_pass.adapters.adapter_name
    factors, truncation = plain_factors(graph_pass)
    _check_finite(factors)
    written = {path: _cut(a, b) for path, (a, b) in factors.items()} if ragged else dict(factors)
    scalings = {path: layer.scaling[name] for path, layer in adapters.layers.items()}
    common = max(scalings.values())
    written = {path: (a, b * (scalings[path] / common)) for path, (a, b) in written.items()}
    rank = max(a.size(0) for a, _ in written.values())
    if not ragged:
        missing = {path: rank - a.size(0) for path, (a, _) in written.items()}
        written = {p: (F.pad(a, (0, 0, 0, missing[p])), F.pad(b, (0, missing[p]))) for p, (a, b) in written.items()}
    with whole(p for p in model.parameters() if p.requires_grad):
        state = get_peft_model_state_dict(model, adapter_name=name)
        state = {key: value.detach().clone() for key, value in state.items()}
    for path, (a, b) in written.items():
        for side, value in (("lora_A", a), ("lora_B", b)):
            key = f"base_model.model.{path}.{side}.weight"
            assert key in state, f"PEFT names no {key}"
            state[key] = value.to(state[key].dtype)
        if (key := f"base_model.model.{path}.lora_B.bias") in state:
            state[key] *= scalings[path] / common
    ranks = {path: a.size(0) for path, (a, _) in written.items() if a.size(0) != rank}
    content = serialise(state, facts)
    biases = {path: layer.lora_B[name].bias for path, layer in adapters.layers.items() if layer.lora_bias[name]}
    error = _verify(load(content), factors, biases, scalings, common)  # before anything is replaced
    replace_file(folder / ADAPTER_FILE, content)
    replace_file(folder / "adapter_config.json", _plain_config(model, name, rank, common, ranks))
    gate, exists = graph_pass.evaluated()[0].gate, graph_pass.graph.scaling != 0
    return {
        "relative_error": error,
        "truncation_error": truncation,
        "open_gates": float((gate[exists] != 0).float().mean()),
        "rank": rank,
    }


def _plain_config(model: PeftModel, name: str, rank: int, scaling: float, ranks: dict[str, int]) -> str:
    """Return the text of adapter_config.json: what PEFT would write, with the exported ranks."""
    lora: Any = model.peft_config[name]
    values = {k: v for k, v in lora.to_dict().items() if k not in ("runtime_config", "_custom_modules")}
    alpha = scaling * rank
    values |= {
        "r": rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "use_rslora": False,
        "inference_mode": True,
        "rank_pattern": {f"^{re.escape(path)}": r for path, r in ranks.items()},
        "alpha_pattern": {f"^{re.escape(path)}": scaling * r for path, r in ranks.items()},
        "base_model_name_or_path": lora.base_model_name_or_path
        or getattr(model.get_base_model(), "name_or_path", None),
    }
    values = {k: sorted(v) if isinstance(v, set) else v for k, v in values.items()}
    return json.dumps(values, indent=2, sort_keys=True, default=str)


def _verify(
    state: dict[str, Tensor],
    factors: Factors,
    biases: dict[str, Tensor],
    scalings: dict[str, float],
    common: float,
) -> float:
    """Compare every update as it will be read with the trained one, on random inputs; return the largest error."""
    worst = 0.0
    generator = torch.Generator().manual_seed(0)
    for path, (a, b) in factors.items():
        key = f"base_model.model.{path}"
        x = torch.randn(a.size(1), 4, generator=generator, dtype=torch.float64)
        want = b.cpu().double() @ (a.cpu().double() @ x)
        got = state[f"{key}.lora_B.weight"].double() @ (state[f"{key}.lora_A.weight"].double() @ x)
        if path in biases:
            want = want + biases[path].detach().cpu().double().unsqueeze(1)
            got = got + state[f"{key}.lora_B.bias"].double().unsqueeze(1)
        want, got = scalings[path] * want, common * got
        worst = max(worst, float((got - want).norm() / want.norm().clamp(min=1e-30)))
    limit = 0.02 if state[f"{key}.lora_A.weight"].element_size() < 4 else 1e-5
    if worst > limit:
        raise RuntimeError(f"the exported adapter differs from the trained one by {worst:.2e} (limit {limit:g})")
    return worst


def _check_finite(factors: Factors) -> None:
    for path, (a, b) in factors.items():
        if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
            raise ValueError(f"the factors of {path} are not finite; go back to the last good checkpoint")


def _cut(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Drop directions that add nothing; at least one stays, because PEFT has no rank 0."""
    keep = (b != 0).any(0) & (a != 0).any(1)
    keep[0] |= not bool(keep.any())
    return a[keep], b[:, keep]


def serialise(state: dict[str, Tensor], facts: dict[str, str] | None = None) -> bytes:
    """Return the content of a safetensors file, the same for the same tensors and facts."""
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}
    content = save(tensors, metadata={"format": "pt", **(facts or {})})
    # The library writes metadata in any order; the same adapter should be the same file.
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return content[:8] + text.ljust(start - 8) + content[start:]


def load_lora(base: nn.Module, folder: str | Path, adapter_name: str = "default") -> PeftModel:
    """Load a LoRA folder onto a base model with stock PEFT and our fused layers.

    `peft.PeftModel.from_pretrained` loads exported folders too; this adds what PEFT refuses by itself,
    ``torch_geometric.nn.Linear``, the fused forward, and ``torch.nn.MultiheadAttention``, see
    `structlora_pyg.tuner.layers.Attention`.

    Args:
        base: The base model the adapter was trained on.
        folder: A folder written by `StructLoraModel.export` or by PEFT.
        adapter_name: Name to load it under.

    Warns:
        AlarmWarning: If the folder says that it was trained on other base weights.
    """
    config = LoraConfig.from_pretrained(str(folder))
    config._register_custom_module(CUSTOM_LAYERS)
    if (file := Path(folder) / ADAPTER_FILE).is_file():
        check_base(base, config, file)
    return PeftModel.from_pretrained(base, str(folder), adapter_name=adapter_name, config=config)


def save_base(model: nn.Module, folder: Path) -> None:
    """Write the weights of a model without adapters: a Transformers folder, or ``model.safetensors`` of others."""
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(model, PreTrainedModel):
        model.save_pretrained(folder)
    else:
        save_model(model, str(folder / "model.safetensors"))


def merge(model: PeftModel, graph_pass: GraphPass, progressbar: bool = False) -> None:
    """Add the coordinated updates to the base weights in float32 or wider, cast once, and log the rounding error.

    Raises:
        ValueError: Weights that cannot hold an update, non-finite factors.
    """
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
                "the adapter, turn a copy of the base into floating point (structlora_pyg.tuner.quantization."
                "dequantize_4bit), load the adapter onto it with structlora_pyg.load_lora, and merge there"
            )
        if layer.lora_bias[name] and layer.get_base_layer().bias is None:
            raise ValueError(f"{path} has no bias that lora_bias could be merged into; export the adapter instead")
        if layer.merged:
            raise ValueError("the adapter is merged already; call unmerge_adapter() first")
    if model.active_adapters != [name]:
        model.set_adapter(name)  # PEFT takes the heads of the adapter that is active
    factors, truncation = plain_factors(graph_pass)
    _check_finite(factors)
    bar = tqdm(factors.items(), desc="merging", disable=not progressbar)
    worst = max([_merge_layer(adapters.layers[path], name, a, b) for path, (a, b) in bar])
    logger.info(
        "merged %d layers; relative rounding error of the update at most %.1e, of truncation %.1e",
        len(factors),
        worst,
        truncation,
    )
    for module in model.modules():
        if isinstance(module, TrainableTokensWrapper):
            module.token_adapter.merge(safe_merge=True, adapter_names=[name])


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
