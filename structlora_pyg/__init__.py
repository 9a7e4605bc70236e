"""StructLoRA on PyTorch Geometric: LoRA fine-tuning in which a model's adapters are the nodes of a graph.

Every forward in training::

    lora_A, lora_B of every adapted layer             AdapterSet      data/adapters.py
      -> codes of all shapes in one space             Encoding        data/encoding.py
      -> Data(x, edge_index, ...)                     GraphBuilder    data/graph_builder.py
      -> gates on rank-one directions, Data -> Data   IBFilter        nn/filter.py
      -> message passing, Data -> Data                Coordinator     nn/coordinator.py
      -> factors of the same rank                     Lift            nn/lift.py
      -> each layer runs on its factors               FusedLinear     tuner/layers.py
    at the end: a plain LoRA folder, or merged weights                tuner/export.py

`structlora_pyg.tuner.graph_pass.GraphPass` composes these on one page. Names are loaded when they are first asked for;
settings of the stages and everything else are in the packages: `structlora_pyg.data`, ``nn``, ``tuner``, ``analysis``.
"""

from __future__ import annotations

import importlib
import warnings
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

# PyTorch Geometric scripts a function at import, which newer versions of torch deprecate: no user can mend that.
warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)

_HOME = {
    "StructLoraConfig": "config",
    "get_structlora_model": "tuner.model",
    "StructLoraModel": "tuner.model",
    "parameter_groups": "tuner.optim",
    "load_lora": "tuner.export",
    "AdapterSet": "data.adapters",
    "build_edges": "data.edges",
    "GraphBuilder": "data.graph_builder",
    "IBFilter": "nn.filter",
    "Coordinator": "nn.coordinator",
    "GraphPass": "tuner.graph_pass",
    "GraphRecorder": "tuner.recorder",
    "AdapterGraphDataset": "data.dataset",
    "inspect_adapter": "analysis.inspect",
    "adapter_structure": "analysis.structure",
    "ConfigError": "checks",
}

if TYPE_CHECKING:
    from structlora_pyg.analysis.inspect import inspect_adapter
    from structlora_pyg.analysis.structure import adapter_structure
    from structlora_pyg.checks import ConfigError
    from structlora_pyg.config import StructLoraConfig
    from structlora_pyg.data.adapters import AdapterSet
    from structlora_pyg.data.dataset import AdapterGraphDataset
    from structlora_pyg.data.edges import build_edges
    from structlora_pyg.data.graph_builder import GraphBuilder
    from structlora_pyg.nn.coordinator import Coordinator
    from structlora_pyg.nn.filter import IBFilter
    from structlora_pyg.tuner.export import load_lora
    from structlora_pyg.tuner.graph_pass import GraphPass
    from structlora_pyg.tuner.model import StructLoraModel, get_structlora_model
    from structlora_pyg.tuner.optim import parameter_groups
    from structlora_pyg.tuner.recorder import GraphRecorder

__all__ = [  # noqa: RUF022  # in reading order
    "StructLoraConfig",
    "get_structlora_model",
    "StructLoraModel",
    "parameter_groups",
    "load_lora",
    "AdapterSet",
    "build_edges",
    "GraphBuilder",
    "IBFilter",
    "Coordinator",
    "GraphPass",
    "GraphRecorder",
    "AdapterGraphDataset",
    "inspect_adapter",
    "adapter_structure",
    "ConfigError",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
