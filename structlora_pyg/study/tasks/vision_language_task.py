"""Words about pictures: captions and answers, written by a LLaVA-like model."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from accelerate.utils import extract_model_from_parallel
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from structlora_pyg.study.config import DataConfig, ModelConfig
from structlora_pyg.study.loading import ModelError, check_vocabulary, load_network, load_processor, model_source
from structlora_pyg.study.tasks.base import Batch, Examples, Task, drawn, evaluation, pad, shared_length
from structlora_pyg.study.tasks.caption_data import Captioned, read_captions
from structlora_pyg.study.tasks.cider import check_cider, cider
from structlora_pyg.study.tasks.pictures import Pictures
from structlora_pyg.study.tasks.question_data import Question, read_questions
from structlora_pyg.study.tasks.rows import DataError
from structlora_pyg.study.tasks.vqa_accuracy import vqa_accuracy

CAPTION_PROMPT = "Provide a one-sentence caption for the provided image."
QUESTION_PROMPT = "{question}\nAnswer the question using a single word or phrase."
PLAIN_FORMAT = "USER: {image}\n{prompt} ASSISTANT:"  # of LLaVA-1.5, for processors without a chat template
CAPTION_TOKENS, ANSWER_TOKENS = 64, 16  # most that evaluation writes
IGNORED = -100  # a label that is no part of the loss


class Shown(NamedTuple):
    """A picture with a prompt, and what is to be written.

    Attributes:
        number: Place of the example in its set.
        picture: Name of the picture.
        prompt: The whole text before the answer, with the mark where the picture goes.
        target: What training teaches to write.
        references: What people wrote.
    """

    number: int
    picture: str
    prompt: str
    target: str
    references: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class VisionLanguageTask(Task):
    """A picture and a prompt into words. Pictures are opened when their batch is made.

    The loss is the mean negative log-likelihood of the tokens of the targets and the end tokens after them, as LLaVA is
    trained; the mean is over the tokens of a forward, so with gradient accumulation long targets count a little less
    than in one large batch. Evaluation writes greedily.

    Args:
        processor: Makes tokens of text, and pixel values of pictures.
        pictures: Where the pictures are.
        max_length: Tokens of picture, prompt and target together; a longer target loses its end.
        most: Most tokens that evaluation writes.
    """

    processor: Any
    pictures: Pictures
    max_length: int
    most: int

    @abstractmethod
    def score(self, texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
        """Return the primary metric of written texts."""

    def collate(self, examples: Sequence[Shown]) -> Batch:
        """Return a batch.

        ``input_ids``, ``attention_mask`` and ``labels`` have shape (B, T), the labels -100 but in the target;
        ``pixel_values`` (B, 3, height, width); ``number`` (B,).

        Raises:
            DataError: If a picture is damaged; it names the file.
        """
        tokenizer = self.processor.tokenizer
        prompts = [e.prompt for e in examples]
        inputs = _inputs(self.processor, prompts, [self.pictures.open(e.picture) for e in examples])
        begun = _tokens(tokenizer, prompts)
        whole = _tokens(tokenizer, [joint(e.prompt, e.target) for e in examples])
        rows, labels = [], []
        for i, with_picture in enumerate(inputs["input_ids"]):
            border = shared_length(begun[i], whole[i])
            # The picture's tokens are in the prompt, before the border.
            context = list(with_picture)[: len(with_picture) - (len(begun[i]) - border)]
            target = [*whole[i][border:], tokenizer.eos_token_id][: self.max_length - len(context)]
            rows.append({"input_ids": context + target, "attention_mask": [1] * (len(context) + len(target))})
            labels.append([IGNORED] * len(context) + target)
        batch = pad(rows, tokenizer)
        length = batch["input_ids"].shape[1]
        return {
            **batch,
            "labels": torch.tensor([row + [IGNORED] * (length - len(row)) for row in labels]),
            "pixel_values": torch.stack([torch.as_tensor(x) for x in inputs["pixel_values"]]),
            "number": torch.tensor([e.number for e in examples]),
        }

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean negative log-likelihood of a target token and the auxiliary loss."""
        return model(**self._inputs(batch), labels=batch["labels"]).loss

    def evaluate(self, model: nn.Module, loader: Iterable[Batch]) -> dict[str, float]:
        """Return ``loss``, per token of the first reference, and the metric of what the model writes."""
        total, count = 0.0, 0
        texts: list[str] = []
        references: list[tuple[str, ...]] = []
        with evaluation(model) as device:
            for batch in loader:
                moved = {name: tensor.to(device) for name, tensor in batch.items()}
                logits = model(**self._inputs(moved)).logits[:, :-1]
                wanted = moved["labels"][:, 1:]
                chosen = wanted != IGNORED
                total += F.cross_entropy(logits[chosen].float(), wanted[chosen], reduction="sum").item()
                count += int(chosen.sum())
                texts += self.write(model, moved)
                references += [self.eval_set[i].references for i in batch["number"].tolist()]
        if not math.isfinite(total):
            raise FloatingPointError(f"the evaluation loss is {total / count}")
        return {"loss": total / count, self.metric: self.score(texts, references)}

    def write(self, model: nn.Module, batch: Batch) -> list[str]:
        """Return what the model writes greedily after the prompts of a batch on its device, without its targets."""
        tokenizer = self.processor.tokenizer
        starts = (batch["labels"] != IGNORED).long().argmax(1).tolist()
        length, fill = max(starts), tokenizer.pad_token_id
        ids = torch.full((len(starts), length), fill, device=batch["input_ids"].device)
        mask = torch.zeros_like(ids)
        for i, start in enumerate(starts):  # at the right, so that all go on at the same place
            ids[i, length - start :], mask[i, length - start :] = batch["input_ids"][i, :start], 1
        inner = extract_model_from_parallel(model)
        if isinstance(inner, (PreTrainedModel, PeftModel)):
            generate: Any = inner.generate
            written = generate(
                input_ids=ids, attention_mask=mask, pixel_values=self._cast(batch["pixel_values"]), do_sample=False,
                num_beams=1, max_new_tokens=self.most, use_cache=True, eos_token_id=tokenizer.eos_token_id,
                pad_token_id=fill,
            )  # fmt: skip
        else:
            written = self._append(model, ids, mask, batch["pixel_values"])
        return [text.strip() for text in tokenizer.batch_decode(written[:, length:], skip_special_tokens=True)]

    def save_extras(self, folder: Path) -> None:
        """Write the processor, with its tokenizer."""
        self.processor.save_pretrained(folder)

    def _append(self, model: nn.Module, ids: Tensor, mask: Tensor, pixel_values: Tensor) -> Tensor:
        """Write greedily with nothing but forward passes, for predictors such as an ensemble, which has no generate."""
        end, fill = self.processor.tokenizer.eos_token_id, self.processor.tokenizer.pad_token_id
        done = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        for _ in range(self.most):
            inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": self._cast(pixel_values)}
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            following = model(**inputs, position_ids=positions).logits[:, -1].argmax(-1).masked_fill(done, fill)
            ids, mask = torch.cat([ids, following[:, None]], 1), torch.cat([mask, (~done).long()[:, None]], 1)
            done = done | (following == end)
            if done.all():
                break
        return ids

    def _inputs(self, batch: Batch) -> Batch:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
        return {**inputs, "pixel_values": self._cast(inputs["pixel_values"])}

    def _cast(self, pixel_values: Tensor) -> Tensor:
        # Quantised weights are integers.
        return pixel_values.to(next(p.dtype for p in self.model.parameters() if p.is_floating_point()))


