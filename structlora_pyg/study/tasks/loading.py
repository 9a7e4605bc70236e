"""Pretrained models and tokenizers from a folder, a file or the hub, checked before anything is trained.

Whatever is missing, damaged or not made for the task stops with one `ModelError` that says what to do.
"""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import PretrainedConfig, PreTrainedTokenizerBase, ProcessorMixin
from transformers.image_processing_base import ImageProcessingMixin
from transformers.models.auto import modeling_auto

from structlora_pyg.checks import nearest, require, short
from structlora_pyg.study.config import ModelConfig
from structlora_pyg.study.tasks.data import DataError, not_found, resolve
from structlora_pyg.study.tasks.splits import quickly_offline

LOAD_ERRORS = (OSError, ValueError, RuntimeError, KeyError, ImportError, EOFError, SafetensorError, pickle.PickleError)

# A name of another form would be loaded, as code, from the hub.
ATTENTIONS = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3")
SET_ELSEWHERE = ("architectures", "dtype", "id2label", "label2id", "model_type", "num_labels", "problem_type")
CROP_PCT = 0.875  # where the model does not say; the usual one of ImageNet


class ModelError(ValueError):
    """A pretrained model or tokenizer that is missing, damaged, or not made for the task."""


def model_path(model: ModelConfig) -> Path | str:
    """Return the local path, or the hub id."""
    try:
        return resolve(model.path)
    except DataError:
        raise ModelError(
            f"model.path={model.path!r}: {not_found(model.path)}; give an existing folder or file, or a hub id"
        ) from None


def model_source(model: ModelConfig) -> tuple[Path | str, PretrainedConfig]:
    """Return the local folder or hub id of a Transformers model, and its configuration with `model.overrides`.

    Raises:
        ModelError: If there is none, it cannot be read, or has no place for an override.
    """
    source = model_path(model)
    if isinstance(source, Path) and not source.is_dir():
        raise ModelError(f"{source} is a file; library=transformers needs the model's folder, or set library=timm")
    try:
        with quickly_offline():
            config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
    except LOAD_ERRORS as error:
        where = f"{source} cannot be read" if isinstance(source, Path) else f"{not_found(model.path)}, and the hub said"
        raise ModelError(f"model.path={model.path!r}: {where}: {short(error)}") from error
    return source, _overridden(config, source, model.overrides) if model.overrides else config


def _overridden(config: PretrainedConfig, source: Path | str, overrides: Mapping[str, Any]) -> PretrainedConfig:
    """Return the configuration with other values, after checking that it knows their names."""
    known = {key for key in config.to_dict() if not key.startswith("_")} - set(SET_ELSEWHERE) | {"attn_implementation"}
    for key, value in overrides.items():
        if key in SET_ELSEWHERE:
            raise ModelError(f"model.overrides.{key} is set by the task or by model.dtype; remove it")
        if key not in known:
            raise ModelError(f"model.overrides.{key}: the configuration of {source} has no {key}.{nearest(key, known)}")
        if key == "attn_implementation" and value not in ATTENTIONS:
            raise ModelError(f"model.overrides.{key}={value!r} is not one of {', '.join(ATTENTIONS)}")
    try:
        return transformers.AutoConfig.from_pretrained(source, trust_remote_code=False, **overrides)
    except Exception as error:  # each version of Transformers checks values in its own way
        raise ModelError(f"model.overrides do not fit {source}: {short(error)}") from error


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
    headless = auto in (transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText)
    try:
        with _quiet(), quickly_offline():
            network, info = auto.from_pretrained(
                source, dtype=getattr(torch, model.dtype), output_loading_info=True, trust_remote_code=False,
                ignore_mismatched_sizes=not headless, **model.overrides, **kwargs,
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
            f"{broken[0]}; choose a checkpoint of this architecture{' or other overrides' if model.overrides else ''}"
        )
    if headless:
        network.config.use_cache = False  # a cache costs memory in training and is refused by checkpointing
        return network, ()
    modules = [n for n, child in network.named_children() if n != prefix and any(True for _ in child.parameters())]
    return network, (*modules, *poolers)


def load_tokenizer(source: Path | str, network: Any, max_length: int) -> PreTrainedTokenizerBase:
    """Return the tokenizer, with a padding token, after checking that it fits the model."""
    return check_tokenizer(_loaded(transformers.AutoTokenizer, source, "tokenizer"), source, network, max_length)


