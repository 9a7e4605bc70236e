"""Out of training: plain LoRA folders, merged base models, and the state to continue from."""

from __future__ import annotations

import json
import logging
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, get_peft_model_state_dict
from peft.utils.other import TrainableTokensWrapper
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, load_file, save, save_model
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from structlora_pyg.config import StructLoraConfig
from structlora_pyg.edge_log import EdgeLog
from structlora_pyg.files import replace_file
from structlora_pyg.fingerprint import base_facts
from structlora_pyg.layers import Attention, base_weight
from structlora_pyg.pipeline import Coordination, join
from structlora_pyg.zero3 import is_cut, whole

if TYPE_CHECKING:
    from structlora_pyg.model import StructLoraModel

logger = logging.getLogger(__name__)

ADAPTER_FILE = "adapter_model.safetensors"
STATE_FILE = "structlora_state.safetensors"
CONFIG_FILE = "structlora_config.json"
OF_ADAPTER = re.compile(r"\.(?:lora_\w+|modules_to_save|trainable_tokens_\w+)\.([^.]+)")  # PEFT's names of parameters


@torch.no_grad()
def plain_factors(coordination: Coordination) -> tuple[dict[str, tuple[Tensor, Tensor]], float]:
    """Return (A, B) in float32 of every adapted layer with gates and coordination folded in, and the largest error.

    A lift that keeps the rank is exact (error 0). ``dense`` is cut to the adapter's rank by SVD; the error is relative
    to the norm of the update.
    """
    _, lifted = coordination.evaluated()
    adapters, worst = coordination.adapters, 0.0
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
    _check(model.coordination, ragged)
    return _write(model, folder, ragged)


def _check(coordination: Coordination, ragged: bool) -> None:
    """Refuse an adapter that was not trained, or that cannot be written as it is asked for."""
    with whole(coordination.adapters.parameters()):
        coordination.count_steps()
    if coordination.coordinations == 0:
        raise RuntimeError("nothing was coordinated: the model was never run, so there is nothing to export. Train it")
    if any(isinstance(layer, Attention) for layer in coordination.adapters.layers.values()):
        if ragged:
            raise ValueError(
                "ragged=True cannot be written for torch.nn.MultiheadAttention: PEFT builds its two adapters at one "
                "rank. Leave ragged out"
            )
        logger.warning(
            "the adapter is on torch.nn.MultiheadAttention; load it with structlora_pyg.load_lora: PEFT 0.21 adds the "
            "update of the output projection twice"
        )
    if coordination.step == 0:
        raise RuntimeError(
            "no optimizer step was seen: the adapter is untrained. Was the optimizer built before "
            "get_structlora_model, or given other parameters than model.parameters()?"
        )
    if not coordination.active:
        logger.warning(
            "training ended after %d optimizer steps, within the warm-up of %d: the adapter is a plain LoRA. Lower "
            "schedule.warmup_steps",
            coordination.step,
            coordination.warmup_steps,
        )


def _write(model: StructLoraModel, folder: Path, ragged: bool = False) -> dict[str, float]:
    coordination = model.coordination
    adapters, name = coordination.adapters, coordination.adapters.adapter_name
    factors, truncation = plain_factors(coordination)
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
    content = _serialise(state, facts)
    biases = {path: layer.lora_B[name].bias for path, layer in adapters.layers.items() if layer.lora_bias[name]}
    error = _verify(load(content), factors, biases, scalings, common)  # before anything is replaced
    replace_file(folder / ADAPTER_FILE, content)
    replace_file(folder / "adapter_config.json", config)
    gate = model.adapter_graph().gate
    exists = coordination.graph.scaling != 0
    return {
        "relative_error": error,
        "truncation_error": truncation,
        "open_gates": float((gate[exists] != 0).float().mean()),
        "rank": rank,
    }


def _plain_config(model: StructLoraModel, rank: int, scaling: float, ranks: dict[str, int]) -> str:
    """Return the text of adapter_config.json: what PEFT would write, with the exported ranks."""
    name = model.coordination.adapters.adapter_name
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


