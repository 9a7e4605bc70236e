"""The frozen base cut over the devices (FSDP2, through Accelerate); what is trained stays whole on every one.

Trained parameters are a thousandth of the memory, and the graph pass reads all of them at once, so cutting them would
cost communication and win nothing. Their gradients are averaged with one all-reduce an optimizer step; graph pass,
optimizer, checkpoints and export are then those of plain data parallelism.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, convert_outputs_to_fp32
from torch import nn
from torch.distributed.fsdp import FSDPModule

from structlora_pyg.study.methods import METHODS
from structlora_pyg.study.run_config import RunConfig
from structlora_pyg.tuner.fingerprint import base_facts
from structlora_pyg.tuner.model import StructLoraModel

STATISTICS = ("running_mean", "running_var")  # buffers that a forward in training moves


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
    whole = kept_whole(model, base)
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


def kept_whole(model: nn.Module, base: set[nn.Parameter]) -> list[nn.Parameter]:
    """Return the parameters that are trained or not the base's own: adapters, heads, filter, coordinator."""
    return [p for p in model.parameters() if p.requires_grad or p not in base]


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
