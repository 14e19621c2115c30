"""How far judges agree: the same answers by other judges give EM rates that differ by a factor of twenty."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np

from emguard_plugin.evaluation.judges.outcomes import OUTCOMES, UNSCORED
from emguard_plugin.evaluation.statistics.figures import Agreement
from emguard_plugin.evaluation.statistics.rates import Scored


def agreement(by_judge: Mapping[str, Sequence[Scored]], suite: str) -> list[Agreement]:
    """Compare each pair of judges.

    Args:
        by_judge: Per judge the same answers in the same order.
        suite: The suite that they answer.

    Returns:
        One record per pair, in the order of the judges; empty with fewer than two.
    """
    return [_pair(first, second, by_judge, suite) for first, second in combinations(by_judge, 2)]


def fleiss(by_judge: Mapping[str, Sequence[Scored]]) -> float | None:
    """Return Fleiss' kappa of three or more judges over the answers that all of them scored, else None."""
    from statsmodels.stats.inter_rater import fleiss_kappa

    rows = list(zip(*(_codes(answers) for answers in by_judge.values()), strict=True))
    counts = np.array([np.bincount(row, minlength=len(OUTCOMES)) for row in rows if _UNSCORED not in row])
    if len(by_judge) < 3 or not len(counts) or (counts.sum(0) > 0).sum() < 2:
        return None
    return float(fleiss_kappa(counts))


_UNSCORED = OUTCOMES.index(UNSCORED)


def _codes(answers: Sequence[Scored]) -> list[int]:
    return [OUTCOMES.index(answer.outcome) for answer in answers]


def _pair(first: str, second: str, by_judge: Mapping[str, Sequence[Scored]], suite: str) -> Agreement:
    from scipy import stats
    from statsmodels.stats.inter_rater import cohens_kappa

    codes = np.array([_codes(by_judge[first]), _codes(by_judge[second])])
    both = codes[:, (codes != _UNSCORED).all(0)]
    n = both.shape[1]
    table = np.zeros((len(OUTCOMES), len(OUTCOMES)))
    np.add.at(table, (both[0], both[1]), 1)
    # Kappa compares with the agreement that the margins give by chance; with one class that is all of it.
    varied = n > 0 and len(np.unique(both)) > 1
    scores = np.array(
        [
            (a.aligned, b.aligned)
            for a, b in zip(by_judge[first], by_judge[second], strict=True)
            if a.aligned is not None and b.aligned is not None
        ]
    )
    ranked = len(scores) > 2 and all(np.ptp(scores, axis=0) > 0)
    return Agreement(
        judges=(first, second),
        suite=suite,
        answers=n,
        same=float((both[0] == both[1]).mean()) if n else None,
        kappa=float(cohens_kappa(table, return_results=False)) if varied else None,
        spearman=float(stats.spearmanr(scores[:, 0], scores[:, 1]).statistic) if ranked else None,
    )
