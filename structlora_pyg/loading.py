"""Pretrained models and tokenizers from a folder, a file or the hub, checked before anything is trained.

Whatever is missing, damaged or not made for the task stops with one `ModelError` that says what to do.
"""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase
from transformers.image_processing_base import ImageProcessingMixin
from transformers.models.auto import modeling_auto

from structlora_pyg.config import ModelConfig, nearest
from structlora_pyg.data import CIFAR_CLASSES
from structlora_pyg.files import short
from structlora_pyg.rows import DataError, not_found, resolve

LOAD_ERRORS = (OSError, ValueError, RuntimeError, KeyError, ImportError, EOFError, SafetensorError, pickle.PickleError)


class ModelError(ValueError):
    """A pretrained model or tokenizer that is missing, damaged, or not made for the task."""


def _source(model: ModelConfig) -> Path | str:
    """Return the local path, or the hub id."""
    try:
        return resolve(model.path) or model.path
    except DataError:
        raise ModelError(
            f"model.path={model.path!r}: {not_found(model.path)}; give an existing folder or file, or a hub id"
        ) from None


def model_source(model: ModelConfig) -> tuple[Path | str, PretrainedConfig]:
    """Return the local folder or hub id of a Transformers model, and its configuration.

    Raises:
        ModelError: If there is none, or it cannot be read.
    """
    source = _source(model)
    if isinstance(source, Path) and not source.is_dir():
        raise ModelError(f"{source} is a file; library=transformers needs the model's folder, or set library=timm")
    try:
        return source, transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
    except LOAD_ERRORS as error:
        where = f"{source} cannot be read" if isinstance(source, Path) else f"{not_found(source)}, and the hub said"
        raise ModelError(f"model.path={model.path!r}: {where}: {short(error)}") from error


