"""Texts by their likelihood: your own, answers in instructions and conversations, and which of two solutions fits."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import transformers
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.nn import functional as F

from structlora_pyg.study.config import DataConfig, ModelConfig
from structlora_pyg.study.tasks import (
    IGNORED,
    Batch,
    ScoringTask,
    Task,
    evaluation,
    examples_of,
    inputs_of,
    pad,
    register,
    shared_length,
)
from structlora_pyg.study.tasks.data import DataError, Row, resolve, rows_in
from structlora_pyg.study.tasks.loading import ModelError, is_causal, load_network, load_tokenizer, model_source
from structlora_pyg.study.tasks.sentences import LAYOUTS, Example, read_examples
from structlora_pyg.study.tasks.splits import EVALUATION_SHARE, drawn, find_split, own_parts, own_splits

logger = logging.getLogger(__name__)

TEXT_SUFFIXES = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz")
# For models without a chat template, the prompt that Alpaca was trained with (Taori et al., 2023).
ALPACA = (
    "Below is an instruction that describes a task{paired}. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}{input}\n\n### Response:\n"
)
Tokens = dict[str, list[int]]  # input_ids, attention_mask and labels of one example


@dataclass(frozen=True, kw_only=True)
class LanguageTask(Task):
    """The next token, wherever a label is not -100."""

    metric: str = "perplexity"
    num_labels: int = 0
    higher_is_better: bool = False

    def collate(self, examples: Sequence[Tokens]) -> Batch:
        """Return ``input_ids``, ``attention_mask`` and ``labels`` of shape (B, T)."""
        return pad(examples, self.preprocessor)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean negative log-likelihood of a token and the auxiliary loss."""
        return model(**batch).loss

    def evaluate(self, model: nn.Module, loader: Iterable[Batch]) -> dict[str, float]:
        """Return ``loss``, per token, and its exponential, the ``perplexity``."""
        total, count = 0.0, 0
        with evaluation(model) as device:
            for batch in loader:
                here = send_to_device(batch, device)
                logits, labels = model(**inputs_of(here)).logits[:, :-1].float(), here["labels"][:, 1:]
                loss = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="sum")
                total, count = total + loss.item(), count + int((labels != IGNORED).sum())
        mean = total / count
        perplexity = torch.tensor(mean, dtype=torch.double).exp().item()
        if not math.isfinite(perplexity):
            raise FloatingPointError(f"the evaluation loss is {mean}")
        return {"loss": mean, "perplexity": perplexity}


def read_text(path: str, column: str = "text") -> list[str]:
    """Read plain text.

    Args:
        path: A ``.txt`` file (one document), a ``.jsonl`` file with one document in each line, either of them gzipped,
            a folder of such files (read in the order of their names, other files refused), or a hub id.
        column: Key or column of the text.

    Raises:
        DataError: If anything is missing, malformed or empty.
    """
    source = resolve(path)
    if isinstance(source, str):
        return find_split(path, [("train",)]).examples(lambda row: row.text(column))
    files = sorted(f for f in source.iterdir() if not f.name.startswith(".")) if source.is_dir() else [source]
    if not files:
        raise DataError(source, found="an empty folder", expected=f"files ending in {', '.join(TEXT_SUFFIXES)}")
    if other := next((file for file in files if not file.name.endswith(TEXT_SUFFIXES)), None):
        raise DataError(other, found="another kind of file", expected=f"names ending in {', '.join(TEXT_SUFFIXES)}")
    return [row.text(column if ".jsonl" in file.name else "text") for file in files for row in rows_in(file)]


