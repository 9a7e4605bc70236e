"""Metrics of predictions, as the field reports them; scikit-learn's, SciPy's and COCO's own where they have them."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

from torch import Tensor

from structlora_pyg.checks import ConfigError

Metric = Callable[[Tensor, Tensor], float]


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    return (logits.argmax(-1) == labels).double().mean().item()


def _sklearn(name: str, **options: Any) -> Metric:
    def metric(logits: Tensor, labels: Tensor) -> float:
        import sklearn.metrics

        return float(getattr(sklearn.metrics, name)(labels, logits.argmax(-1), **options))

    return metric


def _correlation(scores: Tensor, labels: Tensor, kind: str) -> float:
    """Return a correlation; 0 where predictions or labels are constant, which leaves it undefined."""
    import scipy.stats

    scores = scores.squeeze(-1)
    if len(scores.unique()) == 1 or len(labels.unique()) == 1:
        return 0.0
    return float(getattr(scipy.stats, kind)(scores.double().numpy(), labels.double().numpy()).statistic)


# Of logits (N, classes) and labels (N,), or of scores (N, 1) and labels (N,).
METRICS: dict[str, Metric] = {
    "accuracy": _accuracy,
    "top5": lambda logits, labels: (logits.topk(5).indices == labels.unsqueeze(-1)).any(-1).double().mean().item(),
    "f1": _sklearn("f1_score", zero_division=0.0),
    "f1_macro": _sklearn("f1_score", zero_division=0.0, average="macro"),
    "matthews": _sklearn("matthews_corrcoef"),
    "pearson": lambda scores, labels: _correlation(scores, labels, "pearsonr"),
    "spearman": lambda scores, labels: _correlation(scores, labels, "spearmanr"),
}


def check_cider() -> None:
    """Make sure that `cider` can be computed, before any training.

    Raises:
        ConfigError: If pycocoevalcap or a working Java is missing; it names the fix.
    """
    if find_spec("pycocoevalcap") is None:
        raise ConfigError(["data.task=captions needs pycocoevalcap for CIDEr: pip install 'structlora-pyg[caption]'"])
    if shutil.which("java") is None:
        fix = "install a Java runtime (apt-get install default-jre-headless, or conda install openjdk)"
        raise ConfigError([f"data.task=captions: the tokenizer of CIDEr needs Java, and there is no java: {fix}"])
    try:
        works = _words([["A dog, running."]]) == [["a dog running"]]
    except OSError:
        works = False
    if not works:
        raise ConfigError(["data.task=captions: the tokenizer of CIDEr does not work; does `java -version`?"])


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
