"""Plain LoRA folders from factors that other methods trained."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from safetensors.torch import save
from torch import Tensor

from structlora_pyg.files import replace_file
from structlora_pyg.tuner.export import ADAPTER_FILE

# Fields that mean something else, or nothing, in the folder that is written.
OWN_FIELDS = ("peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "inference_mode", "auto_mapping")


def write_lora_folder(folder: str | Path, state: dict[str, Tensor], config: LoraConfig) -> None:
    """Write a folder that `peft.PeftModel.from_pretrained` loads as LoRA.

    Args:
        folder: Where to write; files in it are replaced, each at once.
        state: Weights under PEFT's keys, such as ``base_model.model.<path>.lora_A.weight``.
        config: Its configuration.

    Raises:
        ValueError: If a weight is not finite.
    """
    for key, value in state.items():
        if not torch.isfinite(value).all():
            raise ValueError(f"{key} is not finite; go back to the last good checkpoint")
    tensors = {key: value.detach().cpu().contiguous().clone() for key, value in state.items()}
    replace_file(Path(folder) / ADAPTER_FILE, save(tensors, metadata={"format": "pt"}))
    config.save_pretrained(str(folder))


def plain_config(
    model: PeftModel, source: PeftConfig, r: int, lora_alpha: float, alpha_pattern: dict[str, float] | None = None
) -> LoraConfig:
    """Return the configuration of a plain LoRA of one rank on the layers that `source` adapts.

    Args:
        model: The adapted model, for the name of its base.
        source: The configuration of the method that was trained.
        r: Rank of every layer.
        lora_alpha: The scaling is lora_alpha / r.
        alpha_pattern: lora_alpha by module name where it differs.
    """
    config = LoraConfig(r=r, lora_alpha=lora_alpha, inference_mode=True, alpha_pattern=alpha_pattern or {})  # type: ignore[arg-type]
    given: Any = vars(copy.copy(source))
    for name in vars(config).keys() & given.keys() - set(OWN_FIELDS):
        setattr(config, name, given[name])
    if config.base_model_name_or_path is None:
        config.base_model_name_or_path = getattr(model.get_base_model(), "name_or_path", None)
    return config
