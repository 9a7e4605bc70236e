"""One or two texts into a class or a score: GLUE, BoolQ, and tables of your own; and how published sets are read."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn

from structlora_pyg.study.config import DataConfig, ModelConfig
from structlora_pyg.study.tasks import METRICS, Batch, ScoringTask, Task, examples_of, inputs_of, pad, register
from structlora_pyg.study.tasks.data import DataError, Row, find, resolve
from structlora_pyg.study.tasks.loading import load_network, load_tokenizer, model_source
from structlora_pyg.study.tasks.splits import drawn, find_split, hold_out, own_parts, own_splits, subsample, two_parts

logger = logging.getLogger(__name__)


class Example(NamedTuple):
    """One or two texts and a label, or a text and two that may go on from it."""

    first: str
    second: str | None  # None where there is a single one
    label: int | float  # class index, the score of a regression, or 0 where `second` goes on and 1 where `third` does
    third: str | None = None


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where a published data set has its texts and labels.

    Args:
        summary: What the task asks.
        texts: Columns with the texts.
        label: Column with the label.
        classes: The labels as written in the file, in the order of their indices; None for a score from 0 to 5.
        metrics: Keys of `structlora_pyg.study.tasks.METRICS`, the primary one first.
        header: Column names of files without a header line.
        hub_texts: Columns with the texts on the hub, if they are others; the label is always ``label`` in GLUE.
        hub_label: Column with the label on the hub.
        splits: Possible names of the training and of the evaluation file, and of a second one for evaluation.
        hub_splits: Names of the same parts on the hub.
        suffix: Kind of the files.
        broken_rows: Leave out rows that are wrong, up to one in a thousand, and count them.
    """

    summary: str
    texts: tuple[str, ...] = ("sentence1", "sentence2")
    label: str = "label"
    classes: tuple[str | bool | int, ...] | None = ("0", "1")
    metrics: tuple[str, ...] = ("accuracy",)
    header: tuple[str, ...] | None = None
    hub_texts: tuple[str, ...] | None = None
    hub_label: str = "label"
    splits: tuple[tuple[str, ...], ...] = (("train",), ("dev",))
    hub_splits: tuple[tuple[str, ...], ...] = (("train",), ("validation",))
    suffix: str = ".tsv"
    broken_rows: bool = False

    def example(self, row: Row, hub: bool) -> Example:
        """Return the example of a row."""
        names, label = (self.hub_texts or self.texts, self.hub_label) if hub else (self.texts, self.label)
        first, second, third = (*(row.text(name) for name in names), None, None)[:3]
        value = row.number(label, 0.0, 5.0) if self.classes is None else row.one_of(label, self.classes)
        return Example(str(first), second, value, third)


