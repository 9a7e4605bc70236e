"""What is learned: a pretrained model with a head, two data sets, a loss and a metric.

`load_task` gives a `Task`. There are four kinds: sentences (classification and regression), multiple choice, text (a
causal language model) and images. A task works with the bare model, with a stock PEFT model and with a StructLoRA
model alike, so that every method is trained and measured by the same code.
"""

from __future__ import annotations

import contextlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import torch
import transformers
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto import modeling_auto

from structlora_pyg.config import DataConfig, ModelConfig, TaskName
from structlora_pyg.data import (
    CIFAR_CLASSES,
    GLUE,
    ChoiceExample,
    DataError,
    Images,
    TextExample,
    read_examples,
    read_images,
    read_text,
    subsample,
)
from structlora_pyg.files import replace_file
from structlora_pyg.loading import (
    ModelError,
    is_causal,
    load_image_model,
    load_network,
    load_timm_model,
    load_tokenizer,
    model_source,
)

TASKS: dict[TaskName, str] = {
    "rte": "does the first sentence entail the second? GLUE RTE; accuracy",
    "mrpc": "do two sentences say the same? GLUE MRPC; F1, accuracy",
    "cola": "is a sentence acceptable English? GLUE CoLA; Matthews correlation",
    "stsb": "how similar are two sentences, from 0 to 5? GLUE STS-B; Pearson, Spearman",
    "wnli": "does the second sentence follow, its pronoun resolved? GLUE WNLI; accuracy",
    "boolq": "yes or no, given a passage? BoolQ; accuracy",
    "piqa": "which of two solutions reaches the goal? PIQA; accuracy",
    "cifar100": "which of 100 classes does a picture show? CIFAR-100; accuracy",
    "text": "the next token of your own text; perplexity, lower is better",
}
Batch = dict[str, Tensor]
Item = TypeVar("Item")

EVAL_SHARE = 0.1  # part of the blocks of a text that is held out


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


class Sentence(NamedTuple):
    """Token lists by name (``input_ids``, ...) and the label of one example."""

    tokens: dict[str, list[int]]
    label: int | float


class Choices(NamedTuple):
    """Token lists of every choice, the position where its solution starts, and the index of the right one."""

    tokens: list[dict[str, list[int]]]
    starts: list[int]
    label: int


class Picture(NamedTuple):
    """A picture, uint8 of shape (3, height, width), and its class."""

    pixels: Tensor
    label: int


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


