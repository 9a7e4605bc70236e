"""One or two sentences into a class or a score: GLUE and BoolQ."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from structlora_pyg.study.config import DataConfig, ModelConfig
from structlora_pyg.study.loading import check_vocabulary, load_network, load_tokenizer, model_source
from structlora_pyg.study.metrics import class_metrics, class_score, correlations, joined
from structlora_pyg.study.tasks.base import Batch, Examples, Task, drawn, evaluation, inputs_of, pad, rows_of
from structlora_pyg.study.tasks.data import GLUE, TextExample, read_examples, read_mismatched
from structlora_pyg.study.tasks.rows import DataError
from structlora_pyg.study.tasks.subsets import subsample

# The primary metric first. LoRA papers give accuracy for QQP, GLUE's own table F1 too.
METRICS = {
    "mrpc": ("f1", "accuracy"), "qqp": ("accuracy", "f1"), "cola": ("matthews", "accuracy"),
    "stsb": ("pearson", "spearman"),
}  # fmt: skip


class Sentence(NamedTuple):
    """Token lists by name (``input_ids``, ...) and the label of one example."""

    tokens: dict[str, list[int]]
    label: int | float


@dataclass(frozen=True, kw_only=True)
class SentenceTask(Task):
    """One or two sentences into a class or a score.

    Args:
        tokenizer: The tokenizer.
        scores: Metrics besides accuracy: ``f1``, ``matthews``.
        mismatched: A second evaluation set, MNLI's of other genres; reported as ``accuracy_mismatched``.
    """

    tokenizer: PreTrainedTokenizerBase
    scores: tuple[str, ...] = ()
    mismatched: Examples[Sentence] | None = None

    def collate(self, examples: Sequence[Sentence]) -> Batch:
        """Return ``input_ids``, ``attention_mask`` and others of shape (B, T), ``labels`` of shape (B,)."""
        labels = torch.tensor([e.label for e in examples], dtype=torch.float if self.num_labels == 1 else torch.long)
        return {**pad([e.tokens for e in examples], self.tokenizer), "labels": labels}

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return cross-entropy, or squared error for a regression, and the auxiliary loss."""
        return model(**batch).loss

    def evaluate(self, model: nn.Module, loader: Iterable[Batch]) -> dict[str, float]:
        """Return ``loss`` and accuracy, F1, Matthews or correlations, by task; MNLI's are those of the matched set."""
        pairs = self._predictions(model, loader)
        logits, labels = joined(pairs)
        if self.num_labels == 1:
            scores = logits.squeeze(-1)
            return {"loss": F.mse_loss(scores, labels).item(), **correlations(scores, labels)}
        metrics = class_metrics(logits, labels)
        metrics |= {name: class_score(name, logits.argmax(-1), labels) for name in self.scores}
        if self.mismatched is not None:
            batches = self._batches(self.mismatched, size=len(pairs[0][1]))
            metrics["accuracy_mismatched"] = class_metrics(*joined(self._predictions(model, batches)))["accuracy"]
        return metrics

    def save_extras(self, folder: Path) -> None:
        """Write the tokenizer."""
        self.tokenizer.save_pretrained(folder)

    def _predictions(self, model: nn.Module, batches: Iterable[Batch]) -> list[tuple[Tensor, Tensor]]:
        with evaluation(model) as device:
            return [(model(**inputs_of(b, device)).logits.float().cpu(), b["labels"]) for b in batches]

    def _batches(self, examples: Examples[Sentence], size: int) -> Iterator[Batch]:
        for at in range(0, len(examples), size):
            yield self.collate([examples[i] for i in range(at, min(at + size, len(examples)))])


def sentence_task(model: ModelConfig, data: DataConfig, seed: int) -> Task:
    """Return a GLUE task or BoolQ; see `structlora_pyg.study.tasks.registry.load_task`."""
    train, held_out = drawn(read_examples(data.task, data.path, data.validation_share), data, seed)
    mismatched: list[TextExample] = []
    if data.task == "mnli" and not data.validation_share:
        mismatched = read_mismatched(data.path)
        limit = None if data.eval_limit is None else min(data.eval_limit, len(mismatched))
        mismatched = [mismatched[i] for i in subsample(len(mismatched), limit, seed)]
    classes = GLUE[data.task].classes if data.task in GLUE else ("no", "yes")
    if classes is None and len(held_out) < 2:
        raise DataError(data.path, found="one evaluation example", expected="two or more; correlations need them")
    source, config = model_source(model)
    network, head = load_network(
        transformers.AutoModelForSequenceClassification, source, model,
        num_labels=1 if classes is None else len(classes),
        problem_type="regression" if classes is None else "single_label_classification",
    )  # fmt: skip
    tokenizer = load_tokenizer(source, network, data.max_length, config)
    check_vocabulary(tokenizer, [e.first for e in train], source)
    network.config.pad_token_id = tokenizer.pad_token_id
    metrics = METRICS.get(data.task, ("accuracy",))
    return SentenceTask(
        model=network,
        train_set=_sentences(train, tokenizer, data.max_length),
        eval_set=_sentences(held_out, tokenizer, data.max_length),
        metric=metrics[0],
        num_labels=network.config.num_labels,
        head=head,
        tokenizer=tokenizer,
        scores=tuple(name for name in metrics if name in ("f1", "matthews")),
        mismatched=_sentences(mismatched, tokenizer, data.max_length) if mismatched else None,
    )


def _sentences(examples: Sequence[TextExample], tokenizer: Any, max_length: int) -> Examples[Sentence]:
    texts = [[e.first for e in examples]]
    if examples[0].second is not None:
        texts.append([e.second or "" for e in examples])
    tokens = tokenizer(*texts, truncation=True, max_length=max_length)
    return Examples([Sentence(row, e.label) for row, e in zip(rows_of(tokens), examples, strict=True)])
