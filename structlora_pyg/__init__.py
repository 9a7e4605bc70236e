"""StructLoRA on PyTorch Geometric: LoRA fine-tuning in which a model's adapters are the nodes of a graph.

Every forward in training::

    lora_A, lora_B of every adapted layer           AdapterSet      adapters.py
      -> codes of all shapes in one space           Encoding        encoding.py
      -> Data(x, edge_index, ...)                   GraphBuilder    graph.py
      -> gates on rank-one directions, Data -> Data IBFilter        filters.py
      -> message passing, Data -> Data              Coordinator     coordinator.py
      -> factors of the same rank                   Lift            lifts.py
      -> each layer runs on its factors             FusedLinear     layers.py
    at the end: a plain LoRA folder, or merged weights              export.py, merging.py

`pipeline.GraphPass` composes these on one page; `model.get_structlora_model` builds it from a configuration.
"""

import warnings

with warnings.catch_warnings():
    # PyTorch Geometric scripts a function at import, which newer torch deprecates: nothing a user could mend.
    warnings.simplefilter("ignore", FutureWarning)
    import torch_geometric.nn  # noqa: F401

from structlora_pyg.analysis.attention import attention
from structlora_pyg.analysis.inspect import Inspection, inspect_adapter
from structlora_pyg.analysis.structure import Structure, structure
from structlora_pyg.checks import ConfigError
from structlora_pyg.config import StructLoraConfig
from structlora_pyg.data.adapters import Adapter, AdapterSet
from structlora_pyg.data.encoding import Encoding
from structlora_pyg.data.graph import GraphBuilder, build_edges
from structlora_pyg.data.hetero import from_hetero_data, to_hetero_data
from structlora_pyg.nn.coordinator import Coordinator
from structlora_pyg.nn.filter import Filter, IBFilter, NoFilter, RandomMask, TopKNorm
from structlora_pyg.nn.learned_edges import LearnedEdges
from structlora_pyg.stage_config import CoordinatorConfig, EncodingConfig, FilterConfig, GraphConfig, ScheduleConfig
from structlora_pyg.tuner.edge_log import EdgeChange, EdgeLog
from structlora_pyg.tuner.model import StructLoraModel, get_structlora_model, load_lora
from structlora_pyg.tuner.optim import parameter_groups
from structlora_pyg.tuner.recorder import AdapterGraphDataset, GraphRecorder

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "AdapterGraphDataset",
    "AdapterSet",
    "ConfigError",
    "Coordinator",
    "CoordinatorConfig",
    "EdgeChange",
    "EdgeLog",
    "Encoding",
    "EncodingConfig",
    "Filter",
    "FilterConfig",
    "GraphBuilder",
    "GraphConfig",
    "GraphRecorder",
    "IBFilter",
    "Inspection",
    "LearnedEdges",
    "NoFilter",
    "RandomMask",
    "ScheduleConfig",
    "StructLoraConfig",
    "StructLoraModel",
    "Structure",
    "TopKNorm",
    "attention",
    "build_edges",
    "from_hetero_data",
    "get_structlora_model",
    "inspect_adapter",
    "load_lora",
    "parameter_groups",
    "structure",
    "to_hetero_data",
]
