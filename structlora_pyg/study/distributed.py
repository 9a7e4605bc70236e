"""What a run runs on: Accelerate's processes, devices and trackers, and the frozen base cut over the devices (FSDP2).

Trained parameters are a thousandth of the memory, and the graph pass reads all of them at once, so cutting them would
cost communication and win nothing: they stay whole on every device. Their gradients are averaged with one all-reduce
per optimizer step; graph pass, optimizer, checkpoints and export are then those of plain data parallelism.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import LoggerType, ProjectConfiguration, broadcast, convert_outputs_to_fp32
from torch import nn
from torch.distributed.fsdp import FSDPModule

from structlora_pyg.checks import ConfigError, nearest
from structlora_pyg.study.config import RunConfig, flat
from structlora_pyg.study.methods import METHODS
from structlora_pyg.study.run_folder import LOGS_FOLDER
from structlora_pyg.tuner.fingerprint import base_facts
from structlora_pyg.tuner.model import StructLoraModel

PARALLEL = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
STATISTICS = ("running_mean", "running_var")  # buffers that a forward in training moves
PROJECT = "structlora"  # name of the project, where a tracker groups runs


def make_accelerator(config: RunConfig) -> Accelerator:
    """Return Accelerate set up as the launcher and a configuration say.

    Raises:
        ConfigError: If the launcher asks for what a run cannot do.
    """
    # Accelerate keeps one state per process and refuses to change its precision; a second run may need another one.
    AcceleratorState._reset_state()
    folder, precision = Path(config.train.output_dir), config.train.mixed_precision
    places = ProjectConfiguration(str(folder), str(folder / LOGS_FOLDER))
    trackers = list(config.train.trackers) or None
    accelerator = Accelerator(mixed_precision=precision, log_with=trackers, project_config=places)
    kind, found = accelerator.distributed_type, []
    if kind == DistributedType.FSDP:
        found = sharding_problems(accelerator, config)
    elif kind not in PARALLEL:
        known = "structlora train knows DDP and FSDP2, which saves what ZeRO-3 saves (docs/guides/devices.md)"
        found = [f"accelerate is set up for {kind}; {known}"]
    if accelerator.mixed_precision != precision:
        found.append(f"train.mixed_precision={precision} has no effect on several processes of a CPU; set it to no")
    if found:
        raise ConfigError(found)
    return accelerator


def tracker_problems(names: Sequence[str]) -> list[str]:
    """Return what is wrong with names of trackers, empty if nothing is."""
    available, built_in = set(map(str, get_available_trackers())), set(map(str, LoggerType.list()))
    found = []
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            known = ", ".join(LOGGER_TYPE_TO_CLASS)
            hint = nearest(name, LOGGER_TYPE_TO_CLASS)
            found.append(f"{name!r} is no tracker that Accelerate knows; allowed: {known}.{hint}")
        elif name in built_in and name not in available:
            found.append(f"{name!r} is not installed; pip install {name.replace('_', '-')}, or leave it out")
    return found


@contextmanager
def tracking(accelerator: Accelerator, settings: Mapping[str, Any], first: int) -> Iterator[None]:
    """Start the trackers of an accelerator, and finish them at the end of the ``with`` block, also after an error.

    Args:
        accelerator: As `make_accelerator` returns it; a tracker's run is named after the folder of the run.
        settings: The configuration as plain values.
        first: Steps that are finished; TensorBoard drops what an interrupted run has logged after them.
    """
    if not accelerator.log_with:
        yield
        return
    logs = Path(accelerator.logging_dir)
    logs.mkdir(parents=True, exist_ok=True)
    arguments: dict[str, dict[str, Any]] = {
        "tensorboard": {"purge_step": first + 1},
        "wandb": {"name": logs.parent.name, "dir": str(logs)},
        "mlflow": {"run_name": logs.parent.name},
    }
    plain = (bool, int, float, str)
    values = {k: v if isinstance(v, plain) else str(v) for k, v in flat(settings).items()}
    accelerator.init_trackers(PROJECT, values, arguments)
    try:
        yield
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()


def sharding_problems(accelerator: Accelerator, config: RunConfig) -> list[str]:
    """Return what a configuration and Accelerate's FSDP2 settings ask for that a sharded run cannot do."""
    plugin, method = accelerator.state.fsdp_plugin, METHODS[config.method.name]
    if plugin.fsdp_version != 2:
        return ["accelerate is set up for FSDP 1, which cannot leave parameters whole; set fsdp_version: 2"]
    found = []
    if plugin.cpu_ram_efficient_loading:
        found.append(
            "fsdp_cpu_ram_efficient_loading=true: the adapters would be made on weights that are not there; set it to "
            "false"
        )
    if plugin.activation_checkpointing:
        found.append("fsdp_activation_checkpointing=true renames layers; use train.gradient_checkpointing=true")
    if method.folder == "model":
        found.append(
            f"method.name={method.name} is not for FSDP: only frozen weights are sharded; choose an adapter, or DDP"
        )
    if method.bits4:
        found.append(f"method.name={method.name} is not for FSDP, which would leave 4-bit weights whole; use DDP")
    if config.adapter.bias != "none":
        found.append(f"adapter.bias={config.adapter.bias} trains the base's own parameters; set bias=none under FSDP")
    return found


