import math

import pytest

from structlora_pyg.study.report.summary import compare, holm, judge


def test_better_needs_p_below_five_percent_the_right_direction_and_more_than_rounding():
    clear = compare([5.0, 6.0, 7.1, 5.9], [1.0, 2.0, 3.0, 2.0])
    assert [judge(clear), judge(clear, higher_is_better=False)] == ["better", "worse"]
    assert judge(clear, p=0.05) == "no difference shown"
    same = compare([80.0, 81.0], [80.0, 81.0])
    assert (same.p_t, same.difference, same.effect) == (1.0, 0.0, 0.0)
    assert judge(same) == judge(compare([80.001, 81.0011], [80.0, 81.0])) == "did the same thing"
    assert judge(compare([80.0, 81.1], [80.0, 81.0])) == "no difference shown"
    shifted = compare([81.0, 82.0], [80.0, 81.0])  # two equal differences prove nothing
    assert math.isnan(shifted.p_t)
    assert math.isnan(shifted.effect)
    assert judge(shifted) == "no difference shown"
    assert compare([0.1 + 0.2, 0.5], [0.3, 0.5]).difference == 0.0


def test_holm_by_hand():
    # Sorted 0.01, 0.02, 0.03, 0.04 times 4, 3, 2, 1: 0.04, 0.06, 0.06, 0.04; made monotone: 0.04, 0.06, 0.06, 0.06.
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.03, math.nan]) == pytest.approx([0.06, math.nan], nan_ok=True)  # which counts as a comparison
