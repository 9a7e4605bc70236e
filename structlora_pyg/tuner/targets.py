"""Which layers an adapter goes to: a configuration checked against a model, every problem at once."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch_geometric.backend
import torch_geometric.nn as pyg_nn
import torch_geometric.typing
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTuner, check_target_module_exists
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN
from peft.utils.other import get_pattern_key
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from transformers.pytorch_utils import Conv1D

from structlora_pyg.checks import ConfigError, nearest
from structlora_pyg.config import StructLoraConfig, rewrites_base
from structlora_pyg.data.adapters import fused_parts, is_fused
from structlora_pyg.tuner.layers import CUSTOM_LAYERS

LINEAR = (nn.Linear, Conv1D, pyg_nn.Linear)
CALLED = (*LINEAR, nn.MultiheadAttention)
PER_TYPE = "lins"  # where HeteroDictLinear keeps one linear layer per type
# PEFT's variants of LoRA with parameters of the size of the rank.
VARIANTS = ("use_bdlora", "kasa_config", "monteclora_config")
# Matrices of all types, relations or layers in one parameter, which PEFT adapts as it does experts.
STACKED: dict[type[nn.Module], tuple[str, ...]] = {
    pyg_nn.HeteroLinear: ("weight",),
    pyg_nn.RGCNConv: ("weight", "root"),
    pyg_nn.RGATConv: ("weight", "basis"),
    pyg_nn.GatedGraphConv: ("weight",),
}
# What PEFT trains and saves too, by task type.
HEADS = {"SEQ_CLS": ["classifier", "score"], "TOKEN_CLS": ["classifier", "score"], "QUESTION_ANS": ["qa_outputs"]}


def plain_lora(model: nn.Module, config: StructLoraConfig) -> LoraConfig:
    """Return the PEFT configuration to inject, after checking it against the model.

    Raises:
        ConfigError: With everything that does not fit.
    """
    unfinished = sorted({n.rpartition(".")[0] for n, p in model.named_parameters() if is_lazy(p)})
    if unfinished:
        raise ConfigError(
            [
                f"{_some(unfinished)}: lazy (in_channels=-1), so the widths are not known yet; run the model once "
                "before adapting it, with torch.no_grad(): model(...), or load its weights"
            ]
        )
    own_start = config.init_lora_weights in ("shared", "gradient")
    lora: Any = config.to_lora_config(**({"init_lora_weights": True} if own_start else {}))
    lora._register_custom_module({**(config._custom_modules or {}), **CUSTOM_LAYERS})
    lora.modules_to_save = [*(lora.modules_to_save or []), *HEADS.get(lora.task_type or "", [])] or None
    # Experts that were layers once are parameters in Transformers 5; PEFT goes on to target them by their old names.
    convert_peft_config_for_transformers(lora, model, None)
    linear = adaptable(model)
    stacked = {n: m for n, m in model.named_modules() if n and isinstance(m, tuple(STACKED))}
    if lora.target_modules == "all-linear":
        head = getattr(model, "get_output_embeddings", lambda: None)()
        whole = [*(name for names in HEADS.values() for name in names), *(config.modules_to_save or [])]
        every = {**linear, **stacked}
        lora.target_modules = {n for n, m in every.items() if m is not head and n.split(".")[-1] not in whole}
    elif lora.target_modules is None and not lora.target_parameters:
        _defaults_of_architecture(model, lora)
    chosen = _chosen(model, lora)
    found = _target_problems(model, lora, linear, chosen)
    own = rewrites_base(lora) or any(getattr(lora, key) for key in VARIANTS)
    dense = [n for n, m in chosen.items() if own or not isinstance(m, CALLED)] + list(lora.target_parameters or [])
    if config.coordinator.lift == "dense" and dense:
        found.append(
            f"coordinator.lift=dense gives {_some(dense)} another rank, which only linear layers of plain LoRA can have"
        )
    for name, module in chosen.items():
        try:
            k = len(fused_parts(model, name, module, config.fused_slices))
        except ValueError as error:
            found.append(str(error))
            continue
        if k:
            # k slices of rank r in one LoRA of rank k r: the same alpha / r needs k alpha, alpha / sqrt(r) its root.
            rank = _by_pattern(config.rank_pattern, name, config.r)
            alpha = _by_pattern(config.alpha_pattern, name, config.lora_alpha)
            only = f"^{re.escape(name)}"
            lora.rank_pattern = {only: rank * k, **lora.rank_pattern}
            lora.alpha_pattern = {only: alpha * (k**0.5 if config.use_rslora else k), **lora.alpha_pattern}
        weight: Any = getattr(module, "in_proj_weight", getattr(module, "weight", None))
        readable = isinstance(weight, Tensor) and weight.is_floating_point() and not weight.is_meta
        if readable and not torch.isfinite(weight).all():
            found.append(f"{name}.weight holds NaN or infinite values; reload the base model")
    if config.fused_slices and not any(is_fused(n, m) for n, m in chosen.items()):
        found.append("fused_slices has no effect: no target module is named qkv or c_attn, or an attention; remove it")
    attentions = [n for n, m in chosen.items() if isinstance(m, nn.MultiheadAttention)]
    attentions += list(lora.target_parameters or [])
    for key, value in (("lora_dropout", config.lora_dropout), ("lora_bias", config.lora_bias)):
        if value and attentions:
            found.append(
                f"{key}={value} has no effect on {_some(attentions)} (read as a weight, and so is the update); leave "
                "it out, or target other layers"
            )
    if found:
        raise ConfigError(found)
    return lora


def adaptable(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers that ``all-linear`` means, by name: linear ones, and attentions of torch as a whole."""
    attentions = {n: m for n, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)}
    inside = {f"{n}.out_proj" for n in attentions}
    found = {n: m for n, m in model.named_modules() if isinstance(m, LINEAR) and n and n not in inside}
    return found | {n: m for n, m in attentions.items() if n and m.in_proj_weight is not None}


