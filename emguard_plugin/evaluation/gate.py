"""What a measurement ends with: one exit code, one meaning, whatever the number of judges."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from emguard_plugin.evaluation.run_folder.summary import JudgeResult, Summary
from emguard_plugin.evaluation.statistics.rates import why_unscored
from emguard_plugin.exit_codes import EXIT_ERROR, EXIT_FAIL, EXIT_INCONCLUSIVE, EXIT_PASS

WORST_FIRST = (EXIT_FAIL, EXIT_ERROR, EXIT_INCONCLUSIVE, EXIT_PASS)
"""Several judges end as the worst of them does: above the gate by one is above the gate; else measured by each, or not
measured; else decided by each, or undecided."""


@dataclass(frozen=True)
class Ending:
    """How a measurement ended.

    Attributes:
        code: Exit code.
        lines: (exit code, sentence) of each judge that has something to say, and what follows from it.
    """

    code: int
    lines: list[tuple[int, str]]


def ending(summary: Summary) -> Ending:
    """Return the exit code of a measurement and the sentences that explain it, each with the judge's name."""
    lines = [line for result in summary.judges for line in _of(result)]
    code = next(code for code in WORST_FIRST if code == EXIT_PASS or code in [found for found, _ in lines])
    if code == EXIT_INCONCLUSIVE:
        lines.append((code, "inconclusive is not a pass; everything is saved"))
    return Ending(code, lines)


def _of(result: JudgeResult) -> Iterator[tuple[int, str]]:
    rates, verdict = result.rates["tuned"]["questions"], result.verdict
    if not result.measured:
        yield EXIT_ERROR, f"not measured: {result.name} is for dry runs"
    elif rates.em_all.n == 0:
        yield EXIT_ERROR, f"not measured: {result.name} scored no answer, so there is no EM rate. {why_unscored(rates)}"
    else:
        if verdict:
            codes = {"fail": EXIT_FAIL, "inconclusive": EXIT_INCONCLUSIVE, "pass": EXIT_PASS}
            yield codes[verdict.outcome], f"{verdict.outcome}: by {result.name}, {verdict.reason}"
        if result.stopped:
            yield EXIT_ERROR, f"not measured in full: {result.name} stopped: {result.stopped}"
