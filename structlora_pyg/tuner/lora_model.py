"""PEFT's own functions on coordinated adapters: what they merge, combine, save and load is what the model computes.

PEFT reads and writes ``lora_A.weight`` and ``lora_B.weight`` in many places. `CoordinatedLoraModel` takes the place of
its ``LoraModel``, and runs what reads them inside `structlora_pyg.tuner.factor.coordinated`.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import wraps
from itertools import chain
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraModel, eva
from peft.utils import hotswap
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from structlora_pyg.config import StructLoraConfig
from structlora_pyg.data.adapters import AdapterSet
from structlora_pyg.tuner.alarms import Alarms
from structlora_pyg.tuner.distributed import is_cut
from structlora_pyg.tuner.factor import coordinated, factors_in
from structlora_pyg.tuner.graph_pass import GraphPass
from structlora_pyg.tuner.hooks import PassHooks
from structlora_pyg.tuner.initialize import Start, align_start, share_start
from structlora_pyg.tuner.layers import Attention, base_weight

logger = logging.getLogger(__name__)


def _then_follow(stock: Callable[..., None]) -> Any:
    @wraps(stock)
    def then_follow(self: CoordinatedLoraModel, *args: Any, **kwargs: Any) -> None:
        stock(self, *args, **kwargs)
        self._follow()

    return then_follow


def _on_coordinated(stock: Callable[..., None]) -> Any:
    @wraps(stock)
    def on_coordinated(self: CoordinatedLoraModel, *args: Any, **kwargs: Any) -> None:
        with coordinated(self.model):
            stock(self, *args, **kwargs)

    return on_coordinated


class CoordinatedLoraModel(LoraModel):
    """A `peft.tuners.lora.LoraModel` some of whose adapters are coordinated, each by a graph pass of its own.

    Made from the one that PEFT has made, with `of`.

    Attributes:
        graph_passes: By adapter name.
        pass_hooks: What runs them, by adapter name.
    """

    graph_passes: Any  # an nn.ModuleDict of GraphPass
    pass_hooks: dict[str, PassHooks]
    _resting: dict[str, list[nn.Parameter]]

    inject_adapter = _then_follow(LoraModel.inject_adapter)
    set_adapter = _then_follow(LoraModel.set_adapter)
    set_requires_grad = _then_follow(LoraModel.set_requires_grad)
    enable_adapter_layers = _then_follow(LoraModel.enable_adapter_layers)
    disable_adapter_layers = _then_follow(LoraModel.disable_adapter_layers)
    add_weighted_adapter = _on_coordinated(LoraModel.add_weighted_adapter)
    unmerge_adapter = _on_coordinated(LoraModel.unmerge_adapter)

    @classmethod
    def of(cls, tuner: LoraModel) -> CoordinatedLoraModel:
        """Turn PEFT's LoRA model into this one, in place."""
        found: Any = tuner
        found.__class__ = cls  # PEFT chooses the class by the kind of adapter, which stays LoRA
        found.graph_passes, found.pass_hooks, found._resting = nn.ModuleDict(), {}, {}
        return found

    def coordinate(self, name: str, config: StructLoraConfig, starts: Mapping[str, Start] | None = None) -> None:
        """Give an adapter that PEFT has injected its start, its graph pass, and what runs it.

        Args:
            name: PEFT's name of the adapter.
            config: What to build.
            starts: Of the adapted weights, for ``init_lora_weights="gradient"``.
        """
        adapters = AdapterSet(self.model, name, config.fused_slices)
        if config.init_lora_weights == "shared":
            share_start(adapters, config.seed)
        elif config.init_lora_weights == "gradient":
            align_start(adapters, dict(starts or {}))
        first = next(adapters.parameters())
        dtype = torch.promote_types(first.dtype, torch.float32)
        graph_pass = GraphPass.from_config(adapters, config).to(first.device, dtype)
        self.graph_passes[name] = graph_pass
        # On the innermost module: generate() and a missing task type bypass every level above it.
        self.pass_hooks[name] = PassHooks(graph_pass, self.model, config.graph.refresh_every, Alarms(config.alarms))
        self._follow()

    def coordinate_anew(self, name: str) -> None:
        """Build the graph pass of an adapter whose ranks or layers have changed."""
        lora, config = self.peft_config[name], self.graph_passes[name].config
        now = {key: getattr(lora, key) for key in ("target_modules", "rank_pattern", "alpha_pattern")}
        self.pass_hooks.pop(name).remove()
        del self.graph_passes[name]
        self.coordinate(name, dataclasses.replace(config, **now))

    def _follow(self) -> None:
        """Train the graph pass of an adapter where the adapter is trained, and let it rest where it is not."""
        for name, graph_pass in self.graph_passes.items():
            trained = any(p.requires_grad for p in graph_pass.adapters.parameters())
            if trained:
                for p in self._resting.pop(name, []):
                    p.requires_grad_(True)
            elif name not in self._resting:
                self._resting[name] = [p for p in graph_pass.parameters() if p.requires_grad]
                graph_pass.requires_grad_(False)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter, as PEFT does, with its graph pass."""
        super().delete_adapter(adapter_name)
        if adapter_name in self.pass_hooks:
            self.pass_hooks.pop(adapter_name).remove()
            del self.graph_passes[adapter_name]
            self._resting.pop(adapter_name, None)
        self._follow()

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge adapters into the base weights, as PEFT does."""
        self._prepare_merge(adapter_names)
        with coordinated(self.model):
            super().merge_adapter(adapter_names, safe_merge)

    def _unload_and_optionally_merge(  # type: ignore[override]
        self, *, merge: bool = True, adapter_names: list[str] | None = None, **options: Any
    ) -> Any:
        if merge:
            self._prepare_merge(adapter_names)
        with coordinated(self.model) if merge else nullcontext():
            base = super()._unload_and_optionally_merge(merge=merge, adapter_names=adapter_names, **options)
        for hooks in self.pass_hooks.values():
            hooks.remove()
        return base

    def _prepare_merge(self, adapter_names: list[str] | None) -> None:
        """Refuse, before anything is merged, what cannot be; give layers that share a weight their own."""
        names = [n for n in self.active_adapters if n in self.graph_passes] if adapter_names is None else adapter_names
        shared: dict[str, Any] = {}
        users: dict[int, list[str]] = {}
        for path, module in self.model.named_modules():
            for _, p in module.named_parameters(recurse=False):
                users.setdefault(id(p), []).append(path)
        for name in (n for n in names if n in self.graph_passes):
            for path, layer in self.graph_passes[name].adapters.layers.items():
                weight = base_weight(layer)
                if is_cut(weight) or isinstance(weight, DTensor):
                    raise ValueError(
                        f"{path} is cut over the processes, which cannot merge into it. Call export(folder) on every "
                        "process, load the folder onto a whole base (structlora_pyg.load_lora), and merge there"
                    )
                if layer.lora_bias.get(name) and layer.get_base_layer().bias is None:
                    raise RuntimeError(f"Impossible to merge `lora_bias=True`: {path} has no bias; export the adapter")
                if len(users[id(weight)]) > 1 and not isinstance(layer, Attention):
                    shared[path] = layer.get_base_layer()
        for path, layer in shared.items():
            others = [n for n in users[id(layer.weight)] if not n.startswith(path)]
            logger.warning("%s shares its weight with %s; merging gives it one of its own", path, ", ".join(others))
            layer.weight = copy.deepcopy(layer.weight)