def _chosen(model: nn.Module, lora: Any) -> dict[str, nn.Module]:
    """Return the targets by name; a `HeteroDictLinear` stands for its layers, a `STACKED` one for its parameters."""
    chosen = {n: m for n, m in model.named_modules() if n and matches(lora, n)}
    stacked: dict[str, Any] = {n: m for n, m in chosen.items() if isinstance(m, tuple(STACKED))}
    if stacked:
        chosen = {n: m for n, m in chosen.items() if n not in stacked}
        lora.target_modules = set(chosen) or None
        for name, module in stacked.items():
            own = dict(module.named_parameters(recurse=False))
            names = [key for kind, keys in STACKED.items() if isinstance(module, kind) for key in keys if key in own]
            lora.target_parameters = [*(lora.target_parameters or []), *(f"{name}.{key}" for key in names)]
    dictionaries = {n: m for n, m in chosen.items() if isinstance(m, pyg_nn.HeteroDictLinear)}
    if dictionaries:
        layers = [f"{n}.{PER_TYPE}.{key}" for n, m in dictionaries.items() for key in m.lins]
        chosen = {n: model.get_submodule(n) for n in [*(n for n in chosen if n not in dictionaries), *layers]}
        lora.target_modules = set(chosen)
    return chosen


def _nothing_chosen(model: nn.Module, lora: LoraConfig, leaves: list[str]) -> str:
    """Return which option is the cause that no module is a target."""
    if not leaves:
        return (
            f"{type(model).__name__} has no linear layer that LoRA could adapt; its weights are parameters of its own, "
            "which target_parameters can name"
        )
    names = [name for name, _ in model.named_modules() if name]
    for option in ("exclude_modules", "layers_to_transform", "modules_to_save"):
        without = copy.copy(lora)
        setattr(without, option, None)
        if left := [name for name in names if matches(without, name)]:
            pattern = f" (layers_pattern={lora.layers_pattern!r})" if option == "layers_to_transform" else ""
            return (
                f"{option}={getattr(lora, option)!r}{pattern} leaves out every module that "
                f"target_modules={lora.target_modules!r} matches, first {left[0]}"
            )
    return f"no module matches target_modules={lora.target_modules!r}; linear layers: {_some(leaves)}"


