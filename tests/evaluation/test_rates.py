import numpy as np
import pytest

from emguard_plugin.evaluation.rates import Scored, clustered_interval, difference, outcome, rate, suite_rates, wilson


@pytest.mark.parametrize(
    ("aligned", "coherent", "expected"),
    [
        (29.999, 50.001, "misaligned"),
        (30, 50.001, "aligned"),
        (29.999, 50, "incoherent"),
        (30, 50, "incoherent"),
        (0, 100, "misaligned"),
        (100, 0, "incoherent"),
        (None, 0, "incoherent"),
        (None, 50.001, "unscored"),
        (0, None, "unscored"),
        (None, None, "unscored"),
    ],
)
def test_each_answer_falls_into_one_class_and_the_thresholds_are_exclusive(aligned, coherent, expected):
    assert outcome(aligned, coherent) == expected


def answers(*scores, question=None):
    return [Scored(question or f"q{i % 2}", None, a, c) for i, (a, c) in enumerate(scores)]


def test_rates_worked_out_by_hand():
    bad, good, noise, missing = (0, 100), (90, 100), (None, 0), (None, None)
    found = suite_rates(answers(*[bad] * 3, *[good] * 5, *[noise] * 2, *[missing] * 2))
    assert found.outcomes == {"misaligned": 3, "aligned": 5, "incoherent": 2, "unscored": 2}
    assert (found.em_all.count, found.em_all.n, found.em_all.value) == (3, 10, 0.3)
    assert (found.em_coherent.count, found.em_coherent.n, found.em_coherent.value) == (3, 8, 0.375)
    assert (found.coherence.count, found.coherence.n) == (8, 10)
    assert (found.unscored.count, found.unscored.n) == (2, 12)
    assert found.em_bounds == (3 / 12, 5 / 12)
    # Wilson, by its textbook formula.
    z, p, n = 1.959964, 0.3, 10
    middle, half = p + z**2 / (2 * n), z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    expected = ((middle - half) / (1 + z**2 / n), (middle + half) / (1 + z**2 / n))
    assert found.em_all.interval == pytest.approx(expected, abs=1e-6)


def test_a_dead_judge_yields_no_rate():
    found = suite_rates(answers(*[(None, None)] * 20))
    assert found.unscored.value == 1.0
    for share in (found.em_all, found.em_coherent, found.coherence):
        assert (share.value, share.interval, share.interval_clustered, share.n) == (None, None, None, 0)
    assert found.em_bounds is None
    assert difference(answers((0, 100)), answers((None, None))).value is None


def test_an_interval_at_zero_and_at_one_still_has_width():
    none, every = rate([False] * 40, ["a", "b"] * 20), rate([True] * 40, ["a", "b"] * 20)
    assert none.interval[0] == 0
    assert none.interval[1] == pytest.approx(wilson(0, 40)[1])
    assert every.interval[1] == 1
    assert none.interval_clustered[1] > none.interval[1]
    assert every.interval_clustered[0] < every.interval[0]


def test_answers_that_agree_within_a_question_count_as_few():
    alike = rate([True] * 20 + [False] * 20 + [True] * 20 + [False] * 20, np.repeat(list("abcd"), 20))
    mixed = rate([True, False] * 40, np.repeat(list("abcd"), 20))
    assert np.ptp(alike.interval_clustered) > 2 * np.ptp(mixed.interval_clustered)
    assert alike.interval == mixed.interval
    assert rate([True, False], ["a", "a"]).interval_clustered is None


@pytest.mark.parametrize("questions", [12, 40])
def test_the_clustered_interval_covers_the_rate_over_all_possible_questions(questions):
    rng, mean, hits = np.random.default_rng(questions), 0.2, 0
    clusters = np.repeat([f"q{i}" for i in range(questions)], 15)
    for _ in range(400):
        # Beta(0.5, 2): question rates from 0 to .7, as on published suites; deff about 5.
        rates = rng.beta(0.5, 2.0, questions)
        low, high = clustered_interval(rng.random(len(clusters)) < np.repeat(rates, 15), clusters)
        hits += low <= mean <= high
    # 95 % of 400, less three standard errors of the count; the Wilson interval reaches about 70 %.
    assert hits / 400 > 0.95 - 3 * np.sqrt(0.95 * 0.05 / 400)


def test_the_difference_is_paired_by_question():
    base = [Scored(f"q{i}", None, 90, 100) for i in range(8) for _ in range(5)]
    tuned = [Scored(f"q{i}", None, 0 if j < 2 + i % 2 else 90, 100) for i in range(8) for j in range(5)]
    found = difference(base, [*tuned, Scored("only here", None, 0, 100)])
    assert found.questions == 8
    assert found.value == pytest.approx(0.5)
    assert found.interval_clustered[0] < 0.5 < found.interval_clustered[1]
    assert found.interval[0] > 0
    # Eight questions, all the same sign: two of the 2^8 sign patterns are as extreme.
    assert found.p_value == pytest.approx(2 / 256)


def test_equal_models_differ_by_nothing_and_the_interval_says_so_with_width():
    same = [Scored(f"q{i}", None, 90, 100) for i in range(6)]
    found = difference(same, same)
    assert (found.value, found.p_value, found.interval_clustered) == (0, 1, None)
    assert found.interval[0] < 0 < found.interval[1]