def shard(
    accelerator: Accelerator, model: nn.Module, base: set[nn.Parameter], optimizer: torch.optim.Optimizer
) -> tuple[Any, Any]:
    """Cut the frozen parameters of the base over all processes, in place.

    Args:
        accelerator: Set up for FSDP2.
        model: The adapted model, where it was loaded; a device need not have room for all of it.
        base: The parameters that the base had before it was adapted.
        optimizer: Holds the trained parameters.

    Returns:
        Model and optimizer as Accelerate prepared them.
    """
    if isinstance(model, StructLoraModel):
        model.base_facts = base_facts(model.get_base_model(), model.structlora_config)
    # What is trained, or not the base's own: adapters, heads, filter, coordinator.
    whole = [p for p in model.parameters() if p.requires_grad or p not in base]
    for p in whole:
        p.data = p.data.to(accelerator.device)
    for tensor in (*(p.data for p in whole), *model.buffers()):  # as DDP does
        tensor.copy_(broadcast(tensor.to(accelerator.device)))
    plugin = accelerator.state.fsdp_plugin
    plugin.ignored_modules = [nn.ParameterList(whole)]
    plugin.mixed_precision_policy = None  # it would round the loss too; autocast is what the other devices get
    prepared = accelerator.prepare(model, optimizer)
    if accelerator.native_amp:
        model.forward = convert_outputs_to_fp32(accelerator.autocast()(model.forward))  # type: ignore[method-assign]
    return prepared


@torch.no_grad()
def average(model: nn.Module, accelerator: Accelerator) -> None:
    """Replace gradients and running statistics by their mean over the processes, in one all-reduce in float32.

    A parameter without gradient counts as zero; if no process has one, it stays without.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    statistics = [
        b for m in model.modules() if m.training for n, b in m.named_buffers(recurse=False) if n in STATISTICS
    ]
    there = torch.tensor([p.grad is not None for p in trained], dtype=torch.float32, device=accelerator.device)
    flat = [there, *(torch.zeros_like(p) if p.grad is None else p.grad for p in trained), *statistics]
    mean = accelerator.reduce(torch.cat([t.flatten().float() for t in flat]), "mean")
    seen, *values = mean.split([t.numel() for t in flat])
    for p, anywhere, value in zip(trained, seen.tolist(), values, strict=False):
        if anywhere:
            p.grad = value.view_as(p).to(p.dtype)
    for buffer, value in zip(statistics, values[len(trained) :], strict=True):
        buffer.copy_(value.view_as(buffer))


def reshard(model: nn.Module) -> None:
    """Let go of the parts of other processes that a forward without a backward has left.

    Where one process alone looks at its state, FSDP does this there only, and the next all-gathers would not match.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
