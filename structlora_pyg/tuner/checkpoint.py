"""The state that training goes on from, beside the plain adapter."""

from __future__ import annotations

import math
import re
from pathlib import Path

import torch
from peft import PeftModel
from peft.utils import CONFIG_NAME, load_peft_weights
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from structlora_pyg.checks import replace_file
from structlora_pyg.config import CONFIG_FILE, StructLoraConfig, rewrites_base
from structlora_pyg.tuner.export import serialise
from structlora_pyg.tuner.graph_pass import GraphPass

STATE_FILE = "structlora_state.safetensors"
OF_ADAPTER = re.compile(r"\.(?:lora_\w+|modules_to_save|trainable_tokens_\w+)\.([^.]+)")  # PEFT's names of parameters


def save_training_state(model: PeftModel, graph_pass: GraphPass, folder: Path) -> None:
    """Write everything needed to continue training exactly."""
    replace_file(folder / STATE_FILE, serialise(training_state(model, graph_pass)))
    assert graph_pass.config is not None
    graph_pass.config.save_pretrained(folder)


def training_state(model: PeftModel, graph_pass: GraphPass) -> dict[str, Tensor]:
    """Return all that training changes: the coordinated adapter, trained weights of the base, and the graph pass.

    Other adapters are PEFT's to save; which one is active makes no difference.
    """
    name = graph_pass.adapters.adapter_name
    # A start that rewrites the base does not always come to the same values again.
    own = ".base_layer." if graph_pass.config is not None and rewrites_base(graph_pass.config) else None
    state = {
        f"parameter.{n}": p.detach()
        for n, p in model.named_parameters()
        if not n.startswith("base_model.graph_passes.")
        and (adapter_of(n) or name) == name
        and (adapter_of(n) or p.requires_grad or (own and own in n))
    }
    return state | {f"graph_pass.{n}": v for n, v in graph_pass.state_dict().items()}


def adapter_of(parameter: str) -> str | None:
    """Return which adapter a parameter belongs to, by its name; None for those of the base."""
    found = OF_ADAPTER.search(parameter)
    return found[1] if found else None


def load_training_state(model: PeftModel, graph_pass: GraphPass, folder: Path) -> None:
    """Restore what `save_training_state` wrote; checks everything before it changes anything."""
    file = _state_file(folder)
    try:
        state = load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is damaged ({error}); use another checkpoint") from error
    name = graph_pass.adapters.adapter_name
    owners = sorted({found for n in state if n.startswith("parameter.") and (found := adapter_of(n))})
    if name not in owners:
        raise ValueError(
            f"{file} holds the adapter {', '.join(owners)}, and this model's is {name}; give the model the same name "
            "(adapter_name=...)"
        )
    want, got = ({n: v.shape for n, v in s.items()} for s in (training_state(model, graph_pass), state))
    if want != got:
        differing = sorted(n for n in want.keys() | got.keys() if want.get(n) != got.get(n))
        raise ValueError(
            f"{file} does not fit this model: {len(differing)} tensors differ, first {differing[0]} (file "
            f"{tuple(got.get(differing[0], ()))}, model {tuple(want.get(differing[0], ()))}). Build the model with the "
            f"configuration in {CONFIG_FILE}; stages that were put in by hand belong into its `stages`"
        )
    parameters = dict(model.named_parameters())
    values = {n.removeprefix("parameter."): v for n, v in state.items() if n.startswith("parameter.")}
    # What PEFT saves of the base with an adapter, such as the embeddings of an enlarged vocabulary.
    try:
        saved = load_peft_weights(str(folder), device="cpu") if (folder / CONFIG_NAME).is_file() else {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"the adapter in {folder} is damaged ({error}); use another checkpoint") from error
    values = {n: v for n, v in saved.items() if n in parameters} | values
    if wrong := [n for n, v in values.items() if parameters[n].shape != v.shape]:
        raise ValueError(
            f"{folder} does not fit this model: {wrong[0]} is {tuple(values[wrong[0]].shape)} there and "
            f"{tuple(parameters[wrong[0]].shape)} here; was the vocabulary of the base resized?"
        )
    with torch.no_grad():
        for n, value in values.items():
            parameters[n].copy_(value)
    own = {n.removeprefix("graph_pass."): v for n, v in state.items() if n.startswith("graph_pass.")}
    graph_pass.load_state_dict(own)


def _state_file(folder: Path) -> Path:
    if not (file := folder / STATE_FILE).is_file():
        raise FileNotFoundError(f"{folder} holds no {STATE_FILE}; it is not a checkpoint of StructLoraModel")
    return file


def check_sizes(config: StructLoraConfig, folder: Path) -> None:
    """Refuse a configuration whose sizes its training state cannot have, before memory is taken for them.

    Raises:
        FileNotFoundError: If there is no training state.
        ValueError: If it is damaged, or a size is larger than the count of all numbers in it.
    """
    file = _state_file(folder)
    try:
        with safe_open(file, framework="pt") as stream:
            names = stream.keys()
            numbers = sum(math.prod(stream.get_slice(name).get_shape()) for name in names)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is damaged ({error}); use another checkpoint") from error
    coordinator = config.coordinator
    sizes = {
        "r": config.r,
        **{f"rank_pattern.{k}": v for k, v in (config.rank_pattern or {}).items()},
        "encoding.size": config.encoding.size,
        "graph.virtual_nodes": config.graph.virtual_nodes,
        "coordinator.num_layers": coordinator.num_layers,
        "coordinator.hidden_channels": coordinator.hidden_channels,
        **{f"coordinator.conv_kwargs.{k}": v for k, v in coordinator.conv_kwargs.items()},
    }
    for name, size in sizes.items():
        if isinstance(size, int) and size > numbers:
            raise ValueError(
                f"{folder / CONFIG_FILE} says {name}={size}, but {STATE_FILE} holds {numbers} numbers in all: they do "
                "not belong together. Use another checkpoint"
            )
