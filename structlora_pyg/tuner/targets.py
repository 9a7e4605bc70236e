"""Which layers an adapter goes to: a configuration checked against a model, every problem at once."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
import torch_geometric.backend
import torch_geometric.nn as pyg_nn
import torch_geometric.typing
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import nn
from torch.nn.parameter import is_lazy
from transformers.pytorch_utils import Conv1D

from structlora_pyg.checks import ConfigError, nearest
from structlora_pyg.config import StructLoraConfig
from structlora_pyg.data.adapters import is_fused
from structlora_pyg.tuner.layers import CUSTOM_LAYERS, base_weight

LINEAR = (nn.Linear, Conv1D, pyg_nn.Linear)
CALLED = (*LINEAR, nn.MultiheadAttention)
PER_TYPE = "lins"  # where HeteroDictLinear keeps one linear layer per type
# What PEFT trains and saves too, by task type.
HEADS = {"SEQ_CLS": ["classifier", "score"], "TOKEN_CLS": ["classifier", "score"], "QUESTION_ANS": ["qa_outputs"]}


def plain_lora(model: nn.Module, config: StructLoraConfig) -> LoraConfig:
    """Return the PEFT configuration to inject, after checking it against the model.

    Raises:
        ConfigError: With everything that does not fit.
    """
    linear = adaptable(model)
    targets = config.target_modules
    unfinished = sorted({n.rpartition(".")[0] for n, p in model.named_parameters() if is_lazy(p)})
    if unfinished:
        raise ConfigError(
            [
                f"{_some(unfinished)}: lazy (in_channels=-1), so the widths are not known yet; run the model once "
                "before adapting it, with torch.no_grad(): model(...), or load its weights"
            ]
        )
    if targets == "all-linear":
        head = getattr(model, "get_output_embeddings", lambda: None)()
        whole = [*(name for names in HEADS.values() for name in names), *(config.modules_to_save or [])]
        targets = [n for n, m in linear.items() if m is not head and n.split(".")[-1] not in whole]
    starts_differently = config.init_lora_weights in ("shared", "gradient")
    changes: dict[str, Any] = {"target_modules": targets}
    if starts_differently:
        changes["init_lora_weights"] = True
    heads = [*(config.modules_to_save or []), *HEADS.get(config.task_type or "", [])]
    probe = config.to_lora_config(**changes, modules_to_save=heads or None)
    if targets is None:
        _defaults_of_architecture(model, probe)
    chosen = _chosen(model, probe)
    found = _target_problems(model, probe, linear, chosen)
    rank_pattern, alpha_pattern = {}, {}
    for name, module in chosen.items():
        d_in, d_out = _widths(module)
        if isinstance(module, (nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            found.append(f"{name} is a {type(module).__name__}, which is no linear map; leave it out of target_modules")
        if d_in < 1:
            continue
        rank = _by_pattern(config.rank_pattern, name, config.r)
        alpha = _by_pattern(config.alpha_pattern, name, config.lora_alpha)
        if config.fused_slices and is_fused(name, module):
            if d_out % 3:
                found.append(f"{name} has {d_out} outputs, which are not three equal slices; leave fused_slices out")
            k = len(config.fused_slices)
            # k slices of rank r in one LoRA of rank k r: the same alpha / r needs k alpha, alpha / sqrt(r) its root.
            only = f"^{re.escape(name)}"
            rank_pattern[only], alpha_pattern[only] = rank * k, alpha * (k**0.5 if config.use_rslora else k)
            d_out //= 3
        if rank > min(d_in, d_out):
            least = f"use r <= {min(d_in, d_out)}, or exclude_modules"
            found.append(f"r={rank} is above the width of {name} ({d_out} x {d_in}); {least}")
        weight: Any = base_weight(module)
        if (
            weight is not None
            and weight.is_floating_point()
            and not weight.is_meta
            and not torch.isfinite(weight).all()
        ):
            found.append(f"{name}.weight holds NaN or infinite values; reload the base model")
    if config.fused_slices and not any(is_fused(n, m) for n, m in chosen.items()):
        found.append("fused_slices has no effect: no target module is named qkv, c_attn or in_proj; remove it")
    attentions = [n for n, m in chosen.items() if isinstance(m, nn.MultiheadAttention)]
    for key, value in (("lora_dropout", config.lora_dropout), ("lora_bias", config.lora_bias)):
        if value and attentions:
            found.append(
                f"{key}={value} has no effect on {_some(attentions)} (torch.nn.MultiheadAttention, which takes the "
                "update as a weight); leave it out, or target other layers"
            )
    if config.target_parameters:
        found.append("target_parameters is not available: only layers that are called can be coordinated; remove it")
    if found:
        raise ConfigError(found)
    changes["rank_pattern"] = {**rank_pattern, **(config.rank_pattern or {})}
    changes["alpha_pattern"] = {**alpha_pattern, **(config.alpha_pattern or {})}
    changes["target_modules"] = probe.target_modules
    lora = config.to_lora_config(**changes)
    special = any(type(m) is not nn.Linear and isinstance(m, nn.Linear) for m in chosen.values())
    # Quantised and other special linears keep PEFT's own layers.
    lora._register_custom_module({k: v for k, v in CUSTOM_LAYERS.items() if not (special and issubclass(nn.Linear, k))})
    return lora


def adaptable(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers that ``all-linear`` means, by name: linear ones, and attentions of torch as a whole."""
    attentions = {n: m for n, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)}
    inside = {f"{n}.out_proj" for n in attentions}
    found = {n: m for n, m in model.named_modules() if isinstance(m, LINEAR) and n and n not in inside}
    return found | {n: m for n, m in attentions.items() if n and m.in_proj_weight is not None}