@dataclass(frozen=True, kw_only=True)
class CaptionTask(VisionLanguageTask):
    """A caption of a picture; the metric is CIDEr, times 100."""

    def score(self, texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
        """Return CIDEr times 100; see `structlora_pyg.study.tasks.cider.cider`."""
        return cider(texts, references)


@dataclass(frozen=True, kw_only=True)
class QuestionTask(VisionLanguageTask):
    """An answer to a question about a picture; the metric is VQA accuracy."""

    def score(self, texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
        """Return the mean VQA accuracy, in [0, 1]; see `structlora_pyg.study.tasks.vqa_accuracy.vqa_accuracy`."""
        return sum(map(vqa_accuracy, texts, references)) / len(texts)


def joint(prompt: str, target: str) -> str:
    """Return prompt and target as one text, a space between them unless the prompt ends with one."""
    return prompt + ("" if prompt[-1:].isspace() else " ") + target


def caption_task(model: ModelConfig, data: DataConfig, seed: int) -> Task:
    """Return captions, one training example a caption; see `structlora_pyg.study.tasks.registry.load_task`."""
    check_cider()
    pictures, *splits = read_captions(data.path, data.validation_share)
    singles = [Captioned(item.picture, (caption,)) for item in splits[0] for caption in item.captions]
    train, held_out = drawn([singles, splits[1]], data, seed)
    if len(held_out) < 2:
        raise DataError(data.path, found="one evaluation picture", expected="two or more; CIDEr compares pictures")
    prompt = CAPTION_PROMPT if data.prompt is None else data.prompt
    sets = [[(item.picture, prompt, item.captions[0], item.captions) for item in part] for part in (train, held_out)]
    return _task(CaptionTask, model, data, pictures, sets, metric="cider", most=CAPTION_TOKENS)


def question_task(model: ModelConfig, data: DataConfig, seed: int) -> Task:
    """Return questions about pictures; see `structlora_pyg.study.tasks.registry.load_task`."""
    pictures, *splits = read_questions(data.path, data.validation_share)
    prompt = QUESTION_PROMPT if data.prompt is None else data.prompt

    def shown(item: Question) -> tuple[str, str, str, tuple[str, ...]]:
        return item.picture, prompt.replace("{question}", item.question), item.answer, item.answers

    sets = [[shown(item) for item in part] for part in drawn(splits, data, seed)]
    return _task(QuestionTask, model, data, pictures, sets, metric="vqa_accuracy", most=ANSWER_TOKENS)


def _task(
    kind: type[VisionLanguageTask],
    model: ModelConfig,
    data: DataConfig,
    pictures: Pictures,
    sets: Sequence[Sequence[tuple[str, str, str, tuple[str, ...]]]],
    metric: str,
    most: int,
) -> Task:
    source, config = model_source(model)
    network, head = load_network(transformers.AutoModelForImageTextToText, source, model)
    processor = load_processor(source, network, data.max_length, config)
    check_vocabulary(processor.tokenizer, [target for _, _, target, _ in sets[0]], source)
    formats = {prompt: _in_format(processor, prompt) for part in sets for _, prompt, _, _ in part}
    _check_lengths(processor, sorted(formats.values()), pictures.open(sets[0][0][0]), data.max_length, source)
    train, held_out = (
        Examples([Shown(i, name, formats[asked], said, refs) for i, (name, asked, said, refs) in enumerate(part)])
        for part in sets
    )
    return kind(
        model=network, train_set=train, eval_set=held_out, metric=metric, num_labels=0, head=head,
        processor=processor, pictures=pictures, max_length=data.max_length, most=most,
    )  # fmt: skip


def _in_format(processor: Any, prompt: str) -> str:
    """Return all text before the answer, by the processor's chat template or in the format of LLaVA-1.5."""
    if processor.chat_template is None:
        return PLAIN_FORMAT.replace("{image}", processor.image_token).replace("{prompt}", prompt)
    turn: dict[str, Any] = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}
    return processor.apply_chat_template([turn], add_generation_prompt=True, tokenize=False)


def _check_lengths(processor: Any, prompts: Sequence[str], picture: Any, max_length: int, source: Path | str) -> None:
    """Refuse what could not be trained: other kinds of input, and prompts that leave no room for a target."""
    inputs = _inputs(processor, prompts[:1], [picture])
    unknown = set(inputs) - {"input_ids", "attention_mask", "token_type_ids", "pixel_values"}
    if unknown or "pixel_values" not in inputs:
        raise ModelError(
            f"{source}: its processor gives {', '.join(sorted(inputs))}; this task needs a LLaVA-like model, which "
            "reads input_ids and pixel_values"
        )
    of_picture = len(inputs["input_ids"][0]) - len(_tokens(processor.tokenizer, prompts[:1])[0])
    longest = max(len(row) for row in _tokens(processor.tokenizer, prompts)) + of_picture
    if longest + 2 > max_length:
        raise ModelError(
            f"data.max_length={max_length} leaves no room for an answer: the longest prompt has {longest} tokens, "
            f"{of_picture + 1} of them for the picture; set max_length={longest + 64} or more"
        )


def _inputs(processor: Any, prompts: Sequence[str], pictures: Sequence[Any]) -> Any:
    return processor(
        text=list(prompts), images=list(pictures), add_special_tokens=_specials(processor.tokenizer, prompts[0])
    )


def _tokens(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    return tokenizer(list(texts), add_special_tokens=_specials(tokenizer, texts[0]), verbose=False)["input_ids"]


def _specials(tokenizer: Any, text: str) -> bool:
    """Return whether the tokenizer is to add its start token: not where the chat template has written it already."""
    return not (tokenizer.bos_token and text.startswith(tokenizer.bos_token))
