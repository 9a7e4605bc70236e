"""Which solution fits the goal? PIQA."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase
from transformers.models.auto import modeling_auto

from structlora_pyg.study.config import DataConfig, ModelConfig
from structlora_pyg.study.loading import (
    ModelError,
    check_vocabulary,
    is_causal,
    load_network,
    load_tokenizer,
    model_source,
)
from structlora_pyg.study.metrics import class_metrics, joined
from structlora_pyg.study.tasks.base import (
    Batch,
    Examples,
    Task,
    auxiliary,
    drawn,
    evaluation,
    moved,
    pad,
    rows_of,
    shared_length,
)
from structlora_pyg.study.tasks.data import ChoiceExample, read_examples


class Choices(NamedTuple):
    """Token lists of every choice, the position where its solution starts, and the index of the right one."""

    tokens: list[dict[str, list[int]]]
    starts: list[int]
    label: int


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
        flat = pad([tokens for e in examples for tokens in e.tokens], self.tokenizer)
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
        return F.cross_entropy(scores.float(), batch["labels"]) + auxiliary(model, right)

    def evaluate(self, model: nn.Module, loader: Iterable[Batch]) -> dict[str, float]:
        """Return ``loss`` and ``accuracy``."""
        with evaluation(model) as device:
            pairs = [(self.scores(model, moved(b, device)).float().cpu(), b["labels"]) for b in loader]
        return class_metrics(*joined(pairs))

    def save_extras(self, folder: Path) -> None:
        """Write the tokenizer."""
        self.tokenizer.save_pretrained(folder)


def choice_task(model: ModelConfig, data: DataConfig, seed: int) -> Task:
    """Return PIQA; see `structlora_pyg.study.tasks.registry.load_task`."""
    train, held_out = drawn(read_examples(data.task, data.path, data.validation_share), data, seed)
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
    check_vocabulary(tokenizer, [e.goal for e in train], source)
    encode = _causal_choices if causal else _encoder_choices
    return ChoiceTask(
        model=network,
        train_set=Examples(encode(train, tokenizer, data.max_length)),
        eval_set=Examples(encode(held_out, tokenizer, data.max_length)),
        metric="accuracy",
        num_labels=len(train[0].choices),
        head=head,
        tokenizer=tokenizer,
        causal=causal,
    )


def _encoder_choices(examples: Sequence[ChoiceExample], tokenizer: Any, max_length: int) -> list[Choices]:
    goals = [e.goal for e in examples for _ in e.choices]
    solutions = [c for e in examples for c in e.choices]
    rows = iter(rows_of(tokenizer(goals, solutions, truncation=True, max_length=max_length)))
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
            border = shared_length(goal, ids)
            context, solution = begin + ids[:border], ids[border:]
            # The first token has no predecessor to be predicted from, so one token of context has to stay.
            kept = max(1, max_length - len(solution))
            context = begin + context[len(begin) :][-(kept - len(begin)) :] if kept > len(begin) else context[:kept]
            ids = (context + solution)[:max_length]
            tokens.append({"input_ids": ids, "attention_mask": [1] * len(ids)})
            starts.append(len(context))
        result.append(Choices(tokens, starts, example.label))
    return result
