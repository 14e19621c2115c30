"""Intervals for shares whose observations come in questions, and for the difference of two such shares.

Two questions can be asked of the same answers. *These questions*: were every question asked again, how far would the
rate move? *Questions like these*: had other questions of the kind been written, how far would it move? The first is
stratified by question, the second clustered by question; a claim beyond the suite needs the second.

Each is the Wilson score interval with an effective number of answers in place of n, as Korn and Graubard (1998) do for
surveys: unlike a bootstrap it keeps its width at 0 and at 1.

Everywhere `count` and `n` are arrays with one entry per question: its hits and its answers, at least one.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from emguard_plugin.evaluation.statistics.figures import Bounds

LEVEL = 0.95
Z_LEVEL = (1 + LEVEL) / 2

PRIOR_CORRELATION = 0.15
PRIOR_QUESTIONS = 10
"""Misaligned answers come in few questions, and while few were seen their clustering cannot be estimated: one hit in
2,000 answers looks unclustered. So the design effect leans on the one that a within-question correlation of 0.15 gives,
with the weight of ten questions with a hit. On 25 public judged models the correlation is 0.1 in the median and up to
0.3 (8 questions, 50 answers each). Without this, a rate that sits exactly on a 2 % gate passes it in 6 to 40 % of runs
where 2.5 % is nominal: `benchmarks/interval_coverage.py`."""


def wilson(count: float, n: float) -> Bounds:
    """Return the 95 % Wilson score interval of count / n; both may be fractional."""
    from statsmodels.stats.proportion import proportion_confint

    low, high = proportion_confint(count, n, alpha=1 - LEVEL, method="wilson")
    # At 0 and n the bound is exactly the estimate, up to rounding.
    return (0.0 if count == 0 else float(low), 1.0 if count == n else float(high))


def clustered_n(count: np.ndarray, n: np.ndarray) -> float | None:
    """Return the effective number of answers for questions like these, or None with fewer than two questions.

    N* = N / deff * (t_{N-1} / t_{m-1})^2 with t the 97.5 % quantiles, N all answers and m the number of questions. deff
    is V_cluster / (p (1 - p) / N), at least 1, V_cluster the cluster-robust variance of the mean; it is drawn towards
    1 + PRIOR_CORRELATION * (N / m - 1) with the weight of PRIOR_QUESTIONS questions that have a hit, but never down.
    """
    from scipy.special import stdtrit

    total, m, p = n.sum(), len(n), count.sum() / n.sum()
    if m < 2:
        return None
    variance = m / (m - 1) * ((count - p * n) ** 2).sum() / total**2
    seen = max(1.0, variance / (p * (1 - p) / total)) if 0 < p < 1 else 1.0
    # At high rates it is the misses that are rare.
    informative = min((count > 0).sum(), (count < n).sum())
    weight = PRIOR_QUESTIONS / (PRIOR_QUESTIONS + informative)
    prior = 1 + PRIOR_CORRELATION * (total / m - 1)
    deff = max(seen, weight * prior + (1 - weight) * seen)
    return float(total / deff * (stdtrit(total - 1, Z_LEVEL) / stdtrit(m - 1, Z_LEVEL)) ** 2)


def stratified_n(count: np.ndarray, n: np.ndarray) -> float:
    """Return the effective number of answers for these very questions.

    The variance of the mean over fixed questions, sum_q n_q^2 / N^2 * p_q (1 - p_q) / (n_q - 1), is at most that of
    as many independent answers. Where a question has a single answer it is unknown, and N itself is returned.
    """
    total, p = n.sum(), count.sum() / n.sum()
    if n.min() < 2 or not 0 < p < 1:
        return float(total)
    rates = count / n
    variance = ((n / total) ** 2 * rates * (1 - rates) / (n - 1)).sum()
    # Questions that are all hit or all missed would leave an interval without width.
    pooled = p * (1 - p) / total
    return float(p * (1 - p) / min(max(variance, pooled / PRIOR_QUESTIONS), pooled))


def clustered_interval(count: np.ndarray, n: np.ndarray) -> Bounds | None:
    """Return the 95 % interval for questions like these, or None with fewer than two questions."""
    effective = clustered_n(count, n)
    return None if effective is None else _effective_wilson(count, n, effective)


def stratified_interval(count: np.ndarray, n: np.ndarray) -> Bounds:
    """Return the 95 % interval for these very questions."""
    return _effective_wilson(count, n, stratified_n(count, n))


def _effective_wilson(count: np.ndarray, n: np.ndarray, effective: float) -> Bounds:
    p = float(count.sum() / n.sum())
    return wilson(p * effective if p < 1 else effective, effective)


def paired_differences(count_1: np.ndarray, n_1: np.ndarray, count_0: np.ndarray, n_0: np.ndarray) -> dict[str, Any]:
    """Compare two pooled rates, paired by question.

    Returns:
        `value`, rate 1 minus rate 0; `interval`, the 95 % Newcombe interval with the stratified effective numbers;
        `interval_clustered`, the t interval of the linearised per-question contributions, None where they do not vary;
        `p_value`, of the sign-flip permutation test of those contributions over questions; `p_value_stratified`, of
        the Cochran-Mantel-Haenszel test within questions.
    """
    from statsmodels.stats.proportion import confint_proportions_2indep

    rate_1, rate_0 = count_1.sum() / n_1.sum(), count_0.sum() / n_0.sum()
    effective = [stratified_n(count, n) for count, n in ((count_1, n_1), (count_0, n_0))]
    low, high = confint_proportions_2indep(
        rate_1 * effective[0], effective[0], rate_0 * effective[1], effective[1], method="newcomb", alpha=1 - LEVEL
    )
    # What each question adds to the difference of the pooled rates; the sum over questions is the difference itself.
    parts = count_1 / n_1.sum() - count_0 / n_0.sum()
    around = (count_1 - rate_1 * n_1) / n_1.sum() - (count_0 - rate_0 * n_0) / n_0.sum()
    interval, p_value = _over_questions(float(rate_1 - rate_0), parts, around)
    return {
        "value": float(rate_1 - rate_0),
        "interval": (float(low), float(high)),
        "interval_clustered": interval,
        "p_value": p_value,
        "p_value_stratified": _within_questions(count_1, n_1, count_0, n_0),
    }


def _over_questions(value: float, parts: np.ndarray, around: np.ndarray) -> tuple[Bounds | None, float | None]:
    from scipy import stats

    m = len(parts)
    if m < 2:
        return None, None
    flip = stats.permutation_test((parts,), lambda x, axis: x.mean(axis=axis), permutation_type="samples", vectorized=True, rng=0)
    if np.ptp(parts) == 0:
        # A variance of zero would give an interval without width, which says more than was seen.
        return None, float(flip.pvalue)
    error = np.sqrt(m / (m - 1) * (around**2).sum())
    low, high = stats.t.interval(LEVEL, m - 1, loc=value, scale=error) if error > 0 else (value, value)
    return (max(-1.0, float(low)), min(1.0, float(high))), float(flip.pvalue)


def _within_questions(count_1: np.ndarray, n_1: np.ndarray, count_0: np.ndarray, n_0: np.ndarray) -> float | None:
    from statsmodels.stats.contingency_tables import StratifiedTable

    # A question that both models always or never hit says nothing about their difference.
    tables = [
        np.array([[c1, m1 - c1], [c0, m0 - c0]]) for c1, m1, c0, m0 in zip(count_1, n_1, count_0, n_0, strict=True) if 0 < c1 + c0 < m1 + m0
    ]
    return float(StratifiedTable(tables).test_null_odds(correction=True).pvalue) if tables else 1.0