def _chosen(model: nn.Module, lora: LoraConfig) -> dict[str, nn.Module]:
    """Return the targets by name; a `HeteroDictLinear` stands for its layers, which then are the targets."""
    chosen = {n: m for n, m in model.named_modules() if n and matches(lora, n)}
    dictionaries = {n: m for n, m in chosen.items() if isinstance(m, pyg_nn.HeteroDictLinear)}
    if dictionaries:
        layers = [f"{n}.{PER_TYPE}.{key}" for n, m in dictionaries.items() for key in m.lins]
        chosen = {n: model.get_submodule(n) for n in [*(n for n in chosen if n not in dictionaries), *layers]}
        lora.target_modules = list(chosen)
    return chosen


def _target_problems(model: nn.Module, lora: LoraConfig, linear: dict, chosen: dict) -> list[str]:
    leaves = sorted({name.rpartition(".")[2] for name in linear})
    found = []
    if isinstance(lora.target_modules, (list, set, tuple)):
        everything = [name for name, _ in model.named_modules()]
        for target in sorted(lora.target_modules):
            if not any(n == target or n.endswith(f".{target}") for n in everything):
                hint = nearest(target, leaves)
                found.append(f"target module {target!r} is not in the model.{hint} Its linear layers: {_some(leaves)}")
    if not linear:
        return [
            f"{type(model).__name__} has no linear layer that LoRA could adapt; its weights are parameters of its own"
        ]
    if not chosen and not found:
        found.append(f"no module matches target_modules={lora.target_modules!r}; linear layers: {_some(leaves)}")
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
        if isinstance(module, pyg_nn.HeteroLinear):
            found.append(
                f"{name} is a HeteroLinear, which keeps the weights of all types in one tensor and calls no layer; "
                "use a HeteroDictLinear, or target other layers"
            )
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


def _defaults_of_architecture(model: nn.Module, lora: LoraConfig) -> None:
    """Fill target_modules with what PEFT uses for a Transformers architecture."""
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in KNOWN:
        leaves = sorted({n.rpartition(".")[2] for n in adaptable(model)})
        raise ConfigError([f"target_modules is missing; the model's linear layers: {_some(leaves)}; or 'all-linear'"])
    lora.target_modules = sorted(KNOWN[kind])


def _widths(module: nn.Module) -> tuple[int, int]:
    """Return (d_in, d_out) of a linear layer; (0, 0) of any other, which PEFT judges."""
    if isinstance(module, Conv1D):
        return tuple(module.weight.shape)  # type: ignore[return-value]
    if isinstance(module, pyg_nn.Linear):
        return module.in_channels, module.out_channels
    if isinstance(module, nn.MultiheadAttention):
        return module.embed_dim, 3 * module.embed_dim
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    return 0, 0