def is_causal(config: PretrainedConfig) -> bool:
    """Return whether the checkpoint was trained as a causal language model; BERT's decoder class alone is no proof."""
    known = set(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    return any(name in known for name in config.architectures or [])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the report of new weights and the bars away: `load_network` checks what is missing itself."""
    log = transformers.utils.logging
    verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if bars:
            log.enable_progress_bar()


def load_network(auto: Any, source: Path | str, model: ModelConfig, **kwargs: Any) -> tuple[Any, tuple[str, ...]]:
    """Return the model and the names of what is to be trained as a whole: its head, and BERT's pooler with it.

    The pooler lies between encoder and head. Checkpoints that were trained without using it (all sentence-transformers)
    hold a pooler that hides what the encoder knows; frozen, it keeps any adapter from learning.

    Raises:
        ModelError: If the weights are missing, damaged, or leave parts of the backbone untrained.
    """
    headless = auto is transformers.AutoModelForCausalLM
    try:
        with _quiet():
            network, info = auto.from_pretrained(
                source, dtype=getattr(torch, model.dtype), output_loading_info=True, trust_remote_code=False,
                ignore_mismatched_sizes=not headless, **kwargs,
            )  # fmt: skip
    except LOAD_ERRORS as error:
        raise ModelError(f"{source} cannot be loaded by {auto.__name__}: {short(error)}") from error
    mismatched = [key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]]
    fresh = sorted([*info["missing_keys"], *mismatched])
    prefix = network.base_model_prefix
    poolers = [name for name, _ in network.named_modules() if name == f"{prefix}.pooler"]
    known = tuple(f"{name}." for name in poolers)
    broken = [key for key in fresh if headless or (key.startswith(f"{prefix}.") and not key.startswith(known))]
    if broken:
        raise ModelError(
            f"{source} has no fitting weights for {len(broken)} tensors of {type(network).__name__}, the first is "
            f"{broken[0]}; choose a checkpoint of this architecture"
        )
    if headless:
        network.config.use_cache = False  # a cache costs memory in training and is refused by checkpointing
        return network, ()
    modules = [n for n, child in network.named_children() if n != prefix and any(True for _ in child.parameters())]
    return network, (*modules, *poolers)


def load_tokenizer(
    source: Path | str, network: Any, max_length: int, config: PretrainedConfig
) -> PreTrainedTokenizerBase:
    """Return the tokenizer, with a padding token, after checking that it fits the model."""
    try:
        with _quiet():
            tokenizer = transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # the Rust tokenizers raise nothing more specific for a damaged file
        raise ModelError(f"the tokenizer in {source} cannot be loaded: {short(error)}") from error
    files = {"tokenizer.json", *tokenizer.vocab_files_names.values()} - {"tokenizer_config.json"}
    # Transformers makes an empty tokenizer, without a word, for a folder that has none.
    if isinstance(source, Path) and not any((source / name).is_file() for name in files):
        raise ModelError(f"{source} has no tokenizer; expected one of {', '.join(sorted(files))}")
    rows = network.get_input_embeddings().num_embeddings
    largest = max(tokenizer.get_vocab().values())
    if largest >= rows:
        raise ModelError(f"{source}: the tokenizer has token {largest}, but the model only {rows} embeddings")
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ModelError(f"{source}: the tokenizer has neither a padding nor an end token; add pad_token to it")
        tokenizer.pad_token = tokenizer.eos_token
    shortest = tokenizer.num_special_tokens_to_add(pair=True) + 2
    if max_length < shortest:
        raise ModelError(f"data.max_length={max_length} leaves no room for text; {source} needs at least {shortest}")
    longest = min(config.to_dict().get("max_position_embeddings") or max_length, tokenizer.model_max_length)
    if max_length > longest:
        raise ModelError(f"data.max_length={max_length} is more than the {longest} tokens {source} can read")
    return tokenizer


ImageModel = tuple[nn.Module, tuple[str, ...], tuple[float, ...], tuple[float, ...]]


def load_image_model(model: ModelConfig, image_size: int) -> ImageModel:
    """Return a Transformers image model, its head, and the mean and deviation it was trained with."""
    source, config = model_source(model)
    native = config.to_dict().get("image_size", image_size)
    if native != image_size:
        raise ModelError(f"data.image_size={image_size}, but {source} was made for {native}; set image_size={native}")
    network, head = load_network(
        transformers.AutoModelForImageClassification, source, model,
        num_labels=CIFAR_CLASSES, problem_type="single_label_classification",
    )  # fmt: skip
    try:
        values, _ = ImageProcessingMixin.get_image_processor_dict(source)
        return network, head, tuple(values["image_mean"]), tuple(values["image_std"])
    except LOAD_ERRORS as error:
        raise ModelError(f"{source}: no image_mean and image_std in its preprocessor: {short(error)}") from error


def load_timm_model(model: ModelConfig, image_size: int) -> ImageModel:
    """Return a timm model, its new head, and the mean and deviation it was trained with."""
    name, source = model.architecture or "", _source(model)
    if not timm.is_model(name):
        raise ModelError(f"model.architecture={name!r} is unknown to timm.{nearest(name, timm.list_models())}")
    if isinstance(source, Path) and not source.is_file():
        raise ModelError(f"{source} is a folder; library=timm needs the weights file, for instance .safetensors")
    network: Any
    try:
        if isinstance(source, Path):
            network = timm.create_model(name, checkpoint_path=str(source))
        else:
            network = timm.create_model(f"hf-hub:{source}", pretrained=True)
    except LOAD_ERRORS as error:
        raise ModelError(f"{source} does not load into timm's {name}: {short(error)}") from error
    settings = timm.data.resolve_data_config({}, model=network)
    if network.pretrained_cfg["architecture"] != name:
        found = network.pretrained_cfg["architecture"]
        raise ModelError(f"{source} is a {found}, not a {name}; set model.architecture={found}")
    _set_image_size(network, settings["input_size"][-1], image_size, name)
    network.reset_classifier(CIFAR_CLASSES)
    classifiers = network.get_classifier()
    parts = classifiers if isinstance(classifiers, tuple) else (classifiers,)
    head = tuple(n for n, module in network.named_modules() if any(module is part for part in parts))
    return network.to(getattr(torch, model.dtype)), head, tuple(settings["mean"]), tuple(settings["std"])


def _set_image_size(network: Any, native: int, wanted: int, name: str) -> None:
    """Resample the position embeddings of a vision transformer; networks of free size need nothing."""
    if wanted == native:
        return
    if isinstance(network, timm.models.VisionTransformer):
        patch = network.patch_embed.patch_size[0]
        if wanted % patch:
            near = max(patch, round(wanted / patch) * patch)
            raise ModelError(f"data.image_size={wanted} is no multiple of the {patch} pixels of a patch; try {near}")
        network.set_input_size((wanted, wanted))
    elif network.pretrained_cfg["fixed_input_size"]:
        raise ModelError(f"data.image_size={wanted}, but {name} only takes {native}; set image_size={native}")