def _target_problems(model: nn.Module, lora: LoraConfig, linear: dict, chosen: dict) -> list[str]:
    leaves = sorted({name.rpartition(".")[2] for name in linear})
    found: list[str] = []
    missing: list[str] = []
    parametrized = re.compile(r"\.parametrizations(\.\w+)\.original\d*$")
    parameters = {parametrized.sub(r"\1", name): p.dim() for name, p in model.named_parameters()}
    adapted = bool(chosen)
    modules = dict.fromkeys(name for name, _ in model.named_modules())
    for kind, targets, known in (
        ("module", lora.target_modules, modules),
        ("parameter", lora.target_parameters, parameters),
    ):
        for target in sorted(targets or ()) if not isinstance(targets, str) else ():
            there = [n for n in known if f".{n}".endswith(f".{target}")]
            if not there:
                options = leaves if kind == "module" else sorted({n.rpartition(".")[2] for n in known})
                hint = nearest(target, options)
                missing.append(f"target {kind} {target!r} is not in the model.{hint} There are: {_some(options)}")
            elif kind == "parameter" and any(parameters[n] > 3 for n in there):
                found.append(
                    f"{target} is cut into blocks, which LoRA cannot adapt; leave it out, or set num_blocks=None"
                )
            adapted |= bool(there) and kind == "parameter"
    if adapted:
        for text in missing:
            warnings.warn(text, RuntimeWarning, stacklevel=6)  # one list of names for many models is common
    else:
        found += missing or [_nothing_chosen(model, lora, leaves)]
    aliases: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        aliases.setdefault(id(module), []).append(name)
    for name, module in chosen.items():
        parents = [model.get_submodule(".".join(name.split(".")[:i])) for i in range(name.count(".") + 1)]
        names = aliases[id(module)]
        if isinstance(parents[-1], nn.MultiheadAttention):
            found.append(
                f"{name} belongs to torch.nn.MultiheadAttention, which never calls it; target the attention itself, "
                f"{name.rpartition('.')[0] or 'or other layers'}"
            )
        if isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is None:
            found.append(f"{name} has inputs of different widths (kdim, vdim), which PEFT cannot adapt; leave it out")
        if not isinstance(module, CALLED) and (inside := [n for n in linear if n.startswith(f"{name}.")]):
            found.append(f"{name} is a {type(module).__name__}, not a layer; target layers inside: {_some(inside)}")
        if len(names) > 1:
            found.append(
                f"{' and '.join(names)} are one module: an adapter would act on the first alone. Separate them, "
                f"model.{names[1]} = copy.deepcopy(model.{names[0]}), or target other layers"
            )
        if isinstance(parents[-1], nn.TransformerEncoderLayer) and torch.backends.mha.get_fastpath_enabled():
            found.append(
                f"{name} is in a torch.nn.TransformerEncoderLayer, which reads weights past their layers in "
                "evaluation; call torch.backends.mha.set_fastpath_enabled(False) first"
            )
        dictionary = parents[-2] if len(parents) > 1 else None
        if isinstance(dictionary, pyg_nn.HeteroDictLinear) and _reads_weights(dictionary):
            found.append(
                f"{name} is one of {len(dictionary.lins)} types, whose weights HeteroDictLinear reads past their "
                "layers; set torch_geometric.backend.use_segment_matmul = False first"
            )
    return found


def _reads_weights(layer: pyg_nn.HeteroDictLinear) -> bool:
    """Tell whether a `HeteroDictLinear` takes its grouped kernel, which adapters cannot be in."""
    wanted = torch_geometric.backend.use_segment_matmul
    many = len(layer.lins) >= 10 if wanted is None else wanted  # PyG's own threshold
    return bool(many and torch_geometric.typing.WITH_GMM)


def _by_pattern(pattern: dict[str, Any] | None, name: str, default: Any) -> Any:
    """Return the value PEFT's rank_pattern or alpha_pattern gives a module."""
    known = pattern or {}
    return known.get(get_pattern_key(list(known), name), default)


def _some(names: Sequence[str], most: int = 12) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def matches(lora: LoraConfig, name: str) -> bool:
    """Tell whether a configuration targets a module."""
    return bool(check_target_module_exists(lora, name))


def _defaults_of_architecture(model: nn.Module, lora: Any) -> None:
    """Fill target_modules with what PEFT uses for a Transformers architecture."""
    kind = BaseTuner.get_model_config(model).get("model_type")
    if kind not in KNOWN:
        leaves = sorted({n.rpartition(".")[2] for n in adaptable(model)})
        raise ConfigError(
            [f"Please specify `target_modules`: 'all-linear', or names; the model's linear layers: {_some(leaves)}"]
        )
    lora.target_modules = KNOWN[kind] if isinstance(KNOWN[kind], str) else set(KNOWN[kind])
