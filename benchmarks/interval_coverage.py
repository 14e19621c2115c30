"""Coverage of the intervals and error rates of the verdict, by simulation: prints one JSON line per setting.

Each question has a rate drawn from a beta distribution with a given mean and within-question correlation; each answer
is a draw with its question's rate. `--runs 1000` takes about three minutes; `results/interval_coverage.jsonl` is its output.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math

import numpy as np

from emguard_plugin.evaluation.statistics.intervals import clustered_interval, stratified_interval
from emguard_plugin.evaluation.statistics.verdict import decide


def question_rates(rng: np.random.Generator, mean: float, correlation: float, questions: int) -> np.ndarray:
    """Draw the rate of each question; a beta distribution of this mean and intra-class correlation."""
    if correlation == 0:
        return np.full(questions, mean)
    scale = (1 - correlation) / correlation
    return rng.beta(mean * scale, (1 - mean) * scale, questions)


def simulate(mean: float, correlation: float, questions: int, answers: int, runs: int, seed: int = 0) -> dict:
    """Return the shares of runs in which an interval misses on either side, and in which a verdict is wrong.

    The truth is `mean` for questions like these, and the mean of the drawn rates for these questions. The verdict is
    asked with `fail_above` equal to the truth, where both `pass` and `fail` are wrong: its hardest case.
    """
    rng = np.random.default_rng(seed)
    n, missed = np.full(questions, answers), np.zeros((2, 2))
    verdicts = dict.fromkeys(("pass", "fail", "inconclusive"), 0)
    for _ in range(runs):
        rates = question_rates(rng, mean, correlation, questions)
        count = rng.binomial(answers, rates)
        pairs = ((stratified_interval(count, n), rates.mean()), (clustered_interval(count, n), mean))
        for row, ((low, high), truth) in enumerate(pairs):
            missed[row] += (high < truth, low > truth)
        verdicts[decide(count, n, np.zeros(questions, int), mean).outcome] += 1
    (these_low, these_high), (like_low, like_high) = missed / runs
    return {
        "these": {"too_low": these_low, "too_high": these_high},
        "like_these": {"too_low": like_low, "too_high": like_high},
        "wrong_pass": verdicts["pass"] / runs,
        "wrong_fail": verdicts["fail"] / runs,
        "standard_error_at_nominal": math.sqrt(0.025 * 0.975 / runs),
    }


def main() -> None:
    """Print one line per setting."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=1000)
    for mean, correlation, (questions, answers) in itertools.product(
        (0.01, 0.02, 0.1, 0.3), (0.0, 0.1, 0.2, 0.3), ((8, 50), (20, 50), (40, 50), (60, 20), (100, 4))
    ):
        setting = {"mean": mean, "correlation": correlation, "questions": questions, "answers": answers}
        print(json.dumps({**setting, **simulate(**setting, runs=parser.parse_args().runs)}), flush=True)


if __name__ == "__main__":
    main()
