"""The next token of your own text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from structlora_pyg.study.config import DataConfig, ModelConfig
from structlora_pyg.study.loading import (
    ModelError,
    check_vocabulary,
    is_causal,
    load_network,
    load_tokenizer,
    model_source,
)
from structlora_pyg.study.tasks.base import Batch, Examples, Task, drawn, evaluation, inputs_of
from structlora_pyg.study.tasks.data import read_text
from structlora_pyg.study.tasks.rows import DataError

EVAL_SHARE = 0.1  # part of the blocks of a text that is held out


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
        with evaluation(model) as device:
            for batch in loader:
                ids = batch["input_ids"].to(device)
                logits = model(**inputs_of(batch, device)).logits[:, :-1].float()
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


def text_task(model: ModelConfig, data: DataConfig, seed: int) -> Task:
    """Return next-token prediction; see `structlora_pyg.study.tasks.registry.load_task`."""
    documents = read_text(data.path)
    source, config = model_source(model)
    if not is_causal(config):
        raise ModelError(
            f"{source}: {config.model_type} with architectures {config.architectures} is not a causal language model; "
            "task=text needs one, for instance a Llama"
        )
    network, head = load_network(transformers.AutoModelForCausalLM, source, model)
    tokenizer = load_tokenizer(source, network, data.max_length, config)
    check_vocabulary(tokenizer, documents, source)
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
    train, last = (Examples(part) for part in drawn(splits, data, seed))
    return TextTask(
        model=network, train_set=train, eval_set=last, metric="perplexity", num_labels=0, head=head,
        tokenizer=tokenizer, higher_is_better=False,
    )  # fmt: skip


def _blocks(documents: Sequence[str], tokenizer: Any, length: int) -> Tensor:
    """Return the text as token ids of shape (blocks, length), an end token after each document; a rest is dropped."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    rows = tokenizer(list(documents), add_special_tokens=False, verbose=False)["input_ids"]
    ids = torch.tensor([token for row in rows for token in (*begin, *row, *end)])
    return ids[: len(ids) // length * length].view(-1, length)
