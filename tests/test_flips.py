"""Answer flips counted by hand: accuracies, changed answers, their margins, and the test of both directions."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onecard.eval.flips import Answered, answers, summarize_answers
from onecard.eval.intervals import wilson


def item(right: int, reference: tuple[float, ...], quantized: tuple[float, ...], name: str = "") -> Answered:
    return Answered(name or f"item-{right}", right, reference, quantized)


BY_HAND = [
    item(0, (-1.0, -3.0, -9.0), (-1.5, -2.0, -9.0)),  # right, stays right
    item(0, (-1.0, -1.2, -9.0), (-2.0, -1.9, -9.0)),  # right to wrong; held by 0.2
    item(2, (-1.0, -4.0, -1.5), (-3.0, -4.0, -1.0)),  # wrong to right; held by 0.5
    item(1, (-1.0, -9.0, -2.0), (-3.0, -9.0, -2.5)),  # wrong to another wrong; held by 1.0
    item(1, (-1.0, -9.0, -2.0), (-1.0, -9.0, -2.0)),  # wrong, stays wrong
    item(2, (-8.0, -9.0, -2.0), (-1.0, -9.0, -2.0)),  # right to wrong; held by 6.0
]


def test_figures_by_hand() -> None:
    got = summarize_answers(BY_HAND).to_json()
    assert got["items"] == 6
    counts = {"accuracy_reference": 3, "accuracy_quantized": 2, "changed": 4, "right_to_wrong": 2, "wrong_to_right": 1}
    for key, count in counts.items():
        interval = wilson(count, 6)
        assert got[key] == {"share": count / 6, "low": interval.low, "high": interval.high, "count": count}, key
    assert got["mcnemar_p"] == pytest.approx(2 * (1 + 3) / 8)  # two of three, either way: capped at 1
    assert got["margin_of_changed"] == pytest.approx((0.2 + 0.5 + 1.0 + 6.0) / 4)
    assert got["margin_of_all"] == pytest.approx((2.0 + 0.2 + 0.5 + 1.0 + 1.0 + 6.0) / 6)


def test_answers_by_hand() -> None:
    second = answers(BY_HAND)[1].to_json()
    assert (second["right"], second["reference"], second["quantized"]) == (0, 0, 1)
    assert (second["margin_reference"], second["margin_quantized"]) == pytest.approx((0.2, 0.1))
    assert [a.reference for a in answers(BY_HAND)] == [0, 0, 0, 0, 0, 2]
    assert [a.quantized for a in answers(BY_HAND)] == [0, 1, 2, 2, 0, 0]


def test_nothing_changed_has_no_margin_and_no_direction() -> None:
    got = summarize_answers([BY_HAND[0], BY_HAND[4]]).to_json()
    assert got["changed"]["count"] == 0
    assert got["margin_of_changed"] is None
    assert got["mcnemar_p"] == 1.0
    json.dumps(got, allow_nan=False)


def test_mcnemar_sees_one_direction_and_not_another_wrong_answer() -> None:
    lost = item(0, (-1.0, -2.0, -3.0), (-2.0, -1.0, -3.0))
    sideways = item(2, (-1.0, -2.0, -3.0), (-2.0, -1.0, -3.0))
    assert summarize_answers([lost] * 10).mcnemar_p == pytest.approx(2 / 2**10)
    assert summarize_answers([sideways] * 10).mcnemar_p == 1.0
    assert summarize_answers([lost] * 10 + [sideways] * 90).mcnemar_p == pytest.approx(2 / 2**10)


def test_equal_scores_are_answered_with_the_first_and_held_by_nothing() -> None:
    tie = item(1, (-2.0, -2.0), (-2.0, -1.0))
    assert (tie.reference, tie.quantized) == (0, 1)
    assert (tie.margin_reference, tie.margin_quantized) == (0.0, 1.0)


scores = st.lists(st.floats(-30, 0), min_size=4, max_size=4).map(tuple)


@given(st.lists(st.tuples(st.integers(0, 3), scores, scores), min_size=1, max_size=40))
def test_the_parts_make_the_whole(drawn: list[tuple[int, tuple[float, ...], tuple[float, ...]]]) -> None:
    """The difference of the accuracies is the share that turned right less the share that turned wrong."""
    items = [item(*one) for one in drawn]
    got = summarize_answers(items).to_json()
    gained = got["wrong_to_right"]["count"] - got["right_to_wrong"]["count"]
    assert got["accuracy_quantized"]["count"] - got["accuracy_reference"]["count"] == gained
    assert got["wrong_to_right"]["count"] + got["right_to_wrong"]["count"] <= got["changed"]["count"] <= len(items)
    for key in ("accuracy_reference", "accuracy_quantized", "changed", "right_to_wrong", "wrong_to_right"):
        assert 0 <= got[key]["low"] <= got[key]["share"] <= got[key]["high"] <= 1
    assert got["margin_of_all"] >= 0
    told = answers(items)
    assert math.fsum(a.margin_reference for a in told) / len(told) == pytest.approx(got["margin_of_all"])
    assert sum(a.reference != a.quantized for a in told) == got["changed"]["count"]
