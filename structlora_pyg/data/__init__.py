"""The adapters of a model as a `torch_geometric.data.Data`.

``AdapterSet -> Encoding -> GraphBuilder -> Data``: an ordered view on the factors in a PEFT model, their codes in one
space, and the graph over them, which can also be had as `HeteroData` or recorded over training as a dataset.
"""

from structlora_pyg.data.adapters import Adapter, AdapterSet
from structlora_pyg.data.dataset import AdapterGraphDataset
from structlora_pyg.data.edges import build_edges
from structlora_pyg.data.encoding import Encoding
from structlora_pyg.data.graph_builder import GraphBuilder
from structlora_pyg.data.hetero import to_hetero_data
from structlora_pyg.stage_config import EncodingConfig, GraphConfig

__all__ = [
    "Adapter",
    "AdapterGraphDataset",
    "AdapterSet",
    "Encoding",
    "EncodingConfig",
    "GraphBuilder",
    "GraphConfig",
    "build_edges",
    "to_hetero_data",
]
