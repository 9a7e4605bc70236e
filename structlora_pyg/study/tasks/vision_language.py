"""Words about pictures: captions and answers, written by a LLaVA-like model."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.utils import extract_model_from_parallel, send_to_device
from torch import Tensor, nn
from torch.nn import functional as F

from structlora_pyg.checks import ConfigError, short
from structlora_pyg.study.config import DataConfig, ModelConfig
from structlora_pyg.study.tasks import IGNORED, Batch, Task, evaluation, pad, register, shared_length
from structlora_pyg.study.tasks.data import DataError
from structlora_pyg.study.tasks.images import opened
from structlora_pyg.study.tasks.loading import ModelError, load_network, load_processor, model_source
from structlora_pyg.study.tasks.picture_texts import PictureRoot, PictureText, read_captions, read_questions
from structlora_pyg.study.tasks.splits import drawn

CAPTION_PROMPT = "Provide a one-sentence caption for the provided image."
QUESTION_PROMPT = "{question}\nAnswer the question using a single word or phrase."
PLAIN_FORMAT = "USER: {image}\n{prompt} ASSISTANT:"  # of LLaVA-1.5, for processors without a chat template
CAPTION_TOKENS, ANSWER_TOKENS = 64, 16  # most that evaluation writes


@dataclass(frozen=True, kw_only=True)
class VisionLanguageTask(Task):
    """A picture and a prompt into words. Pictures are opened when their batch is made.

    The loss is the mean negative log-likelihood of the tokens of the targets and the end tokens after them, as LLaVA is
    trained; the mean is over the tokens of a forward, so with gradient accumulation long targets count a little less
    than in one large batch. Evaluation writes greedily.

    Args:
        root: Where the pictures are.
        max_length: Tokens of picture, prompt and target together; a longer target loses its end.
        max_new_tokens: Most tokens that evaluation writes.
        score: Returns the primary metric of written texts and the references of each.
    """

    root: PictureRoot
    max_length: int
    max_new_tokens: int
    score: Callable[[Sequence[str], Sequence[Sequence[str]]], float]

    def collate(self, examples: Sequence[PictureText]) -> Batch:
        """Return a batch.

        ``input_ids``, ``attention_mask`` and ``labels`` have shape (B, T), the labels -100 but in the target;
        ``pixel_values`` (B, 3, height, width); ``number`` (B,).

        Raises:
            DataError: If a picture is damaged; it names the file.
        """
        tokenizer = self.preprocessor.tokenizer
        prompts = [e.prompt for e in examples]
        inputs = _inputs(self.preprocessor, prompts, [self.picture(e) for e in examples])
        begun, whole = (_tokens(tokenizer, texts) for texts in (prompts, [joint(e.prompt, e.answer) for e in examples]))
        padded = []
        for with_picture, prompt, text in zip(inputs["input_ids"], begun, whole, strict=True):
            border = shared_length(prompt, text)
            # The picture's tokens are in the prompt, before the border.
            context = list(with_picture)[: len(with_picture) - (len(prompt) - border)]
            target = [*text[border:], tokenizer.eos_token_id][: self.max_length - len(context)]
            ids, labels = context + target, [IGNORED] * len(context) + target
            padded.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
        return {
            **pad(padded, tokenizer),
            "pixel_values": torch.stack([torch.as_tensor(x) for x in inputs["pixel_values"]]),
            "number": torch.tensor([e.number for e in examples]),
        }

    def picture(self, example: PictureText) -> Any:
        """Return the picture of an example, in RGB."""
        with opened(self.root / example.picture) as picture:
            return picture.convert("RGB")

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
                here = send_to_device(batch, device)
                logits, labels = model(**self._inputs(here)).logits[:, :-1], here["labels"][:, 1:]
                chosen = labels != IGNORED
                total += F.cross_entropy(logits[chosen].float(), labels[chosen], reduction="sum").item()
                count += int(chosen.sum())
                texts += self.write(model, here)
                references += [self.eval_set[i].references for i in batch["number"].tolist()]
        if not math.isfinite(total):
            raise FloatingPointError(f"the evaluation loss is {total / count}")
        return {"loss": total / count, self.metric: self.score(texts, references)}

    def write(self, model: nn.Module, batch: Batch) -> list[str]:
        """Return what the model writes greedily after the prompts of a batch on its device, without its targets."""
        tokenizer = self.preprocessor.tokenizer
        lengths = (batch["labels"] != IGNORED).long().argmax(1).tolist()
        longest, fill = max(lengths), tokenizer.pad_token_id
        ids = torch.full((len(lengths), longest), fill, device=batch["input_ids"].device)
        mask = torch.zeros_like(ids)
        for i, length in enumerate(lengths):  # at the right, so that all go on at the same place
            ids[i, longest - length :], mask[i, longest - length :] = batch["input_ids"][i, :length], 1
        inputs = self._inputs({"input_ids": ids, "attention_mask": mask, "pixel_values": batch["pixel_values"]})
        written = extract_model_from_parallel(model).generate(
            **inputs, do_sample=False, num_beams=1, max_new_tokens=self.max_new_tokens, use_cache=True,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=fill,
        )  # fmt: skip
        return [text.strip() for text in tokenizer.batch_decode(written[:, longest:], skip_special_tokens=True)]

    def _inputs(self, batch: Batch) -> Batch:
        # Quantised weights are integers.
        kind = next(p.dtype for p in self.model.parameters() if p.is_floating_point())
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
        return {**inputs, "pixel_values": inputs["pixel_values"].to(kind)}


def joint(prompt: str, target: str) -> str:
    """Return prompt and target as one text, a space between them unless the prompt ends with one."""
    return prompt + ("" if prompt[-1:].isspace() else " ") + target


@register(
    "captions", "what does a picture show, in a sentence? COCO captions, by a LLaVA-like model; CIDEr times 100",
    options=("prompt",),
)  # fmt: skip
def caption_task(model: ModelConfig, data: DataConfig, seed: int) -> Task:
    """Return captions, one training example for each caption."""
    check_cider()
    root, (train, evaluated) = read_captions(data.path, data.validation_share)
    singles = [item._replace(answer=text, references=(text,)) for item in train for text in item.references]
    parts = drawn([singles, evaluated], data, seed)
    if len(parts[1]) < 2:
        raise DataError(data.path, found="one evaluation picture", expected="two or more; CIDEr compares pictures")
    return _task(model, data, root, parts, CAPTION_PROMPT, metric="cider", score=cider, max_new_tokens=CAPTION_TOKENS)


@register(
    "vqa", "a question about a picture, by a LLaVA-like model. VQAv2, easy-VQA; VQA accuracy", options=("prompt",)
)
def question_task(model: ModelConfig, data: DataConfig, seed: int) -> Task:
    """Return questions about pictures."""
    root, parts = read_questions(data.path, data.validation_share)

    def score(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
        return sum(map(vqa_accuracy, texts, references)) / len(texts)

    about = {"metric": "vqa_accuracy", "score": score, "max_new_tokens": ANSWER_TOKENS}
    return _task(model, data, root, drawn(parts, data, seed), QUESTION_PROMPT, **about)


def _task(
    model: ModelConfig, data: DataConfig, root: PictureRoot, parts: Sequence[Sequence[PictureText]], prompt: str,
    **options: Any,
) -> Task:  # fmt: skip
    source, _ = model_source(model)
    network, head = load_network(transformers.AutoModelForImageTextToText, source, model)
    processor = load_processor(source, network, data.max_length)
    prompt = prompt if data.prompt is None else data.prompt
    asked = {item.prompt: prompt.replace("{question}", item.prompt) for part in parts for item in part}
    prompts = {question: _in_format(processor, text) for question, text in asked.items()}
    sets = [[e._replace(prompt=prompts[e.prompt], number=i) for i, e in enumerate(part)] for part in parts]
    task = VisionLanguageTask(
        model=network, train_set=sets[0], eval_set=sets[1], num_labels=0, head=head, preprocessor=processor, root=root,
        max_length=data.max_length, **options,
    )  # fmt: skip
    _check_lengths(processor, sorted(prompts.values()), task.picture(sets[0][0]), data.max_length, source)
    return task


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
    longest = max(len(ids) for ids in _tokens(processor.tokenizer, prompts)) + of_picture
    if longest + 2 > max_length:
        raise ModelError(
            f"data.max_length={max_length} leaves no room for an answer: the longest prompt has {longest} tokens, "
            f"{of_picture + 1} of them for the picture; set max_length={longest + 64} or more"
        )


def _inputs(processor: Any, prompts: Sequence[str], pictures: Sequence[Any]) -> Any:
    specials = _specials(processor.tokenizer, prompts[0])
    return processor(text=list(prompts), images=list(pictures), add_special_tokens=specials)


def _tokens(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    return tokenizer(list(texts), add_special_tokens=_specials(tokenizer, texts[0]), verbose=False)["input_ids"]


def _specials(tokenizer: Any, text: str) -> bool:
    """Return whether the tokenizer is to add its start token: not where the chat template has written it already."""
    return not (tokenizer.bos_token and text.startswith(tokenizer.bos_token))


def check_cider() -> None:
    """Make sure that `cider` can be computed, before any training.

    Raises:
        ConfigError: If pycocoevalcap or a working Java is missing; it names the fix.
    """
    try:
        if _words([["A dog, running."]]) == [["a dog running"]]:
            return
        error = "it gives other words than it should"
    except (ImportError, OSError) as failure:
        error = short(failure)
    raise ConfigError(
        f"data.task=captions: the tokenizer of CIDEr does not work ({error}). It needs pycocoevalcap (pip install "
        "'structlora-pyg[caption]') and Java (apt-get install default-jre-headless, or conda install openjdk)"
    )


def cider(captions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return 100 times the mean CIDEr of captions, as papers give it; 0 for no word in common, about 100 for people.

    By the COCO evaluation code (pycocoevalcap). N-grams are weighted by how rare they are among the references, so a
    score belongs to its set of pictures. Vedantam et al. (arXiv 1411.5726).

    Args:
        captions: One caption per picture, two pictures or more: with one, no n-gram is rarer than another.
        references: The captions that people wrote for each picture, one or more.
    """
    from pycocoevalcap.cider.cider import Cider

    found, wanted = _words([[caption] for caption in captions]), _words(references)
    score, _ = Cider().compute_score(dict(enumerate(wanted)), dict(enumerate(found)))
    return 100.0 * float(score)