ENTAILMENT = ("entailment", "not_entailment")
QUESTIONS = ("question1", "question2")
# The primary metric first. LoRA papers give accuracy for QQP, GLUE's own table F1 too.
LAYOUTS = {
    "rte": Layout(summary="does the first sentence entail the second? GLUE RTE; accuracy", classes=ENTAILMENT),
    "mrpc": Layout(
        summary="do two sentences say the same? GLUE MRPC; F1, accuracy", texts=("#1 String", "#2 String"),
        label="Quality", hub_texts=("sentence1", "sentence2"), metrics=("f1", "accuracy"),
    ),
    "cola": Layout(
        summary="is a sentence acceptable English? GLUE CoLA; Matthews correlation", texts=("sentence",),
        header=("source", "label", "mark", "sentence"), metrics=("matthews", "accuracy"),
    ),
    "stsb": Layout(
        summary="how similar are two sentences, from 0 to 5? GLUE STS-B; Pearson, Spearman", label="score",
        classes=None, metrics=("pearson", "spearman"),
    ),
    "wnli": Layout(summary="does the second sentence follow, its pronoun resolved? GLUE WNLI; accuracy"),
    "sst2": Layout(summary="does a film review praise or blame? GLUE SST-2; accuracy", texts=("sentence",)),
    "qnli": Layout(
        summary="does the sentence answer the question? GLUE QNLI; accuracy", texts=("question", "sentence"),
        classes=ENTAILMENT,
    ),
    # Questions with a line break fall apart in the official file; everyone leaves these rows out.
    "qqp": Layout(
        summary="do two questions ask the same? GLUE QQP; accuracy, F1", texts=QUESTIONS, label="is_duplicate",
        metrics=("accuracy", "f1"), broken_rows=True,
    ),
    "mnli": Layout(
        summary="entailment, neutral or contradiction? GLUE MNLI; accuracy on matched and on mismatched genres",
        label="gold_label", classes=("entailment", "neutral", "contradiction"), hub_texts=("premise", "hypothesis"),
        splits=(("train",), ("dev_matched",), ("dev_mismatched",)),
        hub_splits=(("train",), ("validation_matched",), ("validation_mismatched",)),
    ),
    "boolq": Layout(
        summary="yes or no, given a passage? BoolQ; accuracy", texts=("question", "passage"), label="answer",
        hub_label="answer", classes=(False, True), suffix=".jsonl",
    ),
    "piqa": Layout(
        summary="which of two solutions reaches the goal? PIQA; accuracy", texts=("goal", "sol1", "sol2"),
        classes=(0, 1), suffix=".jsonl", splits=(("train",), ("valid", "validation")),
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SentenceTask(ScoringTask):
    """One or two texts into a class or a score. An example is a pair of token lists by name, and the label.

    Args:
        mismatched: A second evaluation set, MNLI's of other genres; reported as ``accuracy_mismatched``.
    """

    mismatched: Sequence[tuple[dict[str, list[int]], int | float]] = ()

    def collate(self, examples: Sequence[tuple[dict[str, list[int]], int | float]]) -> Batch:
        """Return ``input_ids``, ``attention_mask`` and others of shape (B, T), ``labels`` of shape (B,)."""
        tokens, labels = zip(*examples, strict=True)
        kind = torch.float if self.num_labels == 1 else torch.long
        return {**pad(tokens, self.preprocessor), "labels": torch.tensor(labels, dtype=kind)}

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return cross-entropy, or squared error for a regression, and the auxiliary loss."""
        return model(**batch).loss

    def scores(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return logits (B, classes), or scores (B, 1) of a regression."""
        return model(**inputs_of(batch)).logits

    def evaluate(self, model: nn.Module, loader: Iterable[Batch]) -> dict[str, float]:
        """Return ``loss`` and the metrics; those of MNLI are of the matched set."""
        batches = list(loader)
        metrics = super().evaluate(model, batches)
        if self.mismatched:
            size, count = len(batches[0]["labels"]), len(self.mismatched)
            others = (self.collate(self.mismatched[at : at + size]) for at in range(0, count, size))
            metrics["accuracy_mismatched"] = METRICS["accuracy"](*self.predictions(model, others))
        return metrics


def read_examples(task: str, path: str, validation_share: float = 0.0) -> list[Sequence[Example]]:
    """Read the training and the evaluation split of a published task.

    The evaluation split is the official development split, for MNLI the matched one. BoolQ without an official
    ``train.jsonl`` is cut from its development split, two thirds for training; questions about one passage stay on one
    side, and the cut depends on the data alone.

    Args:
        task: A key of `LAYOUTS`, which has the order of the classes.
        path: Folder in the official layout, or hub id.
        validation_share: If > 0, evaluate on this share cut from the training split; the official evaluation split is
            then not even opened.

    Raises:
        DataError: If anything is missing or malformed.
    """
    folder, read = resolve(path), partial(_read, task, path)
    passage: Callable[[Example], Any] | None = (lambda e: e.second) if task == "boolq" else None
    if task == "boolq" and isinstance(folder, Path) and find(folder, "dev.jsonl") and not find(folder, "train.jsonl"):
        dev = read(1)
        parts = hold_out(dev, 1 / 3, path, passage)
        logger.warning(
            "%s has no train.jsonl: the %d questions of dev.jsonl are cut into %d for training and %d for evaluation, "
            "so the scores cannot be compared with those of the official split", path, len(dev), *map(len, parts),
        )  # fmt: skip
        return two_parts(parts.__getitem__, validation_share, path, passage)
    return two_parts(read, validation_share, path, passage)


def _read(task: str, path: str, part: int) -> list[Example]:
    layout, config = LAYOUTS[task], task if str(resolve(path)).rsplit("/", 1)[-1] == "glue" else None
    split = find_split(path, layout.splits, part, (layout.suffix,), layout.hub_splits, config, layout.header)
    return split.examples(partial(layout.example, hub=split.is_hub), layout.broken_rows)


def published_task(model: ModelConfig, data: DataConfig, seed: int) -> Task:
    """Return a task of GLUE, or BoolQ."""
    layout = LAYOUTS[data.task]
    train, held_out = drawn(read_examples(data.task, data.path, data.validation_share), data, seed)
    others = _read(data.task, data.path, 2) if len(layout.splits) > 2 and not data.validation_share else []
    mismatched = [others[i] for i in subsample(len(others), data.eval_limit, seed)]
    count = 1 if layout.classes is None else len(layout.classes)
    return sentence_task(model, data, [train, held_out], count, layout.metrics, mismatched=mismatched)


for _name, _layout in LAYOUTS.items():
    if _name != "piqa":  # see `structlora_pyg.study.tasks.language`
        register(_name, _layout.summary)(published_task)


OWN = ("text", "text_pair", "label")


@register("classification", "which class? your own texts or pairs, with labels; accuracy, macro F1", options=OWN)
def classification_task(model: ModelConfig, data: DataConfig, seed: int) -> Task:
    """Return a classification of your own texts; its classes are those of the training part, in rising order."""
    splits, column = own_splits(data), data.label or "label"
    named = splits[0].classes(column)
    read = [split.examples(lambda row: (row, _label(row, column), _own_example(row, data, 0))) for split in splits]
    classes = named or tuple(sorted({label for _, label, _ in read[0]}, key=_natural))
    if len(classes) < 2:
        raise DataError(splits[0].name, found=f"the class {classes[0]}", expected=f"two or more in {column!r}")
    known = {name: i for i, name in enumerate(classes)}

    def labelled(row: Row, label: str, example: Example) -> Example:
        if label not in known and not named:
            raise row.wrong(found=f"{column} = {label!r}", expected=f"one of the classes {', '.join(classes[:20])}")
        return example._replace(label=known[label] if label in known else row.one_of(column, classes))

    parts = [[labelled(*entry) for entry in part] for part in read]
    parts = own_parts(parts, data, seed)
    return sentence_task(model, data, parts, len(classes), ("accuracy", "f1_macro"), classes)


@register("regression", "which score? your own texts or pairs, with numbers; Pearson, Spearman", options=OWN)
def regression_task(model: ModelConfig, data: DataConfig, seed: int) -> Task:
    """Return a regression on your own texts; scores are taken as they are."""
    column = data.label or "label"
    parts = [s.examples(lambda row: _own_example(row, data, row.number(column))) for s in own_splits(data)]
    return sentence_task(model, data, own_parts(parts, data, seed), 1, ("pearson", "spearman"))


def _own_example(row: Row, data: DataConfig, label: int | float) -> Example:
    return Example(row.text(data.text or "text"), row.text(data.text_pair) if data.text_pair else None, label)


def _label(row: Row, column: str) -> str:
    label = row.get(column)
    if isinstance(label, (str, int)) and str(label).strip():
        return str(label)
    raise row.wrong(found=f"{column} = {label!r}", expected="a text or an integer")


def _natural(text: str) -> tuple[float, str]:
    """Return a key that sorts numbers by value, before other texts."""
    return (int(text), text) if text.isdecimal() else (float("inf"), text)


def sentence_task(
    model: ModelConfig, data: DataConfig, parts: Sequence[Sequence[Example]], labels: int, metrics: Sequence[str],
    classes: tuple[str, ...] = (), mismatched: Sequence[Example] = (),
) -> Task:  # fmt: skip
    """Return the task of some examples, and the model that is to learn it.

    Args:
        model: Which model.
        data: Gives `path` and `max_length`.
        parts: Training and evaluation examples.
        labels: Number of classes; 1 for a regression.
        metrics: Keys of `structlora_pyg.study.tasks.METRICS`, the primary one first.
        classes: Names of the classes; default none.
        mismatched: A second evaluation set.
    """
    if labels == 1 and len(parts[1]) < 2:
        raise DataError(data.path, found="one evaluation example", expected="two or more; correlations need them")
    source, _ = model_source(model)
    kind = "regression" if labels == 1 else "single_label_classification"
    auto = transformers.AutoModelForSequenceClassification
    network, head = load_network(auto, source, model, num_labels=labels, problem_type=kind)
    tokenizer = load_tokenizer(source, network, data.max_length)
    network.config.pad_token_id = tokenizer.pad_token_id
    train, held_out, others = (_encoded(part, tokenizer, data.max_length) for part in (*parts, mismatched))
    return SentenceTask(
        model=network, train_set=train, eval_set=held_out, mismatched=others, metric=metrics[0],
        other_metrics=tuple(metrics[1:]), num_labels=labels, head=head, preprocessor=tokenizer, classes=classes,
    )  # fmt: skip


def _encoded(examples: Sequence[Example], tokenizer: Any, max_length: int) -> list[tuple[dict[str, list[int]], float]]:
    if not examples:
        return []
    pairs = [] if examples[0].second is None else [[e.second or "" for e in examples]]
    tokens = tokenizer([e.first for e in examples], *pairs, truncation=True, max_length=max_length)
    return [(row, e.label) for row, e in zip(examples_of(tokens), examples, strict=True)]
