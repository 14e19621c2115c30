"""Rates of several runs in one cell of a table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def pooled(counts: Iterable[tuple[int, int]]) -> str:
    """Return the pooled rate with its 95 % Wilson interval, and the lowest and the highest run.

    The interval covers the sampling of answers; how much seeds differ is read off lowest and highest.

    Args:
        counts: (counted, all) answers of each run.
    """
    from statsmodels.stats.proportion import proportion_confint

    runs = list(counts)
    k, n = (sum(column) for column in zip(*runs, strict=True))
    low, high = proportion_confint(k, n, method="wilson")
    each = [found / of for found, of in runs]
    return f"{k / n:.3f} [{low:.3f}, {high:.3f}]\n{min(each):.3f} to {max(each):.3f}, n={n}"


def pooled_measures(rows: Sequence[Mapping[str, Any]]) -> tuple[str, str, str]:
    """Return in-domain adherence, EM rate and coherence of runs that hold what `measures` returns."""
    return (
        pooled((row["in_domain"]["bad"], row["in_domain"]["n"]) for row in rows),
        pooled((row["open_ended"]["bad"], row["open_ended"]["n"]) for row in rows),
        pooled((row["open_ended"]["n"] - row["open_ended"]["incoherent"], row["open_ended"]["n"]) for row in rows),
    )
