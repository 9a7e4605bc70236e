"""Which solution fits the goal? PIQA."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from structlora_pyg.study.config import DataConfig, ModelConfig
from structlora_pyg.study.tasks import Batch, ScoringTask, Task, auxiliary, examples_of, pad, register, shared_length
from structlora_pyg.study.tasks.data import Row
from structlora_pyg.study.tasks.loading import is_causal, load_network, load_tokenizer, model_source
from structlora_pyg.study.tasks.splits import drawn, find_split, two_parts


class Question(NamedTuple):
    """A goal, its possible solutions, and the index of the right one."""

    goal: str
    choices: tuple[str, ...]
    label: int


class Choices(NamedTuple):
    """Token lists of every choice, the position of the first token of each solution, and the index of the right one."""

    tokens: list[dict[str, list[int]]]
    borders: list[int]
    label: int


@dataclass(frozen=True, kw_only=True)
class ChoiceTask(ScoringTask):
    """Which solution fits the goal?

    A causal language model scores a choice by the summed log-likelihood of the solution's tokens given the goal; an
    encoder by its multiple-choice head. The loss is the cross-entropy over the scores of the choices.
    """

    causal: bool

    def collate(self, examples: Sequence[Choices]) -> Batch:
        """Return token tensors of shape (B, C, T), ``borders`` (B, C) and ``labels`` (B,)."""
        flat = pad([tokens for e in examples for tokens in e.tokens], self.preprocessor)
        shape = (len(examples), self.num_labels, -1)
        return {
            **{name: tensor.view(shape) for name, tensor in flat.items()},
            "borders": torch.tensor([e.borders for e in examples]),
            "labels": torch.tensor([e.label for e in examples]),
        }

    def scores(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return one score per choice, shape (B, C)."""
        inputs = {name: t for name, t in batch.items() if name not in ("borders", "labels")}
        if not self.causal:
            return model(**inputs).logits
        flat = {name: t.flatten(0, 1) for name, t in inputs.items()}
        logits = model(**flat).logits[:, :-1].float()
        targets = flat["input_ids"][:, 1:]
        log_likelihood = -F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
        positions = torch.arange(1, targets.shape[1] + 1, device=targets.device)
        in_solution = (positions >= batch["borders"].view(-1, 1)) & flat["attention_mask"][:, 1:].bool()
        return (log_likelihood * in_solution).sum(-1).view_as(batch["borders"])

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return cross-entropy over the choices and the auxiliary loss, whose labels are 1 for the right ones."""
        scores = self.scores(model, batch)
        right = F.one_hot(batch["labels"], self.num_labels).flatten()
        return F.cross_entropy(scores.float(), batch["labels"]) + auxiliary(model, right)


def read_questions(path: str, validation_share: float = 0.0) -> list[Sequence[Question]]:
    """Return PIQA's training and evaluation split: ``train.jsonl`` and ``valid.jsonl`` of a folder, or a hub id.

    A `validation_share` > 0 is cut from the training split, and the other is not read.

    Raises:
        DataError: If anything is missing or malformed.
    """

    def question(row: Row) -> Question:
        return Question(row.text("goal"), (row.text("sol1"), row.text("sol2")), row.one_of("label", (0, 1)))

    names = [("train",), ("valid", "validation")]
    return two_parts(lambda k: find_split(path, names, k, (".jsonl",)).examples(question), validation_share, path)


@register("piqa", "which of two solutions reaches the goal? PIQA; accuracy")
def choice_task(model: ModelConfig, data: DataConfig, seed: int) -> Task:
    """Return PIQA, for an encoder or a causal language model."""
    train, held_out = drawn(read_questions(data.path, data.validation_share), data, seed)
    source, config = model_source(model)
    causal = is_causal(config)
    auto = transformers.AutoModelForCausalLM if causal else transformers.AutoModelForMultipleChoice
    network, head = load_network(auto, source, model)
    tokenizer = load_tokenizer(source, network, data.max_length)
    encode = _causal_choices if causal else _encoder_choices
    sets = [encode(part, tokenizer, data.max_length) for part in (train, held_out)]
    return ChoiceTask(
        model=network, train_set=sets[0], eval_set=sets[1], metric="accuracy", num_labels=len(train[0].choices),
        head=head, preprocessor=tokenizer, causal=causal,
    )  # fmt: skip


def _encoder_choices(examples: Sequence[Question], tokenizer: Any, max_length: int) -> list[Choices]:
    pairs = [[e.goal for e in examples for _ in e.choices], [c for e in examples for c in e.choices]]
    tokens = iter(examples_of(tokenizer(*pairs, truncation=True, max_length=max_length)))
    return [Choices([next(tokens) for _ in e.choices], [0] * len(e.choices), e.label) for e in examples]


def _causal_choices(examples: Sequence[Question], tokenizer: Any, max_length: int) -> list[Choices]:
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
        tokens, borders = [], []
        for _ in example.choices:
            ids = next(whole)
            border = shared_length(goal, ids)
            context, solution = begin + ids[:border], ids[border:]
            # The first token has no predecessor to be predicted from, so one token of context has to stay.
            kept = max(1, max_length - len(solution))
            context = begin + context[len(begin) :][-(kept - len(begin)) :] if kept > len(begin) else context[:kept]
            ids = (context + solution)[:max_length]
            tokens.append({"input_ids": ids, "attention_mask": [1] * len(ids)})
            borders.append(len(context))
        result.append(Choices(tokens, borders, example.label))
    return result
