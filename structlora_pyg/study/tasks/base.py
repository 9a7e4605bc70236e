"""What every kind of task shares: the interface that training sees, examples, batches and drawn subsets."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from structlora_pyg.study.config import DataConfig
from structlora_pyg.study.loading import ModelError
from structlora_pyg.study.tasks.subsets import fraction, subsample

Batch = dict[str, Tensor]
Item = TypeVar("Item")


@runtime_checkable
class HasAuxiliaryLoss(Protocol):
    """A model that adds terms of its own to the task loss, as a StructLoRA model does."""

    def auxiliary_loss(self, labels: Tensor | None = None) -> Tensor:
        """Return the scalar terms of the last forward."""


class Examples(Dataset[Item]):
    """Prepared examples in memory.

    Args:
        items: The examples, in order.
    """

    def __init__(self, items: Sequence[Item]) -> None:
        self.items = items

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.items)

    def __getitem__(self, index: int) -> Item:
        """Return one example."""
        return self.items[index]


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
    """

    model: nn.Module
    train_set: Examples[Any]
    eval_set: Examples[Any]
    metric: str
    num_labels: int
    head: tuple[str, ...] = ()
    higher_is_better: bool = True

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

    def save_extras(self, folder: Path) -> None:  # noqa: B027 - a bare image model has nothing to add
        """Write what the exported adapter needs beside the weights: tokenizer or image normalisation."""

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


def limited(train: int, evaluation: int, data: DataConfig, seed: int) -> tuple[list[int], list[int]]:
    """Return the indices that limits or fraction leave of so many training and evaluation examples.

    Raises:
        DataError: If a limit asks for more than there are.
    """
    if data.train_limit is None:
        chosen = fraction(train, data.train_fraction, seed)
    else:
        chosen = subsample(train, data.train_limit, seed, "data.train_limit")
    return chosen, subsample(evaluation, data.eval_limit, seed, "data.eval_limit")


def drawn(splits: Sequence[Sequence[Item]], data: DataConfig, seed: int) -> list[list[Item]]:
    """Return the training and the evaluation examples that limits or fraction leave."""
    indices = limited(len(splits[0]), len(splits[1]), data, seed)
    return [[split[i] for i in part] for split, part in zip(splits, indices, strict=True)]


def rows_of(tokens: Any) -> list[dict[str, list[int]]]:
    """Return a tokenizer's lists by name as one mapping an example."""
    return [dict(zip(tokens, row, strict=True)) for row in zip(*tokens.values(), strict=True)]


def shared_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many tokens two lists have in common at their beginnings."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def pad(rows: Sequence[dict[str, list[int]]], tokenizer: PreTrainedTokenizerBase) -> Batch:
    """Return tensors of shape (rows, longest row), filled up at the right."""
    length = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": tokenizer.pad_token_id, "token_type_ids": tokenizer.pad_token_type_id}
    return {
        name: torch.tensor([row[name] + [fill.get(name, 0)] * (length - len(row[name])) for row in rows])
        for name in rows[0]
    }


def moved(batch: Batch, device: torch.device) -> Batch:
    """Return a batch on a device."""
    return {name: tensor.to(device) for name, tensor in batch.items()}


def inputs_of(batch: Batch, device: torch.device) -> Batch:
    """Return what the model is given of a batch: all but the labels, on a device."""
    return {name: tensor.to(device) for name, tensor in batch.items() if name != "labels"}


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


def auxiliary(model: nn.Module, labels: Tensor) -> Tensor | float:
    """Return the model's auxiliary loss of the last forward; 0 in evaluation mode and for models without one."""
    inner = extract_model_from_parallel(model)
    return inner.auxiliary_loss(labels) if model.training and isinstance(inner, HasAuxiliaryLoss) else 0.0
