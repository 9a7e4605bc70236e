"""Typed configuration of a run, model, data, method and training loop around the adapter's, and how YAML becomes one.

What only a method, a task or the machine can tell is checked by `structlora_pyg.study.run`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml

from structlora_pyg.checks import (
    ConfigError,
    Count,
    CountOrZero,
    NotNegative,
    Positive,
    Section,
    Share,
    bounds,
    build,
    nearest,
)
from structlora_pyg.config import StructLoraConfig
from structlora_pyg.study import shipped_configs

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the one in C takes a tenth of the time

# Schedules of Transformers that need nothing but the number of steps.
Schedule = Literal[
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt",
]  # fmt: skip
Fraction = Annotated[float, bounds(0, 1, open_low=True)]
HINTS = {  # what other programs call it
    "device": " A run takes the GPU if there is one: CUDA_VISIBLE_DEVICES=1 chooses, ACCELERATE_USE_CPU=1 takes none.",
    **dict.fromkeys(("fp16", "bf16"), " Write train.mixed_precision=bf16."),
}
ELSEWHERE = {
    "learning_rate": "train.lr", "rate": "train.lr", "num_train_epochs": "train.epochs", "num_epochs": "train.epochs",
    "per_device_train_batch_size": "train.batch_size", "rank": "adapter.r", "lora_r": "adapter.r",
    "alpha": "adapter.lora_alpha",
}  # fmt: skip


class Part(Section):
    """A section of a run, where a key may have been looked for in the wrong one."""

    @classmethod
    def hint(cls, key: str) -> str:
        """Return what an unknown key may have meant."""
        kinds = {**{name: globals()[f"{name.title()}Config"] for name in SECTIONS}, "adapter": StructLoraConfig}
        fields = {f.name: f"{s}.{f.name}" for s, kind in reversed(kinds.items()) for f in dataclasses.fields(kind)}
        meant = ELSEWHERE.get(key) or fields.get(key)
        return HINTS.get(key) or (f" Did you mean {meant}?" if meant else super().hint(key))


@dataclass(kw_only=True)
class ModelConfig(Part):
    """The pretrained model.

    Args:
        path: Local folder, local timm ``.safetensors`` file, or hub id.
        library: ``transformers``, ``timm``, or ``pyg`` for the networks of ``task: graphs``.
        architecture: timm's model name, ``gps`` or ``gat``; needed with ``library: timm`` and ``library: pyg``.
        dtype: Data type of the base weights.
        overrides: Values in place of those of the model's own configuration, for instance
            ``{"hidden_dropout_prob": 0.0}``, and ``attn_implementation``; with timm arguments of its ``create_model``,
            for instance ``{"drop_rate": 0.1}``. Default: none.
    """

    path: str = ""
    library: Literal["transformers", "timm", "pyg"] = "transformers"
    architecture: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    overrides: dict[str, Any] = field(default_factory=dict)

    def conflicts(self) -> list[str]:
        """Return what does not go together, empty if all does."""
        found = [] if self.path else ["path is missing; give a folder, a file or a hub id"]
        example = {"timm": "deit_tiny_patch16_224", "pyg": "gps"}.get(self.library)
        if example and not self.architecture:
            found.append(f"architecture is missing; library={self.library} needs it, for instance {example}")
        if self.library == "transformers" and self.architecture:
            found.append("architecture has no effect with library=transformers; remove it or set library=timm")
        return found


@dataclass(kw_only=True)
class DataConfig(Part):
    """The data set.

    Args:
        task: What to learn; it fixes file layout, loss and metric.
        path: Local folder or file, or hub id. A relative path is looked up in the folder named by the environment
            variable ``STRUCTLORA_DATA`` first, then in the working directory. None for ``digits`` and ``graphs``.
        max_length: Tokens an example is truncated to, >= 1; those of a picture count too.
        image_size: Side in pixels that images are resized to, >= 1; a vision-language model has its own.
        text: Column with the text, for ``classification``, ``regression`` and ``text``; for ``sft`` the column with the
            conversation or the prompt. Default: ``text``; for ``sft`` ``messages``, ``prompt`` or ``instruction``.
        text_pair: Column with a second text, for ``classification`` and ``regression``. Default: there is none.
        label: Column with the class or the score; for ``sft`` the one with the answer. Default: ``label``;
            ``completion`` or ``output`` for ``sft``.
        prompt: What ``captions`` and ``vqa`` ask the model, ``{question}`` standing for the question; the processor's
            chat template, or the format of LLaVA-1.5, goes around it. Default: what LLaVA is asked.
        train_limit: Use this many training examples, drawn with the seed; default all.
        eval_limit: Use this many evaluation examples, drawn with the seed; default all.
        train_fraction: Train on this share of the training examples, at least one of them, in (0, 1]; what
            `validation_share` holds out is cut off before. The examples are drawn uniformly, whatever their class; with
            one seed, a smaller share is a part of a larger one. Instead of `train_limit`.
        validation_share: Evaluate on this share cut from the training part instead, in [0, 1); the cut is the same for
            every seed, and the evaluation part is not read. For choosing learning rates and other settings: the
            evaluation part is for results.
    """

    task: str = "rte"
    path: str = ""
    max_length: Count = 128
    image_size: Count = 224
    text: str | None = None
    text_pair: str | None = None
    label: str | None = None
    prompt: str | None = None
    train_limit: Count | None = None
    eval_limit: Count | None = None
    train_fraction: Fraction = 1.0
    validation_share: Share = 0.0

    def conflicts(self) -> list[str]:
        """Return what does not go together, empty if all does."""
        if self.train_fraction == 1.0 or self.train_limit is None:
            return []
        return [
            f"train_fraction={self.train_fraction} and train_limit={self.train_limit} both say how many examples to "
            "train on; give one of them"
        ]


@dataclass(kw_only=True)
class MethodConfig(Part):
    """Which system adapts the model, and what single systems need besides `adapter`.

    Only the ``structlora`` kinds read `adapter.graph` to `adapter.schedule`; the others leave these sections aside, so
    that one file serves a whole comparison.

    Args:
        name: ``structlora``, a baseline, or StructLoRA stacked on one; ``structlora compare --list`` explains each.
        dropout: Probability that a column or row drops out, in (0, 1); ``lora_dropout`` only.
        samples: Mask sets a step, >= 1; ``lora_dropout`` only.
        weight: Weight of the penalty, > 0; ``lora_cos`` and ``lora_laplacian`` only.
        vera_r: Rank of the shared factors, >= 1; ``vera`` only.
        held_out: Share of the training examples that the ``structlora`` kinds first teach their noise levels with
            and do not train on, in [0, 1); fewer than 8 examples teach nothing. The other methods train on all.
        teach_until: Share of the steps after which levels stay and the examples held out are trained on like all
            others, in (0, 1]; ``structlora`` kinds only.
        teach_every: Optimizer steps between two lessons, each about as dear as three training steps, >= 1;
            ``structlora`` kinds only.
    """

    name: str = "structlora"
    dropout: Annotated[float, bounds(0, 1, open_low=True, open_high=True)] = 0.2
    samples: Count = 4
    weight: Positive = 0.1
    vera_r: Count = 256
    held_out: Share = 0.125
    teach_until: Annotated[float, bounds(0, 1, open_low=True)] = 0.5
    teach_every: Count = 10


@dataclass(kw_only=True)
class TrainConfig(Part):
    """The training loop.

    Args:
        output_dir: Folder for checkpoints, results and the exported adapter.
        epochs: Passes over the training set, > 0. `max_steps` wins if given.
        max_steps: Optimizer steps, >= 1; default: from `epochs`.
        batch_size: Examples a forward, >= 1.
        eval_batch_size: Examples a forward in evaluation, >= 1.
        gradient_accumulation_steps: Forwards an optimizer step, >= 1.
        lr: Peak learning rate, > 0.
        head_lr: Peak learning rate of the new head, where the task adds one, > 0; default: `lr`.
        weight_decay: AdamW's decoupled decay, >= 0; gates have none.
        lr_scheduler: One of Transformers' schedules that need nothing but the number of steps.
        warmup_ratio: Share of the steps with rising learning rate, in [0, 1).
        max_grad_norm: Gradients are clipped to this norm, > 0.
        mixed_precision: Accelerate's mixed precision.
        gradient_checkpointing: Recompute activations (non-reentrant) to save memory.
        eval_every: Optimizer steps between evaluations; 0: at the end only.
        save_every: Optimizer steps between checkpoints; 0: at the end only.
        keep_checkpoints: Number of checkpoints kept, >= 1.
        watch_every: Optimizer steps between looks at the structure of updates and gradients (LoRA kinds only); 0: none.
        record_every: Optimizer steps between records of the adapter graph in ``<output_dir>/graphs`` (``structlora``
            kinds only), a PyG dataset, see `structlora_pyg.tuner.recorder`; 0: none.
        trackers: Trackers to log to, by the names that Accelerate knows: ``tensorboard``, ``wandb``, ``mlflow``, ...
            They get what ``metrics.jsonl`` gets; local files go to ``<output_dir>/logs``.
        importance_examples: Measure after training what the removal of each direction costs, on this many evaluation
            examples (``structlora`` kinds only); a forward pass a direction. 0: do not.
        seed: Seed of head, data order, dropout and limits.
    """

    output_dir: str = "runs/train"
    epochs: Positive = 3.0
    max_steps: Count | None = None
    batch_size: Count = 32
    eval_batch_size: Count = 64
    gradient_accumulation_steps: Count = 1
    lr: Positive = 5e-4
    head_lr: Positive | None = None
    weight_decay: NotNegative = 0.01
    lr_scheduler: Schedule = "linear"
    warmup_ratio: Share = 0.06
    max_grad_norm: Positive = 1.0
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    gradient_checkpointing: bool = False
    eval_every: CountOrZero = 0
    save_every: CountOrZero = 0
    keep_checkpoints: Count = 2
    watch_every: CountOrZero = 0
    record_every: CountOrZero = 0
    trackers: list[str] = field(default_factory=list)
    importance_examples: CountOrZero = 0
    seed: CountOrZero = 0


@dataclass(kw_only=True)
class RunConfig(Part):
    """Everything ``structlora train`` needs.

    Args:
        model: See `ModelConfig`.
        data: See `DataConfig`.
        adapter: See `StructLoraConfig`.
        method: See `MethodConfig`.
        train: See `TrainConfig`.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    adapter: StructLoraConfig = field(default_factory=StructLoraConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


SECTIONS = ("model", "data", "method", "train")  # besides the adapter, which checks itself


def parse_config(
    cls: type[Section], tree: Mapping[str, Any], check: Callable[[Any], list[str]] = lambda built: []
) -> tuple[Any, list[str]]:
    """Return a section, or a whole configuration, built from nested mappings, and every problem; None if there is any.

    A problem names dotted path, value got, values allowed and the nearest name; `check` returns more of an instance.
    """
    built, found = build(cls, tree)
    found = list(dict.fromkeys([*found, *([] if built is None else check(built))]))
    return (None if found else built), found


def load_config(
    path: str | Path | None = None,
    overrides: Sequence[str] = (),
    check: Callable[[RunConfig], list[str]] = lambda config: [],
) -> RunConfig:
    """Build a `RunConfig` from a YAML file and ``key.sub=value`` overrides.

    Args:
        path: YAML file, or the name of a shipped one (``rte`` is ``structlora_pyg/configs/rte.yaml``).
        overrides: Strings ``key.sub=value``; the value is read as YAML.
        check: Returns more problems, for instance `structlora_pyg.study.run.run_problems`.

    Raises:
        ConfigError: With every problem found: unreadable file, unknown keys, wrong types, values out of range.
    """
    tree = {} if path is None else read_yaml(path)
    found = [problem for item in overrides for problem in override(tree, item)]
    config, more = parse_config(RunConfig, tree, check)
    if config is None or found:
        raise ConfigError(found + more)
    return config


def read_yaml(path: str | Path, shipped: bool = True) -> dict[str, Any]:
    """Return the content of a YAML file.

    Args:
        path: The file.
        shipped: Take the name of a shipped configuration for its file.

    Raises:
        ConfigError: If there is no such file, or it holds something else.
    """
    file, known = Path(path), shipped_configs()
    if shipped and not file.is_file():
        file = known.get(str(path), file)
    try:
        tree = yaml.load(file.read_text(encoding="utf-8"), LOADER)
    except FileNotFoundError:
        more = f"; shipped configs: {', '.join(known)}.{nearest(str(path), known)}"
        if not shipped:
            run = "; that names the configuration of a run, a grid is a file such as benchmarks/configs/glue.yaml"
            more = run if str(path) in known else ""
        raise ConfigError(f"config file {str(path)!r} does not exist{more}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"config file {str(path)!r} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"config file {str(path)!r} must hold a mapping of keys, got {type(tree).__name__}")
    if "peft_type" in tree:
        raise ConfigError(
            f"{path} is the configuration of an adapter that PEFT saved, not of a run, whose own is config.json in "
            f"its train.output_dir; to look at the adapter: structlora inspect {file.parent}"
        )
    return tree


def override(tree: dict[str, Any], item: str) -> list[str]:
    """Put ``key.sub=value`` into nested keys, the value read as YAML; return what is wrong with it."""
    key, separator, text = item.partition("=")
    if not separator or not key:
        return [f"override {item!r} is not of the form key.sub=value"]
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return [f"override {item!r}: the value is not valid YAML; quote it"]
    return put(tree, key, value)


def put(tree: dict[str, Any], key: str, value: Any) -> list[str]:
    """Set a dotted key in nested mappings; return what is wrong with it."""
    *parents, leaf = key.split(".")
    node = tree
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            return [f"{key}={value!r}: {parent!r} holds a value, not a section"]
        node = child
    node[leaf] = value
    return []


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested keys joined by dots."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        deeper = isinstance(value, Mapping) and value
        found |= flat(value, f"{prefix}{key}.") if deeper else {f"{prefix}{key}": value}
    return found