@register("text", "the next token of your own text; perplexity, lower is better", options=("text",))
def text_task(model: ModelConfig, data: DataConfig, seed: int) -> Task:
    """Return next-token prediction on a text cut into blocks of `max_length` tokens; its last tenth is held out."""
    documents = read_text(data.path, data.text or "text")
    network, tokenizer = _causal_model(model, data)
    blocks = _blocks(documents, tokenizer, data.max_length)
    held_out = max(1, round(len(blocks) * EVALUATION_SHARE))
    if len(blocks) <= held_out:
        found = f"text for {len(blocks)} blocks of {data.max_length} tokens"
        raise DataError(data.path, found=found, expected="at least two; give more text or a smaller max_length")
    splits = (blocks[:-held_out], blocks[-held_out:])
    if data.validation_share:  # at the end of the training part: neighbouring blocks continue each other
        cut = max(1, round(len(splits[0]) * data.validation_share))
        if cut >= len(splits[0]):
            expected = f"enough to hold out {data.validation_share:g} of them (data.validation_share)"
            raise DataError(data.path, found=f"{len(splits[0])} blocks to train on", expected=expected)
        splits = (splits[0][:-cut], splits[0][-cut:])
    train, evaluated = drawn(splits, data, seed)
    return LanguageTask(model=network, train_set=train, eval_set=evaluated, preprocessor=tokenizer)


