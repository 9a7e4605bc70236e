"""What is learned: a pretrained model with a head, two data sets, a loss and a metric.

`load_task` gives a `Task`. There are four kinds: sentences (classification and regression), multiple choice, text (a
causal language model) and images. A task works with the bare model, with a stock PEFT model and with a StructLoRA
model alike, so that every method is trained and measured by the same code.
"""

from __future__ import annotations

import contextlib
import json
import math
import pickle
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import timm
import torch
import transformers
from accelerate.utils import extract_model_from_parallel
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.image_processing_base import ImageProcessingMixin
from transformers.models.auto import modeling_auto

from structlora_pyg.config import DataConfig, ModelConfig, nearest
from structlora_pyg.data import (
    CIFAR_CLASSES,
    GLUE,
    ChoiceExample,
    DataError,
    Images,
    TextExample,
    not_found,
    read_examples,
    read_images,
    read_text,
    resolve,
    subsample,
)
from structlora_pyg.files import replace_file

Batch = dict[str, Tensor]
Item = TypeVar("Item")

EVAL_SHARE = 0.1  # part of the blocks of a text that is held out
LOAD_ERRORS = (OSError, ValueError, RuntimeError, KeyError, ImportError, EOFError, SafetensorError, pickle.PickleError)


class ModelError(ValueError):
    """A pretrained model or tokenizer that is missing, damaged, or not made for the task."""


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
                total += model(**_moved(batch, device)).loss.item() * len(batch["input_ids"])
                blocks += len(batch["input_ids"])
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
    train, evaluation = (_drawn(*part) for part in _splits(read_examples(data.task, data.path), data, seed))
    regression = data.task in GLUE and GLUE[data.task].classes is None
    if regression and len(evaluation) < 2:
        raise DataError(data.path, found="one evaluation example", expected="two or more; correlations need them")
    source, config = _model_source(model)
    network, head = _network(
        transformers.AutoModelForSequenceClassification, source, model,
        num_labels=1 if regression else 2,
        problem_type="regression" if regression else "single_label_classification",
    )  # fmt: skip
    tokenizer = _tokenizer(source, network, data.max_length, config)
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
    train, evaluation = (_drawn(*part) for part in _splits(read_examples(data.task, data.path), data, seed))
    source, config = _model_source(model)
    causal = _is_causal(config)
    if not causal and config.model_type not in modeling_auto.MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES:
        raise ModelError(
            f"{source}: {config.model_type} with architectures {config.architectures} is neither a causal language "
            "model nor has Transformers a multiple-choice head for it; choose a Llama-like or a BERT-like model"
        )
    auto = transformers.AutoModelForCausalLM if causal else transformers.AutoModelForMultipleChoice
    network, head = _network(auto, source, model)
    tokenizer = _tokenizer(source, network, data.max_length, config)
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
    source, config = _model_source(model)
    if not _is_causal(config):
        raise ModelError(
            f"{source}: {config.model_type} with architectures {config.architectures} is not a causal language model; "
            "task=text needs one, for instance a Llama"
        )
    network, head = _network(transformers.AutoModelForCausalLM, source, model)
    tokenizer = _tokenizer(source, network, data.max_length, config)
    blocks = _blocks(documents, tokenizer, data.max_length)
    held_out = max(1, round(len(blocks) * EVAL_SHARE))
    if len(blocks) <= held_out:
        raise DataError(
            data.path, found=f"text for {len(blocks)} blocks of {data.max_length} tokens",
            expected="at least two; give more text or a smaller max_length",
        )  # fmt: skip
    parts = _splits((list(blocks[:-held_out]), list(blocks[-held_out:])), data, seed)
    train, evaluation = (Examples(_drawn(*part)) for part in parts)
    return TextTask(
        model=network, train_set=train, eval_set=evaluation, metric="perplexity", num_labels=0, head=head,
        tokenizer=tokenizer, higher_is_better=False,
    )  # fmt: skip


def _image_task(model: ModelConfig, data: DataConfig, seed: int) -> Task:
    parts = _splits(read_images(data.path), data, seed)
    train, evaluation = (_pictures(*part) for part in parts)
    make = _timm_model if model.library == "timm" else _image_model
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


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:300] + " ..."


def _source(model: ModelConfig) -> Path | str:
    """Return the local path, or the hub id."""
    try:
        return resolve(model.path) or model.path
    except DataError:
        raise ModelError(
            f"model.path={model.path!r}: {not_found(model.path)}; give an existing folder or file, or a hub id"
        ) from None


def _model_source(model: ModelConfig) -> tuple[Path | str, PretrainedConfig]:
    source = _source(model)
    if isinstance(source, Path) and not source.is_dir():
        raise ModelError(f"{source} is a file; library=transformers needs the model's folder, or set library=timm")
    try:
        return source, transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
    except LOAD_ERRORS as error:
        where = f"{source} cannot be read" if isinstance(source, Path) else f"{not_found(source)}, and the hub said"
        raise ModelError(f"model.path={model.path!r}: {where}: {_short(error)}") from error


def _is_causal(config: PretrainedConfig) -> bool:
    """Return whether the checkpoint was trained as a causal language model; BERT's decoder class alone is no proof."""
    known = set(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    return any(name in known for name in config.architectures or [])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the report of new weights and the bars away: `_network` checks what is missing itself."""
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


def _network(auto: Any, source: Path | str, model: ModelConfig, **kwargs: Any) -> tuple[Any, tuple[str, ...]]:
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
        raise ModelError(f"{source} cannot be loaded by {auto.__name__}: {_short(error)}") from error
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


def _tokenizer(source: Path | str, network: Any, max_length: int, config: PretrainedConfig) -> PreTrainedTokenizerBase:
    """Return the tokenizer, with a padding token, after checking that it fits the model."""
    try:
        with _quiet():
            tokenizer = transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # the Rust tokenizers raise nothing more specific for a damaged file
        raise ModelError(f"the tokenizer in {source} cannot be loaded: {_short(error)}") from error
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


def _image_model(model: ModelConfig, image_size: int) -> ImageModel:
    """Return a Transformers image model, its head, and the mean and deviation it was trained with."""
    source, config = _model_source(model)
    native = config.to_dict().get("image_size", image_size)
    if native != image_size:
        raise ModelError(f"data.image_size={image_size}, but {source} was made for {native}; set image_size={native}")
    network, head = _network(
        transformers.AutoModelForImageClassification, source, model,
        num_labels=CIFAR_CLASSES, problem_type="single_label_classification",
    )  # fmt: skip
    try:
        values, _ = ImageProcessingMixin.get_image_processor_dict(source)
        return network, head, tuple(values["image_mean"]), tuple(values["image_std"])
    except LOAD_ERRORS as error:
        raise ModelError(f"{source}: no image_mean and image_std in its preprocessor: {_short(error)}") from error


def _timm_model(model: ModelConfig, image_size: int) -> ImageModel:
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
        raise ModelError(f"{source} does not load into timm's {name}: {_short(error)}") from error
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
