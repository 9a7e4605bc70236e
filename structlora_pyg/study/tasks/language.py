"""The next token: of your own text, or of the answers in instructions and conversations."""

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
from structlora_pyg.study.tasks import IGNORED, Batch, Task, evaluation, inputs_of, pad, register, shared_length
from structlora_pyg.study.tasks.data import DataError, Row, resolve, rows_in
from structlora_pyg.study.tasks.loading import ModelError, is_causal, load_network, load_tokenizer, model_source
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
    documents: list[str] = []
    for file in files:
        if not file.name.endswith(TEXT_SUFFIXES):
            raise DataError(file, found="another kind of file", expected=f"names ending in {', '.join(TEXT_SUFFIXES)}")
        documents += [row.text(column if ".jsonl" in file.name else "text") for row in rows_in(file)]
    return documents


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
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
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
    value = row.get(asked)
    if isinstance(value, list):
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
        if len(kept) < len(tokens):
            short = len(tokens) - len(kept)
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
        begin, end = ([] if t is None else [t] for t in (tokenizer.bos_token_id, tokenizer.eos_token_id))
        ids, answers = begin + ids + end, [False] * len(begin) + answers + [True] * len(end)
    ids, answers = ids[:max_length], answers[:max_length]
    if not any(answers[1:]):
        return None
    labels = [token if counts else IGNORED for token, counts in zip(ids, answers, strict=True)]
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}


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