def _blocks(documents: Sequence[str], tokenizer: Any, length: int) -> list[Tokens]:
    """Return the text in blocks of `length` tokens, an end token after each document; a rest is dropped."""
    begin, end = _ends(tokenizer)
    lists = tokenizer(list(documents), add_special_tokens=False, verbose=False)["input_ids"]
    ids = [token for document in lists for token in (*begin, *document, *end)]
    cut = [ids[at : at + length] for at in range(0, len(ids) // length * length, length)]
    return [{"input_ids": block, "attention_mask": [1] * length, "labels": block} for block in cut]


class Conversation(NamedTuple):
    """What is said, and how it is written for a model without a chat template."""

    messages: list[dict[str, str]]  # turns with role and content, the last one of the assistant
    plain: str | None  # text before the last turn, for models without a chat template; None if there is no such form
    row: Row  # where it comes from


def conversation(row: Row, data: DataConfig) -> Conversation:
    """Return the conversation in a row: ``messages``, prompt and completion, or Alpaca's columns.

    Raises:
        DataError: If the row has none of them, or something in them is no text.
    """
    fields = row.fields or {}
    known = (name for name in ("messages", "conversations", "prompt", "instruction") if name in fields)
    asked = data.text or next(known, "messages")
    if isinstance(value := row.get(asked), list):
        answer = row.get(data.label) if data.label else fields.get("completion", [])
        turns = [*value, *(answer if isinstance(answer, list) else [{"role": "assistant", "content": answer}])]
        return Conversation(_turns(row, asked, turns), None, row)
    prompt, extra = row.text(asked), fields.get("input") if asked == "instruction" else None
    answer = row.text(data.label or ("output" if asked == "instruction" else "completion"))
    if asked == "instruction":
        paired = ", paired with an input that provides further context" if extra else ""
        plain = ALPACA.format(paired=paired, instruction=prompt, input=f"\n\n### Input:\n{extra}" if extra else "")
    else:
        plain = prompt if prompt[-1].isspace() else f"{prompt} "
    question = {"role": "user", "content": f"{prompt}\n\n{extra}" if extra else prompt}
    return Conversation([question, {"role": "assistant", "content": answer}], plain, row)


SHARE_GPT = {"human": "user", "gpt": "assistant", "system": "system"}


def _turns(row: Row, column: str, turns: Sequence[Any]) -> list[dict[str, str]]:
    """Return turns as ``role`` and ``content``, also from ShareGPT's ``from`` and ``value``."""
    found = []
    for turn in turns:
        fields = turn if isinstance(turn, Mapping) else {}
        role = fields.get("role") or SHARE_GPT.get(str(fields.get("from")))
        content = fields.get("content", fields.get("value"))
        if not isinstance(role, str) or not isinstance(content, str) or not content.strip():
            raise row.wrong(found=f"{column} with {turn!r}", expected="turns with a role and a content that is a text")
        found.append({"role": role, "content": content})
    if len(found) < 2 or found[-1]["role"] != "assistant":
        raise row.wrong(found=f"{column} of {len(found)} turns", expected="two or more, the last of the assistant")
    return found


@register(
    "sft", "the answers in your own instructions or conversations; perplexity of an answer, lower is better",
    options=("text", "label"),
)  # fmt: skip
def sft_task(model: ModelConfig, data: DataConfig, seed: int) -> Task:
    """Return supervised fine-tuning: the loss is on the answers of the assistant alone."""
    parts = [split.examples(lambda row: conversation(row, data)) for split in own_splits(data)]
    chosen = own_parts(parts, data, seed)
    network, tokenizer = _causal_model(model, data)
    sets = []
    for part in chosen:
        tokens = [answer_tokens(c, tokenizer, data.max_length) for c in part]
        kept = [row for row in tokens if row is not None]
        if not kept:
            found = f"{len(tokens)} examples without room for an answer in {data.max_length} tokens"
            raise DataError(part[0].row.file, found=found, expected="a larger data.max_length, or shorter prompts")
        if short := len(tokens) - len(kept):
            logger.warning("%s: left out %d examples, whose prompts fill data.max_length", part[0].row.file, short)
        sets.append(kept)
    return LanguageTask(model=network, train_set=sets[0], eval_set=sets[1], preprocessor=tokenizer)


def answer_tokens(example: Conversation, tokenizer: Any, max_length: int) -> Tokens | None:
    """Return the tokens of a conversation, with labels where the assistant answers; None if none is left.

    With a chat template, every answer counts that the template writes in the whole conversation as it writes it last;
    some drop the reasoning in earlier ones. A token that spans the border belongs to the answer. What is longer than
    `max_length` loses its end.

    Raises:
        ModelError: If the tokenizer has no chat template, and the conversation no plain form.
    """
    turns, answer = example.messages, example.messages[-1]["content"]
    if tokenizer.chat_template is None:
        if example.plain is None:
            raise ModelError(
                f"{tokenizer.name_or_path}: the tokenizer has no chat template, which conversations need; choose an "
                "instruction-tuned model, or give a prompt and a completion instead"
            )
        text, spans = example.plain + answer, [(len(example.plain), len(example.plain + answer))]
    else:
        text, spans = tokenizer.apply_chat_template(turns, tokenize=False), []
        for i in (i for i, turn in enumerate(turns) if turn["role"] == "assistant"):
            whole = tokenizer.apply_chat_template(turns[: i + 1], tokenize=False)
            if text.startswith(whole):
                before = tokenizer.apply_chat_template(turns[:i], tokenize=False, add_generation_prompt=True)
                spans.append((shared_length(before, whole), len(whole)))
    tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, offsets = list(tokens["input_ids"]), tokens["offset_mapping"]
    answers = [any(start < right and left < end for left, right in spans) for start, end in offsets]
    if tokenizer.chat_template is None:  # a template writes all special tokens itself
        begin, end = _ends(tokenizer)
        ids, answers = begin + ids + end, [False] * len(begin) + answers + [True] * len(end)
    ids, answers = ids[:max_length], answers[:max_length]
    if not any(answers[1:]):
        return None
    labels = [token if counts else IGNORED for token, counts in zip(ids, answers, strict=True)]
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}


def _ends(tokenizer: Any) -> list[list[int]]:
    """Return the tokens that begin and end a text, one each or none."""
    return [[] if token is None else [token] for token in (tokenizer.bos_token_id, tokenizer.eos_token_id)]


def _causal_model(model: ModelConfig, data: DataConfig) -> tuple[Any, Any]:
    """Return network and tokenizer of a causal language model."""
    source, config = model_source(model)
    if not is_causal(config):
        raise ModelError(
            f"{source}: {config.model_type} with architectures {config.architectures} is not a causal language model; "
            f"task={data.task} needs one, for instance a Llama"
        )
    network, _ = load_network(transformers.AutoModelForCausalLM, source, model)
    return network, load_tokenizer(source, network, data.max_length)


class Choices(NamedTuple):
    """Token lists of every choice, the position of the first token of each solution, and the index of the right one."""

    tokens: list[Tokens]
    borders: list[int]
    label: int


@dataclass(frozen=True, kw_only=True)
class ChoiceTask(ScoringTask):
    """Which solution fits the goal?

    A causal language model scores a choice by the summed log-likelihood of the solution's tokens given the goal; an
    encoder by its multiple-choice head. The loss is the cross-entropy over the scores of the choices.
    """

    metric: str = "accuracy"
    num_labels: int = 2
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
        inputs = {name: t for name, t in inputs_of(batch).items() if name != "borders"}
        if not self.causal:
            return model(**inputs).logits
        flat = {name: t.flatten(0, 1) for name, t in inputs.items()}
        logits = model(**flat).logits[:, :-1].float()
        targets = flat["input_ids"][:, 1:]
        log_likelihood = -F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
        positions = torch.arange(1, targets.shape[1] + 1, device=targets.device)
        in_solution = (positions >= batch["borders"].view(-1, 1)) & flat["attention_mask"][:, 1:].bool()
        return (log_likelihood * in_solution).sum(-1).view_as(batch["borders"])

    def auxiliary_labels(self, labels: Tensor) -> Tensor:
        """Return 1 for the right choices and 0 for the others."""
        return F.one_hot(labels, self.num_labels).flatten()


@register("piqa", LAYOUTS["piqa"].summary)
def choice_task(model: ModelConfig, data: DataConfig, seed: int) -> Task:
    """Return PIQA, for an encoder or a causal language model."""
    parts = drawn(read_examples("piqa", data.path, data.validation_share), data, seed)
    source, config = model_source(model)
    causal = is_causal(config)
    auto = transformers.AutoModelForCausalLM if causal else transformers.AutoModelForMultipleChoice
    network, head = load_network(auto, source, model)
    tokenizer = load_tokenizer(source, network, data.max_length)
    encode = _causal_choices if causal else _encoder_choices
    train, held_out = (encode(part, tokenizer, data.max_length) for part in parts)
    return ChoiceTask(
        model=network, train_set=train, eval_set=held_out, head=head, preprocessor=tokenizer, causal=causal
    )


def _encoder_choices(examples: Sequence[Example], tokenizer: Any, max_length: int) -> list[Choices]:
    pairs = [[e.first for e in examples for _ in range(2)], [c for e in examples for c in (e.second, e.third)]]
    tokens = examples_of(tokenizer(*pairs, truncation=True, max_length=max_length))
    return [Choices(tokens[2 * i : 2 * i + 2], [0, 0], int(e.label)) for i, e in enumerate(examples)]


def _causal_choices(examples: Sequence[Example], tokenizer: Any, max_length: int) -> list[Choices]:
    """Return goal and solution as one text each.

    The solution starts at the first token in which the text differs from the goal alone, so that a token that spans the
    border belongs to it. What is too long loses the start of the goal first, then the end of the solution.
    """
    begin, _ = _ends(tokenizer)
    goals = tokenizer([e.first for e in examples], add_special_tokens=False)["input_ids"]
    texts = [f"{e.first} {solution}" for e in examples for solution in (e.second, e.third)]
    whole = iter(tokenizer(texts, add_special_tokens=False)["input_ids"])
    result = []
    for example, goal in zip(examples, goals, strict=True):
        tokens, borders = [], []
        for ids in (next(whole), next(whole)):
            border = shared_length(goal, ids)
            context, solution = begin + ids[:border], ids[border:]
            # The first token has no predecessor to be predicted from, so one token of context has to stay.
            kept = max(1, max_length - len(solution))
            context = begin + context[len(begin) :][-(kept - len(begin)) :] if kept > len(begin) else context[:kept]
            ids = (context + solution)[:max_length]
            tokens.append({"input_ids": ids, "attention_mask": [1] * len(ids)})
            borders.append(len(context))
        result.append(Choices(tokens, borders, int(example.label)))
    return result
