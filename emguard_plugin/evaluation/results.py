"""From the two files of a run to its summary."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from emguard_plugin.evaluation.agreement import agreement, fleiss
from emguard_plugin.evaluation.exports import write_exports
from emguard_plugin.evaluation.judging import found_out
from emguard_plugin.evaluation.plan import Plan
from emguard_plugin.evaluation.rates import Scored, difference, suite_rates
from emguard_plugin.evaluation.reasoning import UNFINISHED, judged_text, reads_of
from emguard_plugin.evaluation.sampler import AnswerKey
from emguard_plugin.evaluation.summary import JudgeResult, NotAsked, Summary
from emguard_plugin.evaluation.verdict import verdict

logger = logging.getLogger(__name__)


def report(plan: Plan, stored: dict[str, Any]) -> Summary:
    """Compute the rates from the two files and write `summary.json`, the report and the exports.

    Args:
        plan: What was measured.
        stored: What `protocol.json` holds.
    """
    from emguard_plugin.evaluation.report import write_report

    results, by_judge, known = [], {}, found_out(plan)
    # Which mode a judge was read in is part of the protocol, and known only once it has been probed.
    protocol = {
        **stored["protocol"],
        "judges": [
            {**identity, **({"found": found} if (found := known.get(entry.name, {}).get("found")) else {})}
            for identity, entry in zip(stored["protocol"]["judges"], plan.judges, strict=True)
        ],
        "judged": {entry.name: reads_of(entry) for entry in plan.judges},
    }
    for entry in plan.judges:
        scored = by_judge[entry.name] = scored_answers(plan, entry.name)
        rates = {role: {name: suite_rates(answers) for name, answers in by.items()} for role, by in scored.items()}
        differences = {}
        if "base" in scored:
            differences = {name: difference(scored["base"][name], scored["tuned"][name]) for name in plan.suites}
        gate = plan.config.fail_above
        decided = None if gate is None else verdict(scored["tuned"]["questions"], gate)
        measured = not entry.identity().get("not_a_measurement", False)
        if decided and not measured:
            decided = decided.model_copy(update={"outcome": "inconclusive", "reason": f"{entry.name}: no measurement"})
        results.append(
            JudgeResult(
                name=entry.name,
                rates=rates,
                differences=differences,
                verdict=decided,
                measured=measured,
                stopped=known.get(entry.name, {}).get("stopped"),
            )
        )
    pooled = {
        suite: {name: [a for by in scored.values() for a in by[suite]] for name, scored in by_judge.items()}
        for suite in plan.suites
    }
    summary = Summary(
        created=stored["created"],
        versions=stored["versions"],
        fingerprint=hashlib.sha256(json.dumps(protocol, sort_keys=True).encode()).hexdigest(),
        protocol=protocol,
        example_prompt=stored["example_prompt"],
        not_asked=[NotAsked(**asdict(one)) for one in plan.asking.not_asked],
        models=stored["models"],
        sources={
            name: source if "://" in source else Path(source).name for name, source in plan.config.suites().items()
        },
        judges=results,
        agreement=[pair for suite, answers in pooled.items() for pair in agreement(answers, suite)],
        fleiss_kappa=fleiss(pooled["questions"]),
        folder=plan.folder,
    )
    summary.save(plan.folder / "summary.json")
    write_report(summary, plan.folder / "report.html")
    write_exports(summary, plan.folder)
    for result in results:
        rates = result.rates["tuned"]["questions"]
        if rates.em_all.n == 0:
            logger.warning(
                "em_eval: %s scored no answer, so there is no EM rate: %s", result.name, rates.unscored_reasons
            )
    return summary


def scored_answers(plan: Plan, judge_name: str) -> dict[str, dict[str, list[Scored]]]:
    """Return the judged answers by role and suite, in the order of the suites; an answer never judged is unscored."""
    responses = {(row["role"], answer_key(row)): row for row in plan.responses.read()}
    # A later record replaces an earlier one: an unscored answer may have been judged again.
    judgments = {(row["role"], answer_key(row)): row for row in plan.judgments.read() if row["judge"] == judge_name}
    stopped = found_out(plan).get(judge_name, {}).get("stopped")
    unjudged = f"not judged: {stopped}" if stopped else "not judged"
    found: dict[str, dict[str, list[Scored]]] = {role: {name: [] for name in plan.suites} for role in plan.roles}
    for role in plan.roles:
        for request in plan.requests():
            answer, judgment = responses.get((role, request.key)), judgments.get((role, request.key))
            unfinished = answer is not None and judged_text(answer) is None
            judgment = None if unfinished else judgment
            found[role][request.suite].append(
                Scored(
                    question=request.question.id,
                    category=request.question.category,
                    aligned=judgment["aligned"] if judgment else None,
                    coherent=judgment["coherent"] if judgment else None,
                    reason=_reason(judgment, answer, UNFINISHED if unfinished else unjudged),
                    truncated=bool(answer) and answer["finish"] == "length",
                    status=judgment["status"] if judgment else "unscored",
                )
            )
    return found


def _reason(judgment: dict[str, Any] | None, answer: dict[str, Any] | None, unjudged: str) -> str:
    if judgment:
        return judgment["detail"]
    return unjudged if answer else "no answer was generated"


def answer_key(row: dict[str, Any]) -> AnswerKey:
    """Return which answer a row of either file is about."""
    return AnswerKey(row["suite"], row["question"], row["paraphrase"], row["draw"])
