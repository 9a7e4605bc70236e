"""VQA accuracy, counted by hand on the rules of the official evaluation."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from structlora_pyg.study.tasks.vision_language import normalized_answer as normalized
from structlora_pyg.study.tasks.vision_language import vqa_accuracy

NORMALISED = {
    "The Cat.": "cat", "a dog and an owl": "dog and owl", "two": "2", "None": "0", "twenty": "twenty",
    "white/blue": "white blue", "white / blue": "white blue", "t-shirt": "t shirt",
    "yes!": "yes",  # without a space beside it, the sign becomes one, and split drops it
    "1,000": "1000", "red, 1,000": "red 1000", "3.5": "3.5", "U.S.": "us", "dont": "don't", "don't": "don't",
    "youre": "you're", "couldnt've": "couldn't've", "  on\nthe\ttable ": "on table", "": "",
}  # fmt: skip
AGREEING = {0: 0.0, 1: 9 * (1 / 3) / 10, 2: (8 * 2 / 3 + 2 * 1 / 3) / 10, 3: (7 + 3 * 2 / 3) / 10, 4: 1.0, 10: 1.0}


def test_answers_are_normalised_and_each_person_is_compared_with_the_nine_others_as_officially() -> None:
    assert {text: normalized(text) for text in NORMALISED} == NORMALISED
    found = {n: vqa_accuracy("Blue.", ["blue"] * n + ["red"] * (10 - n)) for n in AGREEING}
    assert found == pytest.approx(AGREEING)


@pytest.mark.parametrize(
    ("answer", "people", "expected"),
    [
        ("t shirt", ["t-shirt"] * 9 + ["shirt"], 1.0),  # people's answers lose their punctuation only where they differ
        ("t shirt", ["t-shirt"] * 10, 0.0),
        ("two", ["2"] * 9 + ["3"], 1.0),  # and their numbers and articles stay as they are
        ("two", ["two"] * 9 + ["3"], 0.0),
        ("The circle.", ["a circle"], 1.0),  # a single answer is normalised
        ("two", ["two"], 1.0),
        ("circles", ["circle"], 0.0),
    ],
)
def test_people_s_answers_are_normalised_as_officially(answer: str, people: list[str], expected: float) -> None:
    assert vqa_accuracy(answer, people) == expected


@settings(max_examples=25, deadline=None)
@given(
    st.text("aAtTéß日 \n\t.,'-/?129", max_size=12),
    st.lists(st.sampled_from(["yes", "no", "two", "a cat", "t-shirt"]), min_size=1, max_size=10),
)
def test_an_accuracy_lies_between_0_and_1_and_no_order_matters(answer: str, people: list[str]) -> None:
    found = vqa_accuracy(answer, people)
    assert 0.0 <= found <= 1.0
    assert vqa_accuracy(answer, people[::-1]) == pytest.approx(found)
    assert normalized(answer).split() == normalized(answer).split(" ") or normalized(answer) == ""
