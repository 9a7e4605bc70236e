from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from structlora_pyg.study.stats import compare, holm, judge, mean_sd

PROBABILITIES = st.lists(st.floats(0, 1), min_size=1, max_size=8)


def test_mean_and_sample_standard_deviation_by_hand():
    assert mean_sd([2.0, 4.0, 4.0, 4.0, 5.0, 5.0, 7.0, 9.0]) == pytest.approx((5.0, math.sqrt(32 / 7)))


def test_paired_difference_interval_and_t_test_by_hand():
    # Differences 1, 2, 3: mean 2, sd 1, standard error 1/sqrt(3), t = 2 sqrt(3) with 2 degrees of freedom,
    # whose distribution function is 1/2 + t / (2 sqrt(2 + t^2)); its 97.5 % point is 4.30265.
    result = compare([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    assert result.n == 3
    assert result.difference == pytest.approx(2.0)
    assert result.high - result.difference == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert result.difference - result.low == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert result.p_t == pytest.approx(1 - math.sqrt(12 / 14), rel=1e-9)
    assert result.effect == pytest.approx(2.0)


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


@settings(deadline=None)
@given(PROBABILITIES)
def test_holm_never_lowers_a_p_and_keeps_their_order(p):
    adjusted = holm(p)
    assert all(q >= r or q == 1.0 for q, r in zip(adjusted, p, strict=True))
    order = sorted(range(len(p)), key=lambda i: p[i])
    assert all(adjusted[i] <= adjusted[j] for i, j in itertools.pairwise(order))


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 448), st.integers(0, 448)), min_size=2, max_size=8))
def test_swapping_the_methods_turns_the_result_around(pairs):
    forth = compare([x / 448 for x, _ in pairs], [y / 448 for _, y in pairs])
    back = compare([y / 448 for _, y in pairs], [x / 448 for x, _ in pairs])
    assert forth.difference == pytest.approx(-back.difference)
    assert forth.low == pytest.approx(-back.high)
    assert forth.p_t == pytest.approx(back.p_t, nan_ok=True)


def test_better_needs_p_below_five_percent_and_the_right_direction():
    clear = compare([5.0, 6.0, 7.1, 5.9], [1.0, 2.0, 3.0, 2.0])
    assert judge(clear) == "better"
    assert judge(clear, higher_is_better=False) == "worse"
    assert judge(clear, p=0.05) == "no difference shown"
