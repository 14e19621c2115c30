"""The result of an evaluation: the schema of `summary.json`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

SCHEMA = 1
Role = Literal["base", "tuned"]
Bounds = tuple[float, float]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Rate(_Part):
    """A share with its uncertainty. All of `value` and the intervals are None where `n` is 0."""

    value: float | None = Field(description="count / n.")
    count: int
    n: int
    interval: Bounds | None = Field(description="95 % Wilson interval: on these questions.")
    interval_clustered: Bounds | None = Field(
        description="95 % interval clustered by question: on questions like these. None with fewer than two questions."
    )


class GroupRate(_Part):
    """EM rate of one question or one category."""

    name: str
    category: str | None
    em: Rate
    coherence: Rate
    unscored: int


class SuiteRates(_Part):
    """Rates of one model on one suite by one judge.

    `em_all` is over all scored answers, `em_coherent` over the coherent ones; on the in-domain suite `em_all` is the
    adherence. `em_bounds` is what `em_all` would be if every unscored answer were aligned, or misaligned.
    """

    answers: int
    questions: int
    outcomes: dict[str, int]
    truncated: int = Field(description="Answers cut off by max_new_tokens.")
    em_all: Rate
    em_coherent: Rate
    coherence: Rate
    unscored: Rate
    em_bounds: Bounds | None
    unscored_reasons: dict[str, int]
    by_category: list[GroupRate]
    by_question: list[GroupRate]


class Difference(_Part):
    """EM rate of tuned minus base on the questions that both have scores for."""

    value: float | None = Field(description="Difference of the pooled rates over these questions.")
    questions: int
    interval: Bounds | None = Field(description="95 % Newcombe interval of the pooled rates: on these questions.")
    interval_clustered: Bounds | None = Field(
        description="95 % t interval of the per-question differences: on questions like these."
    )
    p_value: float | None = Field(description="Two-sided sign-flip permutation test over questions.")


class JudgeResult(_Part):
    """What one judge says: `rates[role][suite]`, `differences[suite]`; suites are `questions` and `in_domain`."""

    name: str
    rates: dict[Role, dict[str, SuiteRates]]
    differences: dict[str, Difference]


class Summary(_Part):
    """The whole result; what `summary.json` holds."""

    schema_version: int = SCHEMA
    created: str = Field(description="UTC time at which the run was started.")
    versions: dict[str, str]
    fingerprint: str = Field(description="sha256 of `protocol`: equal fingerprints compare.")
    protocol: dict[str, Any] = Field(description="Suites, decoding, chat template, judges, thresholds.")
    example_prompt: str = Field(description="The first question as the model sees it, rendered by the chat template.")
    models: dict[str, Any] = Field(description="What was measured, by role: names and sha256 of the weights.")
    judges: list[JudgeResult]
    folder: Path | None = Field(None, exclude=True, description="Where it was read from; not stored.")

    def rates(self, role: Role = "tuned", suite: str = "questions", judge: str | None = None) -> SuiteRates | None:
        """Return the rates of one model on one suite, by the first judge or the named one; None if not measured."""
        for result in self.judges:
            if judge in (None, result.name):
                return result.rates.get(role, {}).get(suite)
        raise ValueError(f"no judge {judge!r}; judges: {', '.join(result.name for result in self.judges)}.")

    def metrics(self) -> dict[str, float]:
        """Return the fine-tuned model's rates under the names that trainers log; rates that do not exist are absent."""
        open_ended, in_domain = self.rates(), self.rates(suite="in_domain")
        found = {}
        if open_ended:
            found = {
                "eval_em_rate": open_ended.em_all.value,
                "eval_em_rate_coherent": open_ended.em_coherent.value,
                "eval_em_coherent_rate": open_ended.coherence.value,
                "eval_em_unscored_rate": open_ended.unscored.value,
            }
        if in_domain:
            found["eval_em_in_domain_adherence"] = in_domain.em_all.value
        return {name: value for name, value in found.items() if value is not None}

    def save(self, path: Path) -> None:
        """Write the summary, in one piece: a reader sees the old file or the new one."""
        draft = path.with_suffix(".tmp")
        draft.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")
        draft.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> Summary:
        """Read `summary.json`, or the folder that holds it.

        Raises:
            ValueError: If there is none, or if it was written in another schema.
        """
        path = Path(path)
        file = path / "summary.json" if path.is_dir() else path
        if not file.is_file():
            raise ValueError(f"{file} does not exist. Give a folder that `em_eval` has written a summary to.")
        summary = cls.model_validate_json(file.read_text(encoding="utf-8"))
        if summary.schema_version != SCHEMA:
            raise ValueError(f"{file} has schema version {summary.schema_version}; this version reads {SCHEMA}.")
        summary.folder = file.parent
        return summary