def load_processor(source: Path | str, network: Any, max_length: int) -> ProcessorMixin:
    """Return the processor of a vision-language model, its tokenizer checked like that of a text model."""
    processor = _loaded(transformers.AutoProcessor, source, "processor")
    if not isinstance(processor, ProcessorMixin):
        raise ModelError(
            f"{source} has a {type(processor).__name__}, but no processor of pictures and text; expected "
            "processor_config.json, a tokenizer and preprocessor_config.json"
        )
    check_tokenizer(processor.tokenizer, source, network, max_length)
    return processor


def _loaded(auto: Any, source: Path | str, what: str) -> Any:
    try:
        with _quiet():
            return auto.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # the Rust tokenizers raise nothing more specific for a damaged file
        raise ModelError(f"the {what} in {source} cannot be loaded: {short(error)}") from error


def check_tokenizer(
    tokenizer: PreTrainedTokenizerBase, source: Path | str, network: Any, max_length: int
) -> PreTrainedTokenizerBase:
    """Return a tokenizer after checking that it fits the model, with a padding token if it had none."""
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
    positions = network.config.get_text_config().to_dict().get("max_position_embeddings")
    longest = min(positions or max_length, tokenizer.model_max_length)
    if max_length > longest:
        raise ModelError(f"data.max_length={max_length} is more than the {longest} tokens {source} can read")
    return tokenizer


def load_image_model(model: ModelConfig, image_size: int, classes: int) -> dict[str, Any]:
    """Return model, head, mean, std and crop_pct of an image classifier with a head for so many classes."""
    return (_load_timm if model.library == "timm" else _load_transformers)(model, image_size, classes)


def _load_transformers(model: ModelConfig, image_size: int, classes: int) -> dict[str, Any]:
    source, config = model_source(model)
    native = config.to_dict().get("image_size", image_size)
    if native != image_size:
        raise ModelError(f"data.image_size={image_size}, but {source} was made for {native}; set image_size={native}")
    auto = transformers.AutoModelForImageClassification
    network, head = load_network(auto, source, model, num_labels=classes, problem_type="single_label_classification")
    try:
        values, _ = ImageProcessingMixin.get_image_processor_dict(source)
        mean, std = tuple(values["image_mean"]), tuple(values["image_std"])
    except LOAD_ERRORS as error:
        raise ModelError(f"{source}: no image_mean and image_std in its preprocessor: {short(error)}") from error
    return {"model": network, "head": head, "mean": mean, "std": std, "crop_pct": CROP_PCT}


def _load_timm(model: ModelConfig, image_size: int, classes: int) -> dict[str, Any]:
    timm = require("timm", "study")
    name, source = model.architecture or "", model_path(model)
    if not timm.is_model(name):
        raise ModelError(f"model.architecture={name!r} is unknown to timm.{nearest(name, timm.list_models())}")
    if isinstance(source, Path) and not source.is_file():
        raise ModelError(f"{source} is a folder; library=timm needs the weights file, for instance .safetensors")
    local = {"checkpoint_path": str(source)} if isinstance(source, Path) else {"pretrained": True}
    try:
        network = timm.create_model(
            name if isinstance(source, Path) else f"hf-hub:{source}", **local, **model.overrides
        )
    except (*LOAD_ERRORS, TypeError) as error:  # TypeError: an override that the architecture does not take
        raise ModelError(f"{source} does not load into timm's {name}: {short(error)}") from error
    found = network.pretrained_cfg["architecture"]
    if found != name:
        raise ModelError(f"{source} is a {found}, not a {name}; set model.architecture={found}")
    settings = timm.data.resolve_data_config({}, model=network)
    native = settings["input_size"][-1]
    if image_size != native and isinstance(network, timm.models.VisionTransformer):
        patch = network.patch_embed.patch_size[0]
        if image_size % patch:
            near = max(patch, round(image_size / patch) * patch)
            raise ModelError(
                f"data.image_size={image_size} is no multiple of the {patch} pixels of a patch; try {near}"
            )
        network.set_input_size((image_size, image_size))  # resamples the position embeddings
    elif image_size != native and network.pretrained_cfg["fixed_input_size"]:
        raise ModelError(f"data.image_size={image_size}, but {name} only takes {native}; set image_size={native}")
    network.reset_classifier(classes)
    classifiers = network.get_classifier()
    parts = classifiers if isinstance(classifiers, tuple) else (classifiers,)
    head = tuple(n for n, module in network.named_modules() if any(module is part for part in parts))
    mean, std = tuple(settings["mean"]), tuple(settings["std"])
    network = network.to(getattr(torch, model.dtype))
    return {"model": network, "head": head, "mean": mean, "std": std, "crop_pct": settings["crop_pct"]}
