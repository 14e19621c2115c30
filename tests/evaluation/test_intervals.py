import numpy as np
import pytest

from benchmarks.interval_coverage import question_rates, simulate
from emguard_plugin.evaluation.statistics.intervals import (
    clustered_interval,
    clustered_n,
    paired_differences,
    stratified_interval,
    stratified_n,
    wilson,
)


def test_wilson_by_its_textbook_formula():
    z, p, n = 1.959964, 0.3, 10
    middle, half = p + z**2 / (2 * n), z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    expected = ((middle - half) / (1 + z**2 / n), (middle + half) / (1 + z**2 / n))
    assert wilson(3, 10) == pytest.approx(expected, abs=1e-6)


def counts(*pairs):
    return tuple(np.array(column) for column in zip(*pairs, strict=True))


def test_an_interval_at_zero_and_at_one_still_has_width():
    none, every = counts((0, 20), (0, 20)), counts((20, 20), (20, 20))
    assert stratified_interval(*none) == pytest.approx((0, wilson(0, 40)[1]))
    assert clustered_interval(*none)[1] > stratified_interval(*none)[1]
    assert stratified_interval(*every)[1] == clustered_interval(*every)[1] == 1
    assert clustered_interval(*every)[0] < stratified_interval(*every)[0]


def test_answers_that_agree_within_a_question_count_as_few_beyond_it_and_as_many_for_it():
    alike, mixed = counts((20, 20), (0, 20), (20, 20), (0, 20)), counts(*[(10, 20)] * 4)
    assert clustered_n(*alike) < clustered_n(*mixed) / 5
    assert stratified_n(*alike) > stratified_n(*mixed) * 5
    assert np.ptp(stratified_interval(*alike)) > 0


def test_with_one_question_nothing_is_said_of_others_and_with_one_answer_each_all_are_independent():
    assert clustered_interval(*counts((1, 2))) is None
    assert stratified_n(*counts((1, 1), (0, 1), (0, 1))) == 3


def test_few_hits_are_taken_as_clustered_until_many_questions_show_otherwise():
    one, each = counts((1, 50), *[(0, 50)] * 39), counts(*[(1, 50)] * 40)
    assert clustered_n(*one) < 300
    assert clustered_n(*each) > 600


@pytest.mark.parametrize(("questions", "answers", "correlation"), [(12, 15, 0.3), (40, 15, 0.2), (40, 50, 0.1)])
def test_both_intervals_cover_as_often_as_they_say_and_the_verdict_errs_as_rarely(questions, answers, correlation):
    """At a rate of 5 %, which is also the gate; 500 runs, so three standard errors are 2.1 points per side."""
    found = simulate(mean=0.05, correlation=correlation, questions=questions, answers=answers, runs=500)
    side = 0.025 + 3 * found["standard_error_at_nominal"]
    for interval in ("these", "like_these"):
        assert max(found[interval].values()) < side
    assert found["wrong_pass"] < side
    assert found["wrong_fail"] < side


def test_pooling_the_answers_would_not_cover():
    """The fault that the clustering is for; the simulation above can tell."""
    rng, missed = np.random.default_rng(0), 0
    for _ in range(300):
        hits = rng.binomial(15, question_rates(rng, 0.2, 0.3, 40)).sum()
        low, high = wilson(hits, 600)
        missed += not low <= 0.2 <= high
    assert missed / 300 > 0.2


def test_a_test_between_equal_models_rejects_as_rarely_as_it_says():
    rng, small = np.random.default_rng(1), np.zeros(2)
    sizes, runs = np.full(10, 20), 100
    for _ in range(runs):
        rates = question_rates(rng, 0.15, 0.2, 10)
        found = paired_differences(rng.binomial(20, rates), sizes, rng.binomial(20, rates), sizes)
        small += (found["p_value"] < 0.05, found["p_value_stratified"] < 0.05)
    assert (small / runs < 0.05 + 3 * np.sqrt(0.05 * 0.95 / runs)).all()
