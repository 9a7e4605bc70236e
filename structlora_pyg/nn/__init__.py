"""Modules ``Data -> Data`` on the adapter graph, usable without PEFT.

``Filter -> LearnedEdges -> Coordinator -> Lift``: gates on the directions of every update, edges with learned weights
where they are asked for, message passing with any convolution of PyG, and the way back to low-rank factors.
"""

from structlora_pyg.nn.bottleneck import Information
from structlora_pyg.nn.coordinator import Coordinator
from structlora_pyg.nn.filter import Filter, IBFilter, OpenGates, RandomMask, TopKNorm
from structlora_pyg.nn.hetero_conv import RelationalConv
from structlora_pyg.nn.learned_edges import LearnedEdges
from structlora_pyg.nn.lift import LIFTS, Lift, make_lift
from structlora_pyg.stage_config import CoordinatorConfig, FilterConfig

__all__ = [
    "LIFTS",
    "Coordinator",
    "CoordinatorConfig",
    "Filter",
    "FilterConfig",
    "IBFilter",
    "Information",
    "LearnedEdges",
    "Lift",
    "OpenGates",
    "RandomMask",
    "RelationalConv",
    "TopKNorm",
    "make_lift",
]
