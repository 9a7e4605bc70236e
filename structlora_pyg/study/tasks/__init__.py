"""What is learned: a pretrained model with a head, two data sets, a loss and a metric.

`load_task` gives a `Task`. Every module of this package is imported, and registers its tasks (see `register`); to add
one, add a file. A task works with the bare model, with a stock PEFT model and with a StructLoRA model alike, so that
every method is trained and measured by the same code.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel, send_to_device
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from structlora_pyg.checks import ConfigError, not_one_of, replace_file
from structlora_pyg.study.config import DataConfig, ModelConfig
from structlora_pyg.study.tasks.data import DataError
from structlora_pyg.study.tasks.loading import ModelError

__all__ = [
    "IGNORED", "METRICS", "TASKS", "Batch", "DataError", "ModelError", "ScoringTask", "Task", "TaskKind",
    "auxiliary", "evaluation", "examples_of", "inputs_of", "load_task", "pad", "register", "shared_length",
    "task_problems",
]  # fmt: skip

Batch = dict[str, Tensor]
LoadTask = Callable[[ModelConfig, DataConfig, int], "Task"]
IGNORED = -100  # a label that is no part of the loss
Metric = Callable[[Tensor, Tensor], float]


def _sklearn(name: str, **options: Any) -> Metric:
    def metric(logits: Tensor, labels: Tensor) -> float:
        import sklearn.metrics

        return float(getattr(sklearn.metrics, name)(labels, logits.argmax(-1), **options))

    return metric


def _correlation(scores: Tensor, labels: Tensor, kind: str) -> float:
    """Return a correlation; 0 where predictions or labels are constant, which leaves it undefined."""
    import scipy.stats

    scores = scores.squeeze(-1)
    if len(scores.unique()) == 1 or len(labels.unique()) == 1:
        return 0.0
    return float(getattr(scipy.stats, kind)(scores.double().numpy(), labels.double().numpy()).statistic)


# As the field reports them. Of logits (N, classes) and labels (N,), or of scores (N, 1) and labels (N,).
METRICS: dict[str, Metric] = {
    "accuracy": lambda logits, labels: (logits.argmax(-1) == labels).double().mean().item(),
    "top5": lambda logits, labels: (logits.topk(5).indices == labels.unsqueeze(-1)).any(-1).double().mean().item(),
    "f1": _sklearn("f1_score", zero_division=0.0),
    "f1_macro": _sklearn("f1_score", zero_division=0.0, average="macro"),
    "matthews": _sklearn("matthews_corrcoef"),
    "pearson": lambda scores, labels: _correlation(scores, labels, "pearsonr"),
    "spearman": lambda scores, labels: _correlation(scores, labels, "spearmanr"),
}


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """A model and what it is to learn.

    Args:
        model: Pretrained model; a head it lacked is new, drawn with the seed.
        train_set: Training examples.
        eval_set: Evaluation examples.
        metric: Key of the primary metric in what `evaluate` returns.
        num_labels: Classes; 1 for a regression, choices of a multiple choice, 0 for a language model.
        head: Modules to be trained as a whole and saved with the adapter (PEFT's ``modules_to_save``).
        higher_is_better: Direction of the primary metric.
        preprocessor: Tokenizer, processor or image processor, saved with the adapter; default none.
        classes: Names of the classes in the order of their indices, saved as ``classes.json``; default none.
    """

    model: nn.Module
    train_set: Sequence[Any]
    eval_set: Sequence[Any]
    metric: str
    num_labels: int
    head: tuple[str, ...] = ()
    higher_is_better: bool = True
    preprocessor: Any = None
    classes: tuple[str, ...] = ()

    @abstractmethod
    def collate(self, examples: Sequence[Any]) -> Batch:
        """Return a padded batch of examples, on the CPU."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the scalar loss of a batch: the task's and, in training mode, the model's auxiliary one."""

    @abstractmethod
    def evaluate(self, model: nn.Module, loader: Iterable[Batch]) -> dict[str, float]:
        """Return ``loss`` and the metrics over all batches; the model is in evaluation mode meanwhile.

        Raises:
            FloatingPointError: If the model's output is not finite.
        """

    def save_extras(self, folder: Path) -> None:
        """Write what the exported adapter needs beside the weights: tokenizer or image processor, class names."""
        if self.preprocessor is not None:
            self.preprocessor.save_pretrained(folder)
        if self.classes:
            replace_file(folder / "classes.json", json.dumps(self.classes, indent=0) + "\n")

    def enable_gradient_checkpointing(self) -> None:
        """Make the model recompute activations in the backward pass, without reentrance.

        Raises:
            ModelError: If the model cannot.
        """
        network: Any = self.model
        try:
            if isinstance(network, PreTrainedModel):
                network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            else:
                network.set_grad_checkpointing(True)
        except (ValueError, AssertionError, AttributeError) as error:
            raise ModelError(f"train.gradient_checkpointing=true, but {type(network).__name__} has none") from error


@dataclass(frozen=True, kw_only=True)
class ScoringTask(Task):
    """A task whose model gives scores: of the classes (N, classes), of the choices, or one of a regression (N, 1).

    Args:
        other_metrics: Keys of `METRICS` that are reported beside the primary one.
    """

    other_metrics: tuple[str, ...] = ()

    @abstractmethod
    def scores(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the scores of a batch that is on the model's device."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return cross-entropy over the scores, and the auxiliary loss."""
        scores = self.scores(model, batch).float()
        return F.cross_entropy(scores, batch["labels"]) + auxiliary(model, self.auxiliary_labels(batch["labels"]))

    def auxiliary_labels(self, labels: Tensor) -> Tensor:
        """Return what the auxiliary loss is to tell apart: a label for every sequence that the model has seen."""
        return labels

    def evaluate(self, model: nn.Module, loader: Iterable[Batch]) -> dict[str, float]:
        """Return ``loss`` (cross-entropy, or squared error of a regression) and the metrics."""
        scores, labels = self.predictions(model, loader)
        regression = self.num_labels == 1
        loss = F.mse_loss(scores.squeeze(-1), labels) if regression else F.cross_entropy(scores, labels)
        names = (self.metric, *self.other_metrics)
        return {"loss": loss.item(), **{name: METRICS[name](scores, labels) for name in names}}

    def predictions(self, model: nn.Module, loader: Iterable[Batch]) -> tuple[Tensor, Tensor]:
        """Return scores and labels of all batches, on the CPU.

        Raises:
            FloatingPointError: If a score is not finite.
        """
        with evaluation(model) as device:
            pairs = [
                (self.scores(model, send_to_device(batch, device)).float().cpu(), batch["labels"]) for batch in loader
            ]
        scores, labels = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        if not scores.isfinite().all():
            raise FloatingPointError("the model's output in evaluation is not finite")
        return scores, labels


@dataclass(frozen=True)
class TaskKind:
    """An entry of the registry.

    Args:
        summary: One line for ``structlora compare --list``.
        load: Reads the data, then the model, and puts them together. The seed is that of the new head and of the
            examples drawn; torch's generator is seeded with it already.
        options: Fields of `DataConfig` that only some tasks read and this one does.
        libraries: Values of ``model.library`` that it can be given.
        brings_data: Whether it has data of its own, and no ``data.path``.
    """

    summary: str
    load: LoadTask
    options: tuple[str, ...] = ()
    libraries: tuple[str, ...] = ("transformers",)
    brings_data: bool = False


TASKS: dict[str, TaskKind] = {}


def register(name: str, summary: str, **about: Any) -> Callable[[LoadTask], LoadTask]:
    """Return a decorator that makes a function the task ``data.task=<name>``; see `TaskKind` for the arguments.

    Raises:
        ValueError: If the name is taken.
    """
    if name in TASKS:
        raise ValueError(f"the task {name!r} is registered already")

    def decorator(load: LoadTask) -> LoadTask:
        TASKS[name] = TaskKind(summary, load, **about)
        return load

    return decorator


def auxiliary(model: nn.Module, labels: Tensor) -> Tensor | float:
    """Return the model's auxiliary loss of the last forward; 0 in evaluation mode and for models without one."""
    loss = getattr(extract_model_from_parallel(model), "auxiliary_loss", None)
    return loss(labels) if model.training and loss is not None else 0.0


@contextlib.contextmanager
def evaluation(model: nn.Module) -> Iterator[torch.device]:
    """Put the model into evaluation mode without gradients; give its device."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield next(model.parameters()).device
    finally:
        model.train(training)


def inputs_of(batch: Batch) -> Batch:
    """Return what the model is given of a batch: all but the labels."""
    return {name: tensor for name, tensor in batch.items() if name != "labels"}


def examples_of(tokens: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Return a tokenizer's lists by name as one mapping per example."""
    return [dict(zip(tokens, values, strict=True)) for values in zip(*tokens.values(), strict=True)]


def pad(examples: Sequence[Mapping[str, Sequence[int]]], tokenizer: PreTrainedTokenizerBase) -> Batch:
    """Return tensors of shape (examples, longest example), filled up at the right, whatever side the tokenizer has."""
    fill = {"input_ids": tokenizer.pad_token_id, "token_type_ids": tokenizer.pad_token_type_id, "labels": IGNORED}
    return {
        name: pad_sequence([torch.tensor(e[name]) for e in examples], batch_first=True, padding_value=fill.get(name, 0))
        for name in examples[0]
    }


def shared_length(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Return how many items two sequences have in common at their beginnings."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def task_problems(model: ModelConfig, data: DataConfig) -> list[str]:
    """Return an unknown task, a library that cannot serve it and options of other tasks; empty if all is well."""
    if data.task not in TASKS:
        return [not_one_of("data.task", data.task, TASKS)]
    found = []
    if TASKS[data.task].brings_data and data.path:
        found.append(
            f"data.path={data.path!r} has no effect with data.task={data.task}, which brings its data; remove it"
        )
    elif not TASKS[data.task].brings_data and not data.path:
        found.append("data.path is missing; give a folder, a file or a hub id")
    if model.library not in TASKS[data.task].libraries:
        right = " or ".join(f"model.library={name}" for name in TASKS[data.task].libraries)
        found.append(f"model.library={model.library} cannot serve data.task={data.task}; set {right}")
    for option in sorted({option for kind in TASKS.values() for option in kind.options}):
        if getattr(data, option) is not None and option not in TASKS[data.task].options:
            users = ", ".join(name for name, kind in TASKS.items() if option in kind.options)
            found.append(f"data.{option} has no effect with data.task={data.task}; it belongs to {users}")
    if data.prompt is not None and ("{question}" in data.prompt) != (data.task == "vqa") and not found:
        place = "needs {question} where the question goes" if data.task == "vqa" else "has no {question}"
        found.append(f"data.prompt={data.prompt!r}: the prompt of data.task={data.task} {place}")
    return found


def load_task(model: ModelConfig, data: DataConfig, seed: int) -> Task:
    """Read the data, then the pretrained weights, and put them together.

    Args:
        model: Which model; its path is looked up like that of the data, see `structlora_pyg.study.tasks.data.resolve`.
        data: Which task and data.
        seed: Seed of the new head and of the examples drawn.

    Raises:
        DataError: If the data are missing or malformed.
        ModelError: If model or tokenizer are missing, damaged, or not made for the task.
        ConfigError: If the task is unknown or does not go with the options, or needs a program or package that is
            missing.
    """
    if found := task_problems(model, data):
        raise ConfigError(found)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return TASKS[data.task].load(model, data, seed)


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
