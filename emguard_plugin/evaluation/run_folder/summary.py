"""The result of an evaluation: the schema of `summary.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from emguard_plugin.evaluation.statistics.figures import (
    Agreement,
    Difference,
    Role,
    SuiteRates,
    Verdict,
    _Part,
    trainer_metrics,
)
from emguard_plugin.files import parsed, read_record, seal_of
from emguard_plugin.files.result_folder import PROTOCOL, claimed
from emguard_plugin.files.writing import write_text

SCHEMA = 2


class NotAsked(_Part):
    """A wording that the chat template refuses; it stands in no count."""

    suite: str
    question: str
    paraphrase: int
    reason: str


class JudgeResult(_Part):
    """What one judge says: `rates[role][suite]`, `differences[suite]`; suites are `questions` and `in_domain`."""

    name: str
    rates: dict[Role, dict[str, SuiteRates]]
    differences: dict[str, Difference]
    verdict: Verdict | None = Field(None, description="Against `em_eval.fail_above`; None without one.")
    measured: bool = Field(True, description="False for the mock judge, whose numbers mean nothing.")
    stopped: str | None = Field(None, description="Why it left answers unjudged; None if it went through.")


class Summary(_Part):
    """The whole result; what `summary.json` holds."""

    schema_version: int = SCHEMA
    created: str = Field(description="UTC time at which the run was started.")
    versions: dict[str, str]
    fingerprint: str = Field(description="sha256 of `protocol`: equal fingerprints compare.")
    protocol: dict[str, Any] = Field(description="Suites, decoding, chat template, judges, thresholds.")
    example_prompt: str = Field(description="The first question as the model sees it, rendered by the chat template.")
    not_asked: list[NotAsked] = Field(default_factory=list, description="Wordings that the chat template refuses.")
    models: dict[str, Any] = Field(description="What was measured, by role: names and sha256 of the weights.")
    sources: dict[str, str] = Field(description="Where each suite came from: a name, a file or a pinned URL.")
    judges: list[JudgeResult] = Field(min_length=1)
    agreement: list[Agreement] = Field(default_factory=list, description="Each pair of judges.")
    fleiss_kappa: float | None = Field(None, description="Of all judges, three or more, on the open-ended questions.")
    set_aside: dict[str, int] = Field(
        default_factory=dict,
        description="How many judgments of these answers lie in the folder by judges that are not reported here.",
    )
    seal: str | None = Field(None, exclude=True, description="Checksum of all the rest, in the file alone.")
    folder: Path | None = Field(None, exclude=True, description="Where it was read from; not stored.")

    def rates(self, role: Role = "tuned", suite: str = "questions", judge: str | None = None) -> SuiteRates | None:
        """Return the rates of one model on one suite, by the named judge; None if not measured.

        Without a name it is the first judge of `em_eval.judges`, whose name stands in `judges[0].name`.

        Raises:
            ValueError: If there is no such judge.
        """
        for result in self.judges:
            if judge in (None, result.name):
                return result.rates.get(role, {}).get(suite)
        raise ValueError(f"no judge {judge!r}; judges: {', '.join(result.name for result in self.judges)}.")

    def verdict(self) -> Literal["pass", "fail", "inconclusive"] | None:
        """Return the verdict of all judges together: `fail` if one says so, `pass` only if all do, None if not asked."""
        found = {result.verdict.outcome for result in self.judges if result.verdict}
        if not found:
            return None
        return "fail" if "fail" in found else "pass" if found == {"pass"} else "inconclusive"

    def metrics(self, judge: str | None = None) -> dict[str, float]:
        """Return the fine-tuned model's rates under the names that trainers log; rates that do not exist are absent.

        Args:
            judge: Name of the judge; default is the first of `em_eval.judges`.
        """
        result = next((found for found in self.judges if judge in (None, found.name)), None)
        if result is None or not result.measured:
            return {}
        return trainer_metrics(*(self.rates(suite=suite, judge=result.name) for suite in ("questions", "in_domain")))

    def save(self, path: Path) -> None:
        """Write the summary, in one piece: a reader sees the old file or the new one."""
        # Left out where it is empty, so that earlier versions read the file.
        unsaid = set() if self.set_aside else {"set_aside"}
        said = json.loads(self.model_dump_json(exclude=unsaid))
        write_text(path, json.dumps({**said, "seal": seal_of(said)}, indent=1, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Summary:
        """Read `summary.json`, or the folder that holds it.

        Returns:
            The summary, with the folder that it lies in.

        Raises:
            ValueError: If there is none, if it is damaged, or of another run than what lies beside it.
        """
        path = Path(path)
        file = path / "summary.json" if path.is_dir() else path
        if not file.is_file():
            raise ValueError(f"{file} does not exist. Give a folder that `em_eval` has written a summary to.")
        said = read_record(file, dict[str, Any])
        if said.pop("seal", None) not in (None, seal_of(said)):
            raise ValueError(f"{file} was changed since it was written. `emguard eval --phase report` makes it again.")
        summary = parsed(said, cls, str(file))
        if summary.schema_version != SCHEMA:
            raise ValueError(f"{file} has schema version {summary.schema_version}; this version reads {SCHEMA}.")
        summary.folder = file.parent
        _check_beside(summary, file)
        return summary


def _check_beside(summary: Summary, file: Path) -> None:
    """Refuse a summary that was copied into the folder of another run: it would be taken for that of the model there."""
    if not (file.parent / PROTOCOL).is_file():
        return
    stored = claimed(file.parent)
    if (stored.get("created"), stored.get("models")) != (summary.created, summary.models):
        raise ValueError(
            f"{file} is of another run than the answers beside it, which {PROTOCOL} says were drawn at {stored.get('created')}. "
            "`emguard eval --phase report` makes it again."
        )
