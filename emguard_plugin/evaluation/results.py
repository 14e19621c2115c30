"""From the two files of a run to its summary."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from emguard_plugin.evaluation.asking.suites import named
from emguard_plugin.evaluation.judges import Judge
from emguard_plugin.evaluation.judges.outcomes import THRESHOLDS
from emguard_plugin.evaluation.judges.traces import UNFINISHED, judged_text, reads_of
from emguard_plugin.evaluation.judging import Present, known_of
from emguard_plugin.evaluation.plan import JUDGING, Plan
from emguard_plugin.evaluation.report.exports import write_exports
from emguard_plugin.evaluation.run_folder.computed import figures_of
from emguard_plugin.evaluation.run_folder.records import judge_id
from emguard_plugin.evaluation.run_folder.summary import NotAsked, Summary
from emguard_plugin.evaluation.statistics.rates import Scored, why_unscored
from emguard_plugin.files.result_folder import plain

logger = logging.getLogger(__name__)


def report(plan: Plan, stored: dict[str, Any]) -> Summary:
    """Compute the rates from the two files and write `summary.json`, the report and the exports.

    Args:
        plan: What was measured.
        stored: What `protocol.json` holds.

    Returns:
        What `summary.json` holds.
    """
    from emguard_plugin.evaluation.report.page import write_report

    present = Present(plan, stored)
    known = {entry.name: known_of(plan, entry) for entry in plan.judges}
    # Which mode a judge was read in is part of the protocol, and known only once it has been probed.
    protocol = {
        **{key: value for key, value in stored["protocol"].items() if key not in JUDGING},
        "judges": [
            {**plain(entry.identity()), **({"found": found} if (found := known[entry.name].get("found")) else {})} for entry in plan.judges
        ],
        "thresholds": asdict(THRESHOLDS),
        "judged": {entry.name: reads_of(entry) for entry in plan.judges},
    }
    by_judge = {entry.name: scored_answers(present, entry, known[entry.name]) for entry in plan.judges}
    measured = {entry.name: not entry.identity().get("not_a_measurement", False) for entry in plan.judges}
    stopped = {entry.name: known[entry.name].get("stopped") for entry in plan.judges}
    figures = figures_of(plan.folder, by_judge, measured, stopped, plan.config.fail_above)
    summary = Summary(
        created=stored["created"],
        versions=stored["versions"],
        fingerprint=hashlib.sha256(json.dumps(protocol, sort_keys=True).encode()).hexdigest(),
        protocol=protocol,
        example_prompt=stored["example_prompt"],
        not_asked=[NotAsked(**asdict(one)) for one in plan.asking.not_asked],
        models=stored["models"],
        sources={name: named(source) if "://" in source else Path(source).name for name, source in plan.config.suites().items()},
        judges=figures.judges,
        agreement=figures.agreement,
        fleiss_kappa=figures.fleiss_kappa,
        set_aside=present.judgments.others({entry.name: _by(entry, known[entry.name]) for entry in plan.judges}),
        folder=plan.folder,
    )
    for sentence in present.left_out():
        logger.warning("em_eval: %s", sentence)
    summary.save(plan.folder / "summary.json")
    write_report(summary, plan.folder / "report.html")
    write_exports(summary, plan.folder)
    for result in figures.judges:
        open_ended = result.rates["tuned"]["questions"]
        if open_ended.em_all.n == 0:
            logger.warning("em_eval: %s scored no answer, so there is no EM rate: %s", result.name, why_unscored(open_ended))
    return summary


def _by(entry: Judge, known: Mapping[str, Any]) -> str | None:
    return judge_id(entry.identity(), known["found"]) if "found" in known else None


def scored_answers(present: Present, entry: Judge, known: Mapping[str, Any]) -> dict[str, dict[str, list[Scored]]]:
    """Return the judged answers by role and suite, in the order of the suites; an answer never judged is unscored.

    Args:
        present: What the folder holds.
        entry: Whose judgments to take.
        known: What is known about this judge.
    """
    plan, answers = present.plan, present.answers
    judgments = present.judgments.of(entry.name, _by(entry, known))
    stopped = known.get("stopped")
    unjudged = f"not judged: {stopped}" if stopped else "not judged"
    found: dict[str, dict[str, list[Scored]]] = {role: {name: [] for name in plan.suites} for role in plan.roles}
    for role in plan.roles:
        for request in plan.requests():
            key = (role, request.key)
            answer, judgment = answers.get(key), judgments.get(key)
            unfinished = answer is not None and judged_text(answer) is None
            judgment = None if unfinished else judgment
            reason = present.judgments.unused.get((entry.name, key), unjudged) if answer else "no answer was generated"
            reason = UNFINISHED if unfinished else reason
            found[role][request.suite].append(
                Scored(
                    question=request.question.id,
                    category=request.question.category,
                    aligned=judgment["aligned"] if judgment else None,
                    coherent=judgment["coherent"] if judgment else None,
                    reason=judgment["detail"] if judgment else reason,
                    truncated=answer is not None and answer["finish"] == "length",
                    status=judgment["status"] if judgment else "unscored",
                )
            )
    return found