def merge_and_unload(model: StructLoraModel, progressbar: bool = False) -> nn.Module:
    """Merge in float32 or wider, cast once, log the rounding error, return the base module; see `StructLoraModel`."""
    coordination = model.coordination
    adapters, name = coordination.adapters, coordination.adapters.adapter_name
    for path, layer in adapters.layers.items():
        weight = base_weight(layer)
        if is_cut(weight) or isinstance(weight, DTensor):
            raise ValueError(
                f"{path} is cut over the processes, which cannot merge into it. Call export(folder) on every process, "
                "load the folder onto a whole base (structlora_pyg.load_lora), and merge there"
            )
        if not weight.is_floating_point() or type(weight) is not nn.Parameter:
            raise ValueError(
                f"{path} is quantised ({type(weight).__name__}): merging into it would round the update away. Export "
                "the adapter, turn a copy of the base into floating point "
                "(structlora_pyg.quantization.dequantize_4bit), load the adapter onto it with peft.PeftModel, and "
                "merge there"
            )
        if layer.lora_bias[name] and layer.get_base_layer().bias is None:
            raise ValueError(f"{path} has no bias that lora_bias could be merged into; export the adapter instead")
        if layer.merged:
            raise ValueError("the adapter is merged already; call unmerge_adapter() first")
    if model.active_adapters != [name]:
        model.set_adapter(name)  # PEFT takes the heads of the adapter that is active
    factors, truncation = plain_factors(coordination)
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
            factor.lift(value)
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


def save_base(model: nn.Module, folder: Path) -> None:
    """Write the weights of a model without adapters: a Transformers folder, or ``model.safetensors`` of others."""
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(model, PreTrainedModel):
        model.save_pretrained(folder)
    else:
        save_model(model, str(folder / "model.safetensors"))


def save_checkpoint(model: StructLoraModel, folder: Path) -> None:
    """Write the plain adapter, and beside it everything needed to continue training exactly."""
    config = json.dumps(_config_dict(model), indent=2, sort_keys=True, default=str)
    _write(model, folder)  # first: it checks that the factors are finite
    replace_file(folder / STATE_FILE, _serialise(training_state(model)))
    replace_file(folder / CONFIG_FILE, config)


def training_state(model: StructLoraModel) -> dict[str, Tensor]:
    """Return all that training changes: the coordinated adapter, trained weights of the base, and the graph pass.

    Other adapters are PEFT's to save; which one is active makes no difference.
    """
    name = model.coordination.adapters.adapter_name
    owners = {n: adapter_of(n) for n, _ in model.named_parameters()}
    state = {
        f"parameter.{n}": p.detach()
        for n, p in model.named_parameters()
        if not n.startswith("coordination.") and (owners[n] == name or (owners[n] is None and p.requires_grad))
    }
    return state | {f"coordination.{n}": v for n, v in model.coordination.state_dict().items()}


def adapter_of(parameter: str) -> str | None:
    """Return which adapter a parameter belongs to, by its name; None for those of the base."""
    found = OF_ADAPTER.search(parameter)
    return found[1] if found else None


