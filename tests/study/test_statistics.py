import math

import pytest
from hypothesis import strategies as st

from structlora_pyg.study.report.summary import compare, holm, judge

PROBABILITIES = st.lists(st.floats(0, 1), min_size=1, max_size=8)


def test_runs_that_agree_to_rounding_did_the_same_thing_which_is_more_than_no_difference():
    result = compare([80.0, 81.0], [80.0, 81.0])
    assert (result.p_t, result.difference, result.effect) == (1.0, 0.0, 0.0)
    assert judge(result) == judge(compare([80.001, 81.0011], [80.0, 81.0])) == "did the same thing"
    assert judge(compare([80.0, 81.1], [80.0, 81.0])) == "no difference shown"


def test_two_equal_differences_prove_nothing():
    result = compare([81.0, 82.0], [80.0, 81.0])
    assert math.isnan(result.p_t)
    assert math.isnan(result.effect)
    assert judge(result) == "no difference shown"


def test_rounding_noise_is_no_difference():
    assert compare([0.1 + 0.2, 0.5], [0.3, 0.5]).difference == 0.0


def test_holm_by_hand():
    # Sorted 0.01, 0.02, 0.03, 0.04 times 4, 3, 2, 1: 0.04, 0.06, 0.06, 0.04; made monotone: 0.04, 0.06, 0.06, 0.06.
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])


def test_holm_counts_an_undefined_p_as_a_comparison():
    first, second = holm([0.03, math.nan])
    assert first == pytest.approx(0.06)
    assert math.isnan(second)


def test_better_needs_p_below_five_percent_and_the_right_direction():
    clear = compare([5.0, 6.0, 7.1, 5.9], [1.0, 2.0, 3.0, 2.0])
    assert judge(clear) == "better"
    assert judge(clear, higher_is_better=False) == "worse"
    assert judge(clear, p=0.05) == "no difference shown"