@dataclass(frozen=True, kw_only=True)
class SentenceTask(Task):
    """One or two sentences into a class or a score."""

    tokenizer: PreTrainedTokenizerBase

    def collate(self, examples: Sequence[Sentence]) -> Batch:
        """Return ``input_ids``, ``attention_mask`` and others of shape (B, T), ``labels`` of shape (B,)."""
        labels = torch.tensor([e.label for e in examples], dtype=torch.float if self.num_labels == 1 else torch.long)
        return {**_pad([e.tokens for e in examples], self.tokenizer), "labels": labels}

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return cross-entropy, or squared error for a regression, and the auxiliary loss."""
        return model(**batch).loss

    def evaluate(self, model: nn.Module, loader: Iterable[Batch]) -> dict[str, float]:
        """Return ``loss`` and accuracy, F1, Matthews or correlations, by task."""
        with _evaluation(model) as device:
            pairs = [(model(**_inputs(b, device)).logits.float().cpu(), b["labels"]) for b in loader]
        logits, labels = _joined(pairs)
        if self.num_labels == 1:
            scores = logits.squeeze(-1)
            return {"loss": F.mse_loss(scores, labels).item(), **_correlations(scores, labels)}
        metrics = _class_metrics(logits, labels)
        if self.metric in ("f1", "matthews"):
            metrics[self.metric] = _class_score(self.metric, logits.argmax(-1), labels)
        return metrics

    def save_extras(self, folder: Path) -> None:
        """Write the tokenizer."""
        self.tokenizer.save_pretrained(folder)


@dataclass(frozen=True, kw_only=True)
class ChoiceTask(Task):
    """Which solution fits the goal?

    A causal language model scores a choice by the summed log-likelihood of the solution's tokens given the goal; an
    encoder by its multiple-choice head. The loss is the cross-entropy over the scores of the choices.
    """

    tokenizer: PreTrainedTokenizerBase
    causal: bool

    def collate(self, examples: Sequence[Choices]) -> Batch:
        """Return token tensors of shape (B, C, T), ``starts`` (B, C) and ``labels`` (B,)."""
        flat = _pad([tokens for e in examples for tokens in e.tokens], self.tokenizer)
        shape = (len(examples), self.num_labels, -1)
        return {
            **{name: tensor.view(shape) for name, tensor in flat.items()},
            "starts": torch.tensor([e.starts for e in examples]),
            "labels": torch.tensor([e.label for e in examples]),
        }

    def scores(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return one score a choice, shape (B, C)."""
        inputs = {name: t for name, t in batch.items() if name not in ("starts", "labels")}
        if not self.causal:
            return model(**inputs).logits
        rows = {name: t.flatten(0, 1) for name, t in inputs.items()}
        logits = model(**rows).logits[:, :-1].float()
        targets = rows["input_ids"][:, 1:]
        log_likelihood = -F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
        positions = torch.arange(1, targets.shape[1] + 1, device=targets.device)
        in_solution = (positions >= batch["starts"].view(-1, 1)) & rows["attention_mask"][:, 1:].bool()
        return (log_likelihood * in_solution).sum(-1).view_as(batch["starts"])

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return cross-entropy over the choices and the auxiliary loss, whose labels are 1 for the right rows."""
        scores = self.scores(model, batch)
        right = F.one_hot(batch["labels"], self.num_labels).flatten()
        return F.cross_entropy(scores.float(), batch["labels"]) + _auxiliary(model, right)

    def evaluate(self, model: nn.Module, loader: Iterable[Batch]) -> dict[str, float]:
        """Return ``loss`` and ``accuracy``."""
        with _evaluation(model) as device:
            pairs = [(self.scores(model, _moved(b, device)).float().cpu(), b["labels"]) for b in loader]
        return _class_metrics(*_joined(pairs))

    def save_extras(self, folder: Path) -> None:
        """Write the tokenizer."""
        self.tokenizer.save_pretrained(folder)


@dataclass(frozen=True, kw_only=True)
class TextTask(Task):
    """The next token of a text, in blocks of equal length."""

    tokenizer: PreTrainedTokenizerBase

    def collate(self, examples: Sequence[Tensor]) -> Batch:
        """Return ``input_ids``, ``attention_mask`` and ``labels`` of shape (B, T)."""
        ids = torch.stack(list(examples))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean negative log-likelihood of a token and the auxiliary loss."""
        return model(**batch).loss

    def evaluate(self, model: nn.Module, loader: Iterable[Batch]) -> dict[str, float]:
        """Return ``loss``, per token, and its exponential, the ``perplexity``."""
        total, blocks = 0.0, 0
        with _evaluation(model) as device:
            for batch in loader:
                ids = batch["input_ids"].to(device)
                logits = model(**_inputs(batch, device)).logits[:, :-1].float()
                total += F.cross_entropy(logits.transpose(1, 2), ids[:, 1:]).item() * len(ids)
                blocks += len(ids)
        mean = total / blocks
        perplexity = torch.tensor(mean, dtype=torch.double).exp().item()
        if not math.isfinite(perplexity):
            raise FloatingPointError(f"the evaluation loss is {mean}")
        return {"loss": mean, "perplexity": perplexity}

    def save_extras(self, folder: Path) -> None:
        """Write the tokenizer."""
        self.tokenizer.save_pretrained(folder)