def _words(texts: Sequence[Sequence[str]]) -> list[list[str]]:
    """Return lower-case words without punctuation, separated by spaces, by the Stanford PTB tokenizer."""
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    # The tokenizer works by lines: a text of two would shift all that follow.
    lines = {i: [{"caption": " ".join(text.split())} for text in group] for i, group in enumerate(texts)}
    tokenized = PTBTokenizer().tokenize(lines)
    words = [tokenized.get(i, []) for i in range(len(texts))]
    if [len(group) for group in words] != [len(group) for group in texts]:
        raise OSError("the PTB tokenizer lost lines; run `java -version` to see whether Java works")
    return words


_NUMBERS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6",
    "seven": "7", "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
# Found with any one of their apostrophes left out.
_CONTRACTED = (
    "ain't", "aren't", "can't", "could've", "couldn't", "couldn't've", "didn't", "doesn't", "don't", "hadn't",
    "hadn't've", "hasn't", "haven't", "he'd", "he'd've", "he's", "how'd", "how'll", "how's", "isn't", "it'd",
    "it'd've", "it'll", "ma'am", "mightn't", "mightn't've", "might've", "mustn't", "must've", "needn't", "not've",
    "o'clock", "oughtn't", "'ow's'at", "shan't", "she'd've", "should've", "shouldn't", "shouldn't've",
    "somebody'd've", "somebody'll", "somebody's", "someone'd", "someone'd've", "someone'll", "someone's",
    "something'd", "something'd've", "something'll", "that's", "there'd", "there'd've", "there're", "there's",
    "they'd", "they'd've", "they'll", "they're", "they've", "'twas", "wasn't", "we'd've", "we've", "weren't",
    "what'll", "what're", "what's", "what've", "when's", "where'd", "where's", "where've", "who'd", "who'd've",
    "who'll", "who's", "who've", "why'll", "why're", "why's", "won't", "would've", "wouldn't", "wouldn't've",
    "y'all", "y'all'll", "y'all'd've", "you'd", "you'd've", "you'll", "you're", "you've",
)  # fmt: skip
_CONTRACTIONS = {
    word[:at] + word[at + 1 :]: word for word in _CONTRACTED for at, letter in enumerate(word) if letter == "'"
}


