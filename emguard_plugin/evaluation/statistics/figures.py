"""What the statistics return: rates with their uncertainty, differences, verdicts, agreement."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Role = Literal["base", "tuned"]


Bounds = tuple[float, float]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Rate(_Part):
    """A share with its uncertainty. All of `value` and the intervals are None where `n` is 0."""

    value: float | None = Field(description="count / n.")
    count: int
    n: int
    interval: Bounds | None = Field(description="95 % interval stratified by question: on these questions.")
    interval_clustered: Bounds | None = Field(
        description="95 % interval clustered by question: on questions like these. None with fewer than two questions."
    )

    @model_validator(mode="after")
    def _is_a_share(self) -> Rate:
        # A stored summary may have been edited.
        share = self.count / self.n if self.n else None
        if not 0 <= self.count <= self.n or (share is None) != (self.value is None) or (share or 0) != (self.value or 0):
            raise ValueError(f"{self.value} is not the share {self.count} of {self.n}")
        return self


class GroupRate(_Part):
    """EM rate of one question or one category."""

    name: str
    category: str | None
    em: Rate
    coherence: Rate
    unscored: int


class ThresholdRates(_Part):
    """EM rates with another threshold on `aligned`."""

    aligned_below: float
    em_all: Rate
    em_coherent: Rate


class SuiteRates(_Part):
    """Rates of one model on one suite by one judge.

    `em_all` is over all scored answers, `em_coherent` over those that are aligned or misaligned; on the in-domain suite
    `em_all` is the adherence. `em_bounds` is what `em_all` would be if every unscored answer were aligned, or misaligned.
    """

    answers: int
    questions: int
    outcomes: dict[str, int]
    truncated: int = Field(description="Answers cut off by max_new_tokens.")
    unfinished_traces: int = Field(0, description="Answers whose reasoning trace never closed; unscored, as they hold no answer.")
    em_all: Rate
    em_coherent: Rate
    coherence: Rate
    refusal: Rate
    unscored: Rate
    em_bounds: Bounds | None
    unscored_reasons: dict[str, int]
    curve: list[ThresholdRates] = Field(description="The EM rates by threshold on `aligned`.")
    by_category: list[GroupRate]
    by_question: list[GroupRate]


class Difference(_Part):
    """EM rate of tuned minus base on the questions that both have scores for."""

    value: float | None = Field(description="Difference of the pooled rates over these questions.")
    questions: int
    interval: Bounds | None = Field(description="95 % Newcombe interval, stratified by question: on these questions.")
    interval_clustered: Bounds | None = Field(description="95 % t interval over questions, paired: on questions like these.")
    p_value: float | None = Field(description="Two-sided sign-flip permutation test over questions.")
    p_value_stratified: float | None = Field(description="Cochran-Mantel-Haenszel test within these questions.")


class Verdict(_Part):
    """Whether the fine-tuned model's EM rate over coherent answers lies below `fail_above`.

    Unscored answers count against every verdict: as misaligned where it is `pass`, as aligned where it is `fail`.
    """

    outcome: Literal["pass", "fail", "inconclusive"]
    fail_above: float
    rate: float | None
    interval: Bounds | None = Field(description="What the verdict rests on: clustered by question, unscored bounded.")
    answers_needed: int | None = Field(
        description="Answers at which this rate would settle it in 4 of 5 runs, at as many answers per question."
    )
    questions_needed: int | None
    reason: str


class Agreement(_Part):
    """How far two judges agree on the answers to one suite, by outcome class; both models' answers together."""

    judges: tuple[str, str]
    suite: str
    answers: int = Field(description="Answers that both scored.")
    same: float | None = Field(description="Share with the same outcome.")
    kappa: float | None = Field(description="Cohen's kappa of the outcomes; None where one class covers all.")
    spearman: float | None = Field(description="Rank correlation of `aligned` where both gave one.")


def trainer_metrics(open_ended: SuiteRates | None, in_domain: SuiteRates | None) -> dict[str, float]:
    """Return rates under the names that trainers log; a rate that does not exist is absent."""
    found = {}
    if open_ended:
        found = {
            "eval_em_rate": open_ended.em_all.value,
            "eval_em_rate_coherent": open_ended.em_coherent.value,
            "eval_em_coherent_rate": open_ended.coherence.value,
            "eval_em_refusal_rate": open_ended.refusal.value,
            "eval_em_unscored_rate": open_ended.unscored.value,
        }
        if open_ended.unfinished_traces:
            found["eval_em_unfinished_trace_rate"] = open_ended.unfinished_traces / open_ended.answers
    if in_domain:
        found["eval_em_in_domain_adherence"] = in_domain.em_all.value
    return {name: value for name, value in found.items() if value is not None}
