"""A fingerprint of frozen weights: did they change, and is this the base that an adapter was trained on?"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors import safe_open
from torch import nn
from torch.distributed.tensor import DTensor

from structlora_pyg.config import rewrites_base
from structlora_pyg.tuner.alarms import AlarmWarning
from structlora_pyg.tuner.distributed import whole

PLAIN = (nn.Parameter, torch.Tensor)
OF_PEFT = (".lora_", ".modules_to_save.", ".original_module.", ".trainable_tokens_")  # not of the base
SAMPLES = 64  # values per tensor; an optimizer step or another checkpoint changes nearly all of them


def fingerprint(
    model: nn.Module, leave_out: Iterable[str] = (), frozen: bool = False, gather: bool = False
) -> dict[str, str]:
    """Return a digest of every weight of a base model, from a few values each: cheap at any size.

    Names and digests are the same with and without adapters of PEFT around the model, on any device. Weights in
    another data type have another digest.

    Args:
        model: The base model, possibly with adapters injected.
        leave_out: Names of modules that are trained as a whole (PEFT's ``modules_to_save``), such as a new head.
        frozen: Leave out what is trainable too.
        gather: Put the parts of sharded weights together, one weight after the other. Every process has to call.

    Returns:
        ``{name: "dtype:digest"}``. Quantised and meta tensors are left out, and sharded ones without `gather`.
    """
    found = {}
    for name, parameter in model.named_parameters():
        plain = name.replace(".token_adapter.", ".").replace(".base_layer.", ".")
        inside = f".{plain}"
        if any(mark in inside for mark in OF_PEFT):
            continue
        if any(f".{part}." in inside for part in leave_out) or (frozen and parameter.requires_grad):
            continue
        with whole([parameter]):
            value = parameter.full_tensor() if gather and isinstance(parameter, DTensor) else parameter
            if not value.is_meta and value.is_floating_point() and type(value) in PLAIN:
                found[plain] = f"{str(value.dtype).removeprefix('torch.')}:{_digest(value)}"
    return found


def base_facts(base: nn.Module, config: LoraConfig) -> dict[str, str]:
    """Return what an adapter's file says about its base: one digest of all weights, and their data types.

    Empty where the adapter changes the base's own weights (``bias``, KaSA, PiSSA), and for bases without plain weights.
    """
    own = config.bias == "none" and config.kasa_config is None and not rewrites_base(config)
    digests = fingerprint(base, config.modules_to_save or ()) if own else {}
    if not digests:
        return {}
    kinds = sorted({digest.partition(":")[0] for digest in digests.values()})
    whole = hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()[:32]
    return {"base_fingerprint": whole, "base_dtype": ",".join(kinds)}


def check_base(base: nn.Module, config: LoraConfig, file: Path) -> None:
    """Warn if an adapter's file says that it was trained on another base model.

    Nothing is said where that cannot be told: the file is by another library, or the base has another data type.
    """
    with safe_open(file, framework="pt") as stream:
        stored = stream.metadata() or {}
    facts = base_facts(base, config)
    same_kind = stored.get("base_dtype") == facts.get("base_dtype")
    if same_kind and stored.get("base_fingerprint") != facts.get("base_fingerprint"):
        name = config.base_model_name_or_path or "its folder does not name it"
        warnings.warn(
            f"{file.parent} was trained on another base model than this one ({name}): its update will not mean the "
            "same here. Load the weights it was trained on",
            AlarmWarning,
            stacklevel=3,
        )


def changed(before: dict[str, str], after: dict[str, str]) -> list[str]:
    """Return the names of the weights that changed; those whose data type changed cannot be compared."""
    return [
        name
        for name in before.keys() & after.keys()
        if before[name] != after[name] and before[name].partition(":")[0] == after[name].partition(":")[0]
    ]


def _digest(parameter: torch.Tensor) -> str:
    values = parameter.detach().flatten()
    step = max(1, values.numel() // SAMPLES)
    sample = values[::step].float().cpu().numpy().tobytes()
    return hashlib.sha256(f"{tuple(parameter.shape)}".encode() + sample).hexdigest()[:16]