def _without_punctuation(text: str) -> str:
    """Return a text without punctuation.

    A sign at the edge of a word, or in a text with a number such as 1,000, goes; one inside a word becomes a space. A
    period stays before a digit.
    """
    result = text
    for sign in ';/[]"{}()=+\\_-><@`,?!':
        goes = f"{sign} " in text or f" {sign}" in text or re.search(r"\d,\d", text)
        result = result.replace(sign, "" if goes else " ")
    return re.sub(r"\.(?!\d)", "", result)


def normalized_answer(text: str) -> str:
    """Return an answer in the form that `vqa_accuracy` compares: no punctuation or articles, digits, contractions."""
    words = _without_punctuation(" ".join(text.split())).lower().split()
    words = [_NUMBERS.get(word, word) for word in words]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in ("a", "an", "the"))


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """Return the VQA accuracy of one answer, in [0, 1], as the official evaluation counts it.

    With several people's answers: for each person, how many of the others gave the answer, divided by three, at most 1;
    the mean over the people. With a single one: whether it is the same. The people's answers are taken as they are if
    all are equal, otherwise without punctuation. Antol et al. (arXiv 1505.00468); visualqa.org/evaluation.html.

    Args:
        answer: What the model said; it is normalised.
        references: The people's answers, one or more.
    """
    said = normalized_answer(answer)
    if len(references) == 1:
        return float(said == normalized_answer(references[0]))
    people = list(references) if len(set(references)) == 1 else [_without_punctuation(text) for text in references]
    agree = people.count(said)
    return sum(min(1.0, (agree - (text == said)) / 3) for text in people) / len(people)