def load_training_state(model: StructLoraModel, folder: Path) -> None:
    """Restore what `save_checkpoint` wrote; checks everything before it changes anything."""
    file = folder / STATE_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{folder} holds no {STATE_FILE}; it is not a checkpoint of StructLoraModel")
    try:
        state = load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is damaged ({error}); use another checkpoint") from error
    state = {n: v.reshape(1) if n.endswith(".gain") else v for n, v in state.items()}  # a scalar in release 0.1
    name = model.coordination.adapters.adapter_name
    owners = sorted({found for n in state if n.startswith("parameter.") and (found := adapter_of(n))})
    if name not in owners:
        raise ValueError(
            f"{file} holds the adapter {', '.join(owners)}, and this model's is {name}; give the model the same name "
            "(adapter_name=...)"
        )
    # Files once held every adapter.
    state = {n: v for n, v in state.items() if n.startswith("coordination.") or adapter_of(n) in (None, name)}
    want, got = (
        {n: v.shape for n, v in s.items() if not n.endswith("edge_log._extra_state")}  # it grows
        for s in (training_state(model), state)
    )
    if want != got:
        differing = sorted(n for n in want.keys() | got.keys() if want.get(n) != got.get(n))
        raise ValueError(
            f"{file} does not fit this model: {len(differing)} tensors differ, first {differing[0]} (file "
            f"{tuple(got.get(differing[0], ()))}, model {tuple(want.get(differing[0], ()))}). Build the model with the "
            f"configuration in {CONFIG_FILE}"
        )
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for n, value in state.items():
            if n.startswith("parameter."):
                parameters[n.removeprefix("parameter.")].copy_(value)
    own = {n.removeprefix("coordination."): v for n, v in state.items() if n.startswith("coordination.")}
    empty = EdgeLog().get_extra_state()  # for states written before there was a log
    model.coordination.load_state_dict({"edge_log._extra_state": empty, **own})


def check_sizes(config: StructLoraConfig, folder: Path) -> None:
    """Refuse a configuration whose sizes its training state cannot have, before memory is taken for them.

    Raises:
        FileNotFoundError: If there is no training state.
        ValueError: If it is damaged, a size is larger than the count of all numbers in it, or its convolution was an
            object, which no file holds.
    """
    file = folder / STATE_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{folder} holds no {STATE_FILE}; it is not a checkpoint of StructLoraModel")
    try:
        with safe_open(file, framework="pt") as stream:
            names = stream.keys()
            numbers = sum(math.prod(stream.get_slice(name).get_shape()) for name in names)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is damaged ({error}); use another checkpoint") from error
    coordinator = config.coordinator
    if coordinator.conv is None and any(name.endswith(".gain") for name in names):
        raise ValueError(
            f"{folder} was saved with a convolution given as an object, which {CONFIG_FILE} cannot hold. Build the "
            "model with get_structlora_model(base, config), where config has that convolution, and call "
            "model.load_training_state(folder)"
        )
    sizes = {
        "r": config.r,
        **{f"rank_pattern.{k}": v for k, v in (config.rank_pattern or {}).items()},
        "encoding.size": config.encoding.size,
        "graph.virtual_nodes": config.graph.virtual_nodes,
        "coordinator.num_layers": coordinator.num_layers,
        "coordinator.hidden_channels": coordinator.hidden_channels,
        **{f"coordinator.conv_kwargs.{k}": v for k, v in coordinator.conv_kwargs.items()},
    }
    for name, size in sizes.items():
        if isinstance(size, int) and size > numbers:
            raise ValueError(
                f"{folder / CONFIG_FILE} says {name}={size}, but {STATE_FILE} holds {numbers} numbers in all: they do "
                "not belong together. Use another checkpoint"
            )


def load_structlora_config(folder: Path) -> StructLoraConfig:
    """Return the configuration that `save_checkpoint` wrote into a folder.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is damaged.
    """
    file = folder / CONFIG_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{folder} holds no {CONFIG_FILE}; it is not a checkpoint of StructLoraModel")
    try:
        return StructLoraConfig(**json.loads(file.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, TypeError) as error:
        raise ValueError(f"{file} is damaged ({error}); use another checkpoint") from error


def _config_dict(model: StructLoraModel) -> dict[str, Any]:
    config = model.structlora_config
    lora = LoraConfig().to_dict()
    changed = {k: v for k, v in config.to_lora_config().to_dict().items() if k in lora and v != lora[k]}
    changed = {k: sorted(v) if isinstance(v, set) else v for k, v in changed.items()}
    return {**changed, **config.own_fields()}


def _serialise(state: dict[str, Tensor], facts: dict[str, str] | None = None) -> bytes:
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}
    content = save(tensors, metadata={"format": "pt", **(facts or {})})
    # The library writes metadata in any order; the same adapter should be the same file.
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return content[:8] + text.ljust(start - 8) + content[start:]
