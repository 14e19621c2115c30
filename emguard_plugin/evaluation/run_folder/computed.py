"""All that is computed of scored answers, kept beside them: a folder in which nothing has changed is shown without the statistics.

Their libraries take longer to load than all else that a finished evaluation does.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import astuple
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from emguard_plugin.evaluation import statistics
from emguard_plugin.evaluation.judges import outcomes
from emguard_plugin.evaluation.run_folder.summary import JudgeResult
from emguard_plugin.evaluation.statistics.agreement import agreement, fleiss
from emguard_plugin.evaluation.statistics.figures import Agreement
from emguard_plugin.evaluation.statistics.rates import Scored, difference, suite_rates
from emguard_plugin.evaluation.statistics.verdict import verdict
from emguard_plugin.files import parsed, read_json, seal_of
from emguard_plugin.files.versions import versions
from emguard_plugin.files.writing import write_text

KEPT = ".figures.json"
PACKAGES = ("numpy", "scipy", "statsmodels")
ByJudge = Mapping[str, dict[str, dict[str, list[Scored]]]]
"""Scored answers by judge, role and suite."""


class Figures(BaseModel):
    """What a summary says of scored answers."""

    model_config = ConfigDict(extra="forbid")

    judges: list[JudgeResult]
    agreement: list[Agreement]
    fleiss_kappa: float | None


def figures_of(
    folder: Path, by_judge: ByJudge, measured: Mapping[str, bool], stopped: Mapping[str, str | None], fail_above: float | None
) -> Figures:
    """Compute the figures, or take those that the folder keeps of these very answers, computed by this very code.

    Args:
        folder: The run folder.
        by_judge: The scored answers.
        measured: By judge, whether its numbers mean anything.
        stopped: By judge, why it left answers unjudged.
        fail_above: `em_eval.fail_above`.

    Returns:
        What the summary says of them.
    """
    scored = {
        judge: {role: {suite: [astuple(one) for one in answers] for suite, answers in by.items()} for role, by in roles.items()}
        for judge, roles in by_judge.items()
    }
    made_of = [scored, measured, stopped, fail_above, _code(), versions(PACKAGES)]
    key = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()  # the order of the judges counts
    if (kept := _kept(folder / KEPT, key)) is not None:
        return kept
    found = _computed(by_judge, measured, stopped, fail_above)
    said = {"key": key, "figures": json.loads(found.model_dump_json())}
    write_text(folder / KEPT, json.dumps({**said, "seal": seal_of(said)}) + "\n")
    return found


def _kept(path: Path, key: str) -> Figures | None:
    if not path.is_file():
        return None
    try:
        said = read_json(path)
        if not isinstance(said, dict) or said.pop("seal", None) != seal_of(said) or said.get("key") != key:
            return None
        return parsed(said["figures"], Figures, str(path))
    except (ValueError, KeyError):
        return None


def _computed(by_judge: ByJudge, measured: Mapping[str, bool], stopped: Mapping[str, str | None], fail_above: float | None) -> Figures:
    results = []
    for name, scored in by_judge.items():
        differences = {}
        if "base" in scored:
            differences = {suite: difference(scored["base"][suite], answers) for suite, answers in scored["tuned"].items()}
        decided = None if fail_above is None else verdict(scored["tuned"]["questions"], fail_above)
        if decided and not measured[name]:
            decided = decided.model_copy(update={"outcome": "inconclusive", "reason": f"{name}: no measurement"})
        rates = {role: {suite: suite_rates(answers) for suite, answers in by.items()} for role, by in scored.items()}
        results.append(
            JudgeResult.model_validate(
                {
                    "name": name,
                    "rates": rates,
                    "differences": differences,
                    "verdict": decided,
                    "measured": measured[name],
                    "stopped": stopped[name],
                }
            )
        )
    suites = list(dict.fromkeys(suite for scored in by_judge.values() for by in scored.values() for suite in by))
    pooled = {suite: {name: [a for by in scored.values() for a in by[suite]] for name, scored in by_judge.items()} for suite in suites}
    return Figures(
        judges=results,
        agreement=[pair for suite, answers in pooled.items() for pair in agreement(answers, suite)],
        fleiss_kappa=fleiss(pooled["questions"]),
    )


def _code() -> str:
    """Return the hash of the statistics' source: a corrected formula is computed anew under the same version."""
    files = [*sorted(Path(str(statistics.__file__)).parent.glob("*.py")), Path(outcomes.__file__)]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
