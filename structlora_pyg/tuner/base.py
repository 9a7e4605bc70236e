"""What adapting does to a base model, and what undoes it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.nn.parameter import is_lazy
from torch_geometric.nn import MessagePassing

from structlora_pyg.checks import ConfigError
from structlora_pyg.config import StructLoraConfig, rewrites_base
from structlora_pyg.tuner.graph_pass import GraphPass
from structlora_pyg.tuner.initialize import Start, weight_gradients
from structlora_pyg.tuner.targets import plain_lora

ADAPTED = (BaseTunerLayer, AuxiliaryTrainingWrapper)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def check_base_and_kind(model: nn.Module, config: Any) -> None:
    """Refuse another kind of configuration, and a base that is adapted already.

    Raises:
        TypeError: For the configuration.
        ValueError: For the base.
    """
    if not isinstance(config, StructLoraConfig):
        fix = "StructLoraConfig(**config)" if isinstance(config, Mapping) else "StructLoraConfig(r=..., ...)"
        raise TypeError(f"config is a {type(config).__name__}, and a StructLoraConfig is needed: give it {fix}")
    adapted = [name for name, module in model.named_modules() if isinstance(module, ADAPTED)]
    if isinstance(model, PeftModel) or adapted:
        raise ValueError(
            f"the base model is a PeftModel already, or what is inside of one ({len(adapted)} adapted layers, first "
            f"{adapted[0] if adapted else 'none'}); pass model.unload(), or model.merge_and_unload() to keep its "
            "update, where model is that PeftModel. A second adapter is added with model.add_adapter(name, config)"
        )


def prepared(
    model: nn.Module, config: StructLoraConfig, train_step: Callable[[], None] | None
) -> tuple[LoraConfig, dict[str, Start]]:
    """Return the LoRA configuration that PEFT injects, and what the start of lora_A needs to know."""
    lora = plain_lora(model, config)
    old, new = lora.base_model_name_or_path, model.__dict__.get("name_or_path") or None  # as peft.get_peft_model does
    if old not in (None, new):
        warnings.warn(
            f"base_model_name_or_path was renamed from '{old}' to '{new}', the name of the base", stacklevel=4
        )
    lora.base_model_name_or_path = new
    if config.init_lora_weights != "gradient":
        return lora, {}
    if train_step is None:
        raise ConfigError(["init_lora_weights='gradient' needs get_structlora_model(..., train_step=...)"])
    return lora, weight_gradients(model, lora, train_step)


@contextmanager
def without_adapters(base: nn.Module) -> Iterator[nn.Module]:
    """Show the base as it was built for a while: every adapted layer in the place of its own."""
    replaced = []
    for name, module in list(base.named_modules()):
        if isinstance(module, ADAPTED):
            parent, _, key = name.rpartition(".")
            replaced.append((base.get_submodule(parent), key, module))
    try:
        for parent, key, module in replaced:
            plain = module.original_module if isinstance(module, AuxiliaryTrainingWrapper) else module.get_base_layer()
            setattr(parent, key, plain)
        yield base
    finally:
        for parent, key, module in replaced:
            setattr(parent, key, module)


@contextmanager
def as_it_was_if_it_fails(model: nn.Module, config: Any) -> Iterator[None]:
    """Undo what an adapter that could not be made has changed: modules, hooks, and what is trained."""
    copy = rewrites_base(config)  # in place; KaSA puts other values in their place
    trained = {p: (p.requires_grad, p.data.clone() if copy else p.data) for p in model.parameters()}
    modules = {m: dict(vars(m)) for m in model.modules()}
    inner = [v for attributes in modules.values() for v in attributes.values() if isinstance(v, (dict, set))]
    contents = [(v, v.copy()) for v in inner]
    try:
        yield
    except BaseException:
        for module, attributes in modules.items():
            vars(module).clear()
            vars(module).update(attributes)
        for value, content in contents:
            value.clear()
            value.update(content)
        for p, (requires_grad, data) in trained.items():
            p.requires_grad = requires_grad  # the one way that lazy parameters have too
            if not is_lazy(p):
                p.data = data
        raise


def keep_statistics(model: nn.Module, trained: Sequence[str] = ("modules_to_save",)) -> None:
    """Put batch normalisation into evaluation, so that its running statistics stay those of the base.

    Args:
        model: Its mode has just been set.
        trained: Names of modules inside of which everything is trained.
    """
    for name, module in model.named_modules():
        if isinstance(module, BATCH_NORMS) and not any(f".{part}." in f".{name}." for part in trained):
            module.eval()


class NetworkFirst(nn.Module):
    """Shows PyG's tools the layers of the network.

    Explainers, `get_num_hops` and `get_embeddings` take every `MessagePassing` layer in ``modules()`` for one of the
    network. Those of the coordinator are in ``named_modules()``, and their parameters where all parameters are.
    """

    def modules(self, remove_duplicate: bool = True) -> Iterator[nn.Module]:
        """Yield the modules without the layers of graph passes that send messages."""
        passes = [m for m in super().modules() if isinstance(m, GraphPass)]
        hidden = {m for graph_pass in passes for m in graph_pass.modules() if isinstance(m, MessagePassing)}
        return (m for m in super().modules(remove_duplicate) if m not in hidden)
