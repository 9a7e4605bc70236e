"""Out of training: plain LoRA folders."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load, save, save_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from structlora_pyg.files import replace_file
from structlora_pyg.tuner.distributed import whole
from structlora_pyg.tuner.fingerprint import base_facts
from structlora_pyg.tuner.graph_pass import GraphPass, join
from structlora_pyg.tuner.layers import Attention

if TYPE_CHECKING:
    from structlora_pyg.tuner.model import StructLoraModel

logger = logging.getLogger(__name__)

ADAPTER_FILE = "adapter_model.safetensors"


@torch.no_grad()
def plain_factors(graph_pass: GraphPass) -> tuple[dict[str, tuple[Tensor, Tensor]], float]:
    """Return (A, B) in float32 of every adapted layer with gates and coordination folded in, and the largest error.

    A lift that keeps the rank is exact (error 0). ``dense`` is cut to the adapter's rank by SVD; the error is relative
    to the norm of the update.
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


def export(model: StructLoraModel, folder: Path, ragged: bool = False) -> dict[str, float]:
    """Write a plain PEFT LoRA folder and verify it.

    Gates, coordination and differing scalings are folded into lora_A and lora_B. Every layer gets the same rank
    (zero-padding is exact), because serving engines drop ``rank_pattern``.

    Args:
        model: A trained model; it is not changed and can train on.
        folder: Where to write. Files in it are replaced at once, after verification.
        ragged: Cut closed directions out and write each layer at its own rank.

    Returns:
        ``relative_error`` of the written update against the coordinated one, ``truncation_error`` of the dense lift,
        ``open_gates`` in [0, 1], ``rank`` (the largest written).

    Raises:
        RuntimeError: If nothing was ever coordinated or no optimizer step was seen (the adapter would be an untrained
            or a plain LoRA without anybody noticing); if verification fails.
        ValueError: Non-finite factors.
    """
    _check(model.graph_pass, ragged)
    return write(model, folder, ragged)


def _check(graph_pass: GraphPass, ragged: bool) -> None:
    """Refuse an adapter that was not trained, or that cannot be written as it is asked for."""
    with whole(graph_pass.adapters.parameters()):
        graph_pass.count_steps()
    if graph_pass.passes == 0:
        raise RuntimeError("nothing was coordinated: the model was never run, so there is nothing to export. Train it")
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
            "no optimizer step was seen: the adapter is untrained. Was the optimizer built before "
            "get_structlora_model, or given other parameters than model.parameters()?"
        )
    if not graph_pass.active:
        logger.warning(
            "training ended after %d optimizer steps, within the warm-up of %d: the adapter is a plain LoRA. Lower "
            "schedule.warmup_steps",
            graph_pass.step,
            graph_pass.warmup_steps,
        )


def write(model: StructLoraModel, folder: Path, ragged: bool = False) -> dict[str, float]:
    """Write the folder as `export` does, also of a model that was not trained yet."""
    graph_pass = model.graph_pass
    adapters, name = graph_pass.adapters, graph_pass.adapters.adapter_name
    factors, truncation = plain_factors(graph_pass)
    for path, (a, b) in factors.items():
        if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
            raise ValueError(f"the factors of {path} are not finite; go back to the last good checkpoint")
    written = {path: _cut(a, b) for path, (a, b) in factors.items()} if ragged else dict(factors)
    scalings = {path: layer.scaling[name] for path, layer in adapters.layers.items()}
    common = max(scalings.values())
    written = {path: (a, b * (scalings[path] / common)) for path, (a, b) in written.items()}
    rank = max(a.size(0) for a, _ in written.values())
    if not ragged:
        written = {path: _pad(a, b, rank) for path, (a, b) in written.items()}
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
    config = _plain_config(model, rank, common, ranks)
    facts = model.base_facts
    facts = base_facts(model.get_base_model(), model.structlora_config) if facts is None else facts
    content = serialise(state, facts)
    biases = {path: layer.lora_B[name].bias for path, layer in adapters.layers.items() if layer.lora_bias[name]}
    error = _verify(load(content), factors, biases, scalings, common)  # before anything is replaced
    replace_file(folder / ADAPTER_FILE, content)
    replace_file(folder / "adapter_config.json", config)
    gate = model.adapter_graph().gate
    exists = graph_pass.graph.scaling != 0
    return {
        "relative_error": error,
        "truncation_error": truncation,
        "open_gates": float((gate[exists] != 0).float().mean()),
        "rank": rank,
    }


def _plain_config(model: StructLoraModel, rank: int, scaling: float, ranks: dict[str, int]) -> str:
    """Return the text of adapter_config.json: what PEFT would write, with the exported ranks."""
    name = model.graph_pass.adapters.adapter_name
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
    factors: dict[str, tuple[Tensor, Tensor]],
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


def _cut(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Drop directions that add nothing; at least one stays, because PEFT has no rank 0."""
    keep = (b != 0).any(0) & (a != 0).any(1)
    keep[0] |= not bool(keep.any())
    return a[keep], b[:, keep]


def _pad(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    missing = rank - a.size(0)
    return torch.nn.functional.pad(a, (0, 0, 0, missing)), torch.nn.functional.pad(b, (0, missing))


def save_base(model: nn.Module, folder: Path) -> None:
    """Write the weights of a model without adapters: a Transformers folder, or ``model.safetensors`` of others."""
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(model, PreTrainedModel):
        model.save_pretrained(folder)
    else:
        save_model(model, str(folder / "model.safetensors"))


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
