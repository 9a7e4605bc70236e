"""VQA accuracy: how many of ten people gave the answer, as the official evaluation of VQA counts it.

Antol et al., "VQA: Visual Question Answering" (arXiv 1505.00468); normalisation as on visualqa.org/evaluation.html.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

ARTICLES = {"a", "an", "the"}
NUMBERS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6",
    "seven": "7", "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
# Found with any one of their apostrophes left out.
CONTRACTED = (
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
CONTRACTIONS = {
    word[:at] + word[at + 1 :]: word for word in CONTRACTED for at, letter in enumerate(word) if letter == "'"
}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
COMMA_IN_NUMBER = re.compile(r"\d,\d")
PERIOD = re.compile(r"\.(?!\d)")


def without_punctuation(text: str) -> str:
    """Return a text without punctuation.

    A sign at the edge of a word, or in a text with a number such as 1,000, goes; one inside a word becomes a space. A
    period stays before a digit.
    """
    result = text
    for sign in PUNCTUATION:
        goes = f"{sign} " in text or f" {sign}" in text or COMMA_IN_NUMBER.search(text)
        result = result.replace(sign, "" if goes else " ")
    return PERIOD.sub("", result)


def normalized(text: str) -> str:
    """Return an answer in the form that is compared: no punctuation or articles, digits, contractions."""
    words = without_punctuation(" ".join(text.split())).lower().split()
    words = [NUMBERS.get(word, word) for word in words]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """Return the accuracy of one answer, in [0, 1].

    With several people's answers: for each person, how many of the others gave the answer, divided by three, at most 1;
    the mean over the people. With a single one: whether it is the same. The people's answers are taken as they are if
    all are equal, otherwise without punctuation, as officially.

    Args:
        answer: What the model said; it is normalised.
        references: The people's answers, one or more.
    """
    said = normalized(answer)
    if len(references) == 1:
        return float(said == normalized(references[0]))
    people = list(references) if len(set(references)) == 1 else [without_punctuation(text) for text in references]
    agree = people.count(said)
    return sum(min(1.0, (agree - (text == said)) / 3) for text in people) / len(people)