@contextmanager
def holding(model: nn.Module, state: Mapping[str, Any]) -> Iterator[None]:
    """Give factors and graph passes the values of a state dict of the model for a while; others keep theirs."""
    everything = chain(model.named_parameters(), model.named_buffers())
    tensors = {n: t for n, t in everything if ".lora_" in n or ".graph_passes." in n}
    given = {t: state[n] for n, t in tensors.items() if n in state and state[n].data_ptr() != t.data_ptr()}
    before = {t: t.data for t in given}
    try:
        for t, value in given.items():
            t.data = value.to(t)
        yield
    finally:
        for t, value in before.items():
            t.data = value


_stock_state_dict = LoraModel._get_adapter_state_dict
_stock_hotswap = hotswap.hotswap_adapter_from_state_dict
_stock_pad = hotswap._pad_lora_weights
_stock_eva = eva._load_eva_state_dict


def _adapter_state_dict(
    cls: type[LoraModel],
    model: nn.Module,
    config: Any,
    adapter_name: str,
    state_dict: dict[str, Any],
    *args: Any,
    **kwargs: Any,
) -> dict[str, Any]:
    """Return the state dict of an adapter: of a coordinated one, that of the plain LoRA that computes the same."""
    found = _stock_state_dict.__func__(cls, model, config, adapter_name, state_dict, *args, **kwargs)  # type: ignore[attr-defined]
    factors = {key: factor for key, factor in factors_in(model) if key in found and not factor.folded}
    found = {key: value for key, value in found.items() if ".graph_passes." not in f".{key}"}  # ours alone
    if factors:
        with holding(model, state_dict):
            plain = next(iter(factors.values())).source.plain()
        found |= {key: plain[factor].to(found[key]) for key, factor in factors.items()}
    return found


@wraps(_stock_hotswap)
def _hotswap(model: nn.Module, state_dict: dict[str, Any], adapter_name: str, *args: Any, **kwargs: Any) -> None:
    _stock_hotswap(model, state_dict, adapter_name, *args, **kwargs)
    for name, factor in factors_in(model):
        if f".{adapter_name}." in f"{name}.":
            factor.drop()
            factor.source.loaded()


@wraps(_stock_pad)
def _pad(model: nn.Module, target_rank: int) -> bool:
    tuners = [m for m in model.modules() if isinstance(m, CoordinatedLoraModel)]
    for source in dict.fromkeys(hooks for tuner in tuners for hooks in tuner.pass_hooks.values()):
        for factor, plain in source.plain().items():
            factor.raw.data = plain.to(factor.raw)
    found = _stock_pad(model, target_rank)
    for tuner in tuners:
        for name in list(tuner.pass_hooks):
            tuner.coordinate_anew(name)
            tuner.pass_hooks[name].loaded()
    return found


@wraps(_stock_eva)
def _load_eva(model: nn.Module, eva_state_dict: dict[str, Tensor], adapter_name: str) -> None:
    _stock_eva(model, eva_state_dict, adapter_name)
    tuner: Any = model.base_model if isinstance(model, PeftModel) else None
    if isinstance(tuner, CoordinatedLoraModel) and adapter_name in tuner.graph_passes:
        tuner.coordinate_anew(adapter_name)  # ranks are shared out anew


# PEFT finds these by the kind of adapter, whatever the model is; for other models they do what they always did.
LoraModel._get_adapter_state_dict = classmethod(_adapter_state_dict)  # type: ignore
hotswap.hotswap_adapter_from_state_dict = _hotswap
hotswap._pad_lora_weights = _pad
eva._load_eva_state_dict = _load_eva
