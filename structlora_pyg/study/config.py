"""Typed configuration of a run: model, data, method and training loop around the adapter's configuration.

What only a method, a task or the machine can tell is checked by `structlora_pyg.study.run`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from structlora_pyg.checks import Count, CountOrZero, NotNegative, Positive, Section, Share, bounds
from structlora_pyg.config import StructLoraConfig

# Schedules of Transformers that need nothing but the number of steps.
Schedule = Literal[
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt",
]  # fmt: skip
Fraction = Annotated[float, bounds(0, 1, open_low=True)]
HINTS = {  # what other programs call it
    "device": " A run takes the GPU if there is one: CUDA_VISIBLE_DEVICES=1 chooses, ACCELERATE_USE_CPU=1 takes none.",
    **dict.fromkeys(("fp16", "bf16"), " Write train.mixed_precision=bf16."),
    **dict.fromkeys(("learning_rate", "rate"), " Did you mean train.lr?"),
    **dict.fromkeys(("num_train_epochs", "num_epochs"), " Did you mean train.epochs?"),
    "per_device_train_batch_size": " Did you mean train.batch_size?",
    **dict.fromkeys(("rank", "lora_r"), " Did you mean adapter.r?"),
    "alpha": " Did you mean adapter.lora_alpha?",
}


class Part(Section):
    """A section of a run, where a key may have been looked for in the wrong one."""

    @classmethod
    def hint(cls, key: str) -> str:
        """Return what an unknown key may have meant."""
        kinds = {**{name: globals()[f"{name.title()}Config"] for name in SECTIONS}, "adapter": StructLoraConfig}
        elsewhere = [s for s, kind in kinds.items() if key in {f.name for f in dataclasses.fields(kind)}]
        return HINTS.get(key, f" Did you mean {elsewhere[0]}.{key}?" if elsewhere else super().hint(key))


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
        examples = {"timm": "deit_tiny_patch16_224", "pyg": "gps"}
        if self.library in examples and not self.architecture:
            found.append(
                f"architecture is missing; library={self.library} needs it, for instance {examples[self.library]}"
            )
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
