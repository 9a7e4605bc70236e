"""The graph pass inside a PEFT model.

``get_structlora_model -> StructLoraModel``: before every forward its `GraphPass` runs the stages of
`structlora_pyg.nn`, and every adapted layer runs on the factors it made. `StructLoraModel.export` writes a plain LoRA
folder.
"""

from structlora_pyg.stage_config import ScheduleConfig
from structlora_pyg.tuner.alarms import AlarmError, Alarms, AlarmWarning
from structlora_pyg.tuner.export import load_lora
from structlora_pyg.tuner.gradients import GradientSketch
from structlora_pyg.tuner.graph_pass import GraphPass
from structlora_pyg.tuner.hooks import PassHooks
from structlora_pyg.tuner.model import StructLoraModel, get_structlora_model
from structlora_pyg.tuner.optim import parameter_groups
from structlora_pyg.tuner.recorder import GraphRecorder
from structlora_pyg.tuner.trainer import TeachLevels

__all__ = [
    "AlarmError",
    "AlarmWarning",
    "Alarms",
    "GradientSketch",
    "GraphPass",
    "GraphRecorder",
    "PassHooks",
    "ScheduleConfig",
    "StructLoraModel",
    "TeachLevels",
    "get_structlora_model",
    "load_lora",
    "parameter_groups",
]