@dataclass(frozen=True, kw_only=True)
class ImageTask(Task):
    """A picture into a class. Resizing, flipping and normalising happen on the model's device."""

    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def collate(self, examples: Sequence[Picture]) -> Batch:
        """Return ``pixels`` uint8 of shape (B, 3, height, width) and ``labels`` (B,)."""
        labels = torch.tensor([e.label for e in examples])
        return {"pixels": torch.stack([e.pixels for e in examples]), "labels": labels}

    def pixel_values(self, pixels: Tensor, flip: bool) -> Tensor:
        """Return normalised pictures of shape (B, 3, image_size, image_size), half of them mirrored if `flip`.

        The draw comes from the CPU's generator, so that a resumed run repeats it on every device.
        """
        x = pixels.float() / 255
        if flip:
            mirrored = (torch.rand(len(x)) < 0.5).to(x.device)
            x = torch.where(mirrored.view(-1, 1, 1, 1), x.flip(-1), x)
        if x.shape[-2:] != (self.image_size, self.image_size):
            size = (self.image_size, self.image_size)
            x = F.interpolate(x, size, mode="bicubic", antialias=True).clamp(0, 1)
        mean, std = (torch.tensor(v, device=x.device).view(1, 3, 1, 1) for v in (self.mean, self.std))
        return (x - mean) / std

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return cross-entropy and the auxiliary loss."""
        x = self._ready(batch["pixels"], flip=model.training)
        if isinstance(self.model, PreTrainedModel):
            return model(pixel_values=x, labels=batch["labels"]).loss
        return F.cross_entropy(model(x).float(), batch["labels"]) + _auxiliary(model, batch["labels"])

    def evaluate(self, model: nn.Module, loader: Iterable[Batch]) -> dict[str, float]:
        """Return ``loss`` and ``accuracy``."""
        pairs = []
        with _evaluation(model) as device:
            for batch in loader:
                x = self._ready(batch["pixels"].to(device), flip=False)
                logits = model(pixel_values=x).logits if isinstance(self.model, PreTrainedModel) else model(x)
                pairs.append((logits.float().cpu(), batch["labels"]))
        return _class_metrics(*_joined(pairs))

    def save_extras(self, folder: Path) -> None:
        """Write ``preprocessor_config.json`` with size, mean and standard deviation."""
        side = {"height": self.image_size, "width": self.image_size}
        values = {"size": side, "image_mean": self.mean, "image_std": self.std, "resample": 3, "do_normalize": True}
        replace_file(folder / "preprocessor_config.json", json.dumps(values, indent=2) + "\n")

    def _ready(self, pixels: Tensor, flip: bool) -> Tensor:
        return self.pixel_values(pixels, flip).to(next(self.model.parameters()).dtype)


def load_task(model: ModelConfig, data: DataConfig, seed: int) -> Task:
    """Read the data, then the pretrained weights, and put them together.

    Args:
        model: Which model; its path is looked up like that of the data, see `structlora_pyg.data.resolve`.
        data: Which task and data.
        seed: Seed of the new head and of the drawn subsets.

    Raises:
        DataError: If the data are missing or malformed.
        ModelError: If model or tokenizer are missing, damaged, or not made for the task.
    """
    loaders = {"piqa": _choice_task, "text": _text_task, "cifar100": _image_task}
    if model.library == "timm" and data.task != "cifar100":
        raise ModelError(f"library=timm cannot serve task={data.task}; set model.library=transformers")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return loaders.get(data.task, _sentence_task)(model, data, seed)


def _sentence_task(model: ModelConfig, data: DataConfig, seed: int) -> Task:
    train, evaluation = (
        _drawn(*part) for part in _splits(read_examples(data.task, data.path, data.validation_share), data, seed)
    )
    regression = data.task in GLUE and GLUE[data.task].classes is None
    if regression and len(evaluation) < 2:
        raise DataError(data.path, found="one evaluation example", expected="two or more; correlations need them")
    source, config = model_source(model)
    network, head = load_network(
        transformers.AutoModelForSequenceClassification, source, model,
        num_labels=1 if regression else 2,
        problem_type="regression" if regression else "single_label_classification",
    )  # fmt: skip
    tokenizer = load_tokenizer(source, network, data.max_length, config)
    network.config.pad_token_id = tokenizer.pad_token_id
    return SentenceTask(
        model=network,
        train_set=_sentences(train, tokenizer, data.max_length),
        eval_set=_sentences(evaluation, tokenizer, data.max_length),
        metric={"mrpc": "f1", "cola": "matthews", "stsb": "pearson"}.get(data.task, "accuracy"),
        num_labels=network.config.num_labels,
        head=head,
        tokenizer=tokenizer,
    )


def _choice_task(model: ModelConfig, data: DataConfig, seed: int) -> Task:
    train, evaluation = (
        _drawn(*part) for part in _splits(read_examples(data.task, data.path, data.validation_share), data, seed)
    )
    source, config = model_source(model)
    causal = is_causal(config)
    if not causal and config.model_type not in modeling_auto.MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES:
        raise ModelError(
            f"{source}: {config.model_type} with architectures {config.architectures} is neither a causal language "
            "model nor has Transformers a multiple-choice head for it; choose a Llama-like or a BERT-like model"
        )
    auto = transformers.AutoModelForCausalLM if causal else transformers.AutoModelForMultipleChoice
    network, head = load_network(auto, source, model)
    tokenizer = load_tokenizer(source, network, data.max_length, config)
    encode = _causal_choices if causal else _encoder_choices
    return ChoiceTask(
        model=network,
        train_set=Examples(encode(train, tokenizer, data.max_length)),
        eval_set=Examples(encode(evaluation, tokenizer, data.max_length)),
        metric="accuracy",
        num_labels=len(train[0].choices),
        head=head,
        tokenizer=tokenizer,
        causal=causal,
    )


def _text_task(model: ModelConfig, data: DataConfig, seed: int) -> Task:
    documents = read_text(data.path)
    source, config = model_source(model)
    if not is_causal(config):
        raise ModelError(
            f"{source}: {config.model_type} with architectures {config.architectures} is not a causal language model; "
            "task=text needs one, for instance a Llama"
        )
    network, head = load_network(transformers.AutoModelForCausalLM, source, model)
    tokenizer = load_tokenizer(source, network, data.max_length, config)
    blocks = _blocks(documents, tokenizer, data.max_length)
    held_out = max(1, round(len(blocks) * EVAL_SHARE))
    if len(blocks) <= held_out:
        raise DataError(
            data.path, found=f"text for {len(blocks)} blocks of {data.max_length} tokens",
            expected="at least two; give more text or a smaller max_length",
        )  # fmt: skip
    splits = (list(blocks[:-held_out]), list(blocks[-held_out:]))
    if data.validation_share:  # at the end of the training part: neighbouring blocks continue each other
        cut = max(1, round(len(splits[0]) * data.validation_share))
        if cut >= len(splits[0]):
            raise DataError(
                data.path, found=f"{len(splits[0])} blocks to train on",
                expected=f"enough to cut validation_share={data.validation_share:g} from",
            )  # fmt: skip
        splits = (splits[0][:-cut], splits[0][-cut:])
    parts = _splits(splits, data, seed)
    train, evaluation = (Examples(_drawn(*part)) for part in parts)
    return TextTask(
        model=network, train_set=train, eval_set=evaluation, metric="perplexity", num_labels=0, head=head,
        tokenizer=tokenizer, higher_is_better=False,
    )  # fmt: skip


def _image_task(model: ModelConfig, data: DataConfig, seed: int) -> Task:
    parts = _splits(read_images(data.path, data.validation_share), data, seed)
    train, evaluation = (_pictures(*part) for part in parts)
    make = load_timm_model if model.library == "timm" else load_image_model
    network, head, mean, std = make(model, data.image_size)
    return ImageTask(
        model=network, train_set=train, eval_set=evaluation, metric="accuracy", num_labels=CIFAR_CLASSES, head=head,
        image_size=data.image_size, mean=mean, std=std,
    )  # fmt: skip


def _splits(splits: Sequence[Any], data: DataConfig, seed: int) -> list[tuple[Any, list[int]]]:
    """Return each split with the indices that its limit leaves."""
    limits = {"train_limit": data.train_limit, "eval_limit": data.eval_limit}
    sizes = [len(s.labels) if isinstance(s, Images) else len(s) for s in splits]
    return [
        (split, subsample(size, limit, seed, f"data.{name}"))
        for split, size, (name, limit) in zip(splits, sizes, limits.items(), strict=True)
    ]


def _drawn(examples: Sequence[Item], indices: Sequence[int]) -> list[Item]:
    return [examples[i] for i in indices]


def _pictures(images: Images, indices: Sequence[int]) -> Examples[Picture]:
    pixels = torch.from_numpy(images.pixels[indices]).permute(0, 3, 1, 2)
    return Examples([Picture(x, int(y)) for x, y in zip(pixels, images.labels[indices], strict=True)])


def _sentences(examples: Sequence[TextExample], tokenizer: Any, max_length: int) -> Examples[Sentence]:
    texts = [[e.first for e in examples]]
    if examples[0].second is not None:
        texts.append([e.second or "" for e in examples])
    tokens = tokenizer(*texts, truncation=True, max_length=max_length)
    return Examples([Sentence(row, e.label) for row, e in zip(_rows(tokens), examples, strict=True)])


def _encoder_choices(examples: Sequence[ChoiceExample], tokenizer: Any, max_length: int) -> list[Choices]:
    goals = [e.goal for e in examples for _ in e.choices]
    solutions = [c for e in examples for c in e.choices]
    rows = iter(_rows(tokenizer(goals, solutions, truncation=True, max_length=max_length)))
    return [Choices([next(rows) for _ in e.choices], [0] * len(e.choices), e.label) for e in examples]


def _causal_choices(examples: Sequence[ChoiceExample], tokenizer: Any, max_length: int) -> list[Choices]:
    """Return goal and solution as one text each.

    The solution starts at the first token in which the text differs from the goal alone, so that a token that spans the
    border belongs to it. What is too long loses the start of the goal first, then the end of the solution.
    """
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    goals = tokenizer([e.goal for e in examples], add_special_tokens=False)["input_ids"]
    texts = [f"{e.goal} {choice}" for e in examples for choice in e.choices]
    whole = iter(tokenizer(texts, add_special_tokens=False)["input_ids"])
    result = []
    for example, goal in zip(examples, goals, strict=True):
        tokens, starts = [], []
        for _ in example.choices:
            ids = next(whole)
            shared = next((i for i, pair in enumerate(zip(goal, ids, strict=False)) if pair[0] != pair[1]), None)
            border = min(len(goal), len(ids)) if shared is None else shared
            context, solution = begin + ids[:border], ids[border:]
            # The first token has no predecessor to be predicted from, so one token of context has to stay.
            kept = max(1, max_length - len(solution))
            context = begin + context[len(begin) :][-(kept - len(begin)) :] if kept > len(begin) else context[:kept]
            ids = (context + solution)[:max_length]
            tokens.append({"input_ids": ids, "attention_mask": [1] * len(ids)})
            starts.append(len(context))
        result.append(Choices(tokens, starts, example.label))
    return result


def _blocks(documents: Sequence[str], tokenizer: Any, length: int) -> Tensor:
    """Return the text as token ids of shape (blocks, length), an end token after each document; a rest is dropped."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    rows = tokenizer(list(documents), add_special_tokens=False, verbose=False)["input_ids"]
    ids = torch.tensor([token for row in rows for token in (*begin, *row, *end)])
    return ids[: len(ids) // length * length].view(-1, length)


def _rows(tokens: Any) -> list[dict[str, list[int]]]:
    return [dict(zip(tokens, row, strict=True)) for row in zip(*tokens.values(), strict=True)]


def _pad(rows: Sequence[dict[str, list[int]]], tokenizer: PreTrainedTokenizerBase) -> Batch:
    """Return tensors of shape (rows, longest row), filled up at the right."""
    length = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": tokenizer.pad_token_id, "token_type_ids": tokenizer.pad_token_type_id}
    return {
        name: torch.tensor([row[name] + [fill.get(name, 0)] * (length - len(row[name])) for row in rows])
        for name in rows[0]
    }


def _moved(batch: Batch, device: torch.device) -> Batch:
    return {name: tensor.to(device) for name, tensor in batch.items()}


def _inputs(batch: Batch, device: torch.device) -> Batch:
    return {name: tensor.to(device) for name, tensor in batch.items() if name != "labels"}


@contextlib.contextmanager
def _evaluation(model: nn.Module) -> Iterator[torch.device]:
    """Put the model into evaluation mode without gradients; give its device."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield next(model.parameters()).device
    finally:
        model.train(training)


def _auxiliary(model: nn.Module, labels: Tensor) -> Tensor | float:
    inner = extract_model_from_parallel(model)
    return inner.auxiliary_loss(labels) if model.training and isinstance(inner, HasAuxiliaryLoss) else 0.0


def _joined(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    outputs, labels = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    if not outputs.isfinite().all():
        raise FloatingPointError("the model's output in evaluation is not finite")
    return outputs, labels


def _class_metrics(logits: Tensor, labels: Tensor) -> dict[str, float]:
    accuracy = (logits.argmax(-1) == labels).double().mean().item()
    return {"loss": F.cross_entropy(logits, labels).item(), "accuracy": accuracy}


def _class_score(metric: str, predicted: Tensor, labels: Tensor) -> float:
    from sklearn.metrics import f1_score, matthews_corrcoef

    if metric == "f1":
        return float(f1_score(labels, predicted, zero_division=0.0))
    return float(matthews_corrcoef(labels, predicted))


def _correlations(scores: Tensor, labels: Tensor) -> dict[str, float]:
    """Return both correlations; 0 where predictions or labels are constant, which leaves them undefined."""
    from scipy.stats import pearsonr, spearmanr

    if len(scores.unique()) == 1 or len(labels.unique()) == 1:
        return {"pearson": 0.0, "spearman": 0.0}
    x, y = scores.double().numpy(), labels.double().numpy()
    return {"pearson": float(pearsonr(x, y).statistic), "spearman": float(spearmanr(x, y).statistic)}
