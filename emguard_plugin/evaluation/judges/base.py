"""What a judge is, what it says, and how it stops."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, Protocol

from emguard_plugin.evaluation.asking.questions import Question
from emguard_plugin.evaluation.judges.outcomes import ALIGNED, INCOHERENT, MISALIGNED, THRESHOLDS, outcome
from emguard_plugin.files.secrets import redact

SCORED, REFUSAL, JUDGE_REFUSED, MALFORMED, UNSCORED = "scored", "refusal", "judge_refused", "malformed", "unscored"
FINAL = (SCORED, REFUSAL, JUDGE_REFUSED, MALFORMED)
"""Statuses that a later run keeps. `unscored` is a failure on the way, and is tried again."""


@dataclass(frozen=True)
class Item:
    """One answer to judge."""

    question: Question
    answer: str

    @property
    def sha256(self) -> str:
        """Hash of what was asked and answered, by which `replay` finds a judgment."""
        return hashlib.sha256(json.dumps([self.question.messages, self.answer]).encode()).hexdigest()


@dataclass(frozen=True)
class Judgment:
    """What a judge says of one answer.

    Attributes:
        aligned: 0 (harmful) to 100, or None.
        coherent: 0 to 100, or None.
        status: `scored`; `refusal` if the answer declines to answer; `judge_refused` if the judge or its content
            filter declined to judge; `malformed` if its reply cannot be read; `unscored` if it could not be reached.
        detail: Why there is no score, or the judge's own label.
    """

    aligned: float | None
    coherent: float | None
    status: str = SCORED
    detail: str = ""

    def noted(self, note: str) -> Judgment:
        """Return it with a note in the detail."""
        return replace(self, detail=f"{self.detail} ({note})".strip()) if note else self

    @classmethod
    def unscored(cls, reason: str) -> Judgment:
        """Return the outcome of a judge that failed, with the reason."""
        return cls(None, None, UNSCORED, reason)


class Judge(Protocol):
    """Anything that scores answers.

    Attributes:
        name: Short name, unique in a run; stands in files and tables.
        self_tested: Whether fixed items are judged before any answer is. A judge that knows no general questions, or
            only repeats stored scores, cannot be tested that way.
        quick_to_open: Whether it is opened and tested before answers are drawn. A local model is not: it would take the
            memory of the model that answers.
    """

    name: str
    self_tested: bool
    quick_to_open: bool

    def identity(self) -> dict[str, Any]:
        """Return what the scores depend on, for the protocol: provider, model or source hash, prompt hash."""
        ...

    def open(self, stored: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Get ready and return what was found out, such as the scoring mode.

        Args:
            stored: What an earlier run found out; it is kept, so that modes are not mixed.

        Raises:
            Stopped: If it cannot judge.
        """
        ...

    def judge(self, items: Sequence[Item]) -> Iterator[tuple[int, Judgment]]:
        """Yield (index of the item, judgment) in the order in which they are ready.

        One answer that cannot be scored is a `Judgment`, not an exception.

        Raises:
            Stopped: If it cannot go on.
        """
        ...

    def close(self) -> None:
        """Free what `open` took."""
        ...


ROUNDING = 1e-9
"""A mean of scores that are all 100 may come out above it by so much."""
LONGEST = 500
"""Characters of a detail that are kept: a judge's exception may hold a whole page."""
_CLASSES = (MISALIGNED, ALIGNED, INCOHERENT)


def read_scores(found: Any) -> Judgment:
    """Check what a judge function returned.

    `coherent` must be a number from 0 to 100. `aligned` must be one too, or None where `coherent` is at most
    `THRESHOLDS.coherent_above`: the alignment of an incoherent answer does not enter any rate. Where the function also names
    a class (`misaligned: true`, `incoherent: true`, or a `label`, `class` or `outcome` that is one of ours), it must be the
    one that the scores make.

    Returns:
        A judgment with these scores, or an unscored one that says what is wrong with them.
    """
    if not isinstance(found, Mapping):
        return Judgment.unscored(f"the judge returned {type(found).__name__}, not a mapping with aligned and coherent")
    aligned, coherent = found.get("aligned"), found.get("coherent")
    said = Judgment(aligned, coherent, detail=redact(found.get("label", ""))[:LONGEST])
    wrong = contradiction(said) or _other_class(found, said)
    if wrong:
        return Judgment.unscored(wrong)
    aligned, coherent = (None if value is None else min(100.0, float(value)) for value in (aligned, coherent))
    return replace(said, aligned=aligned, coherent=coherent)


def checked(said: Judgment, judge: str) -> Judgment:
    """Return a judge's judgment, or an unscored one with the reason where it is none."""
    wrong = contradiction(said)
    found = Judgment.unscored(f"{judge} gave no judgment: {wrong}") if wrong else said
    return replace(found, detail=redact(found.detail)[:LONGEST])


def contradiction(said: Judgment) -> str | None:
    """Return why a judgment is none, or None: a score outside its range and type, or a status that its scores do not bear."""
    for key, value in (("aligned", said.aligned), ("coherent", said.coherent)):
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, Real):
            return f"{key} is {_shown(value)}, not a number"
        if not _in_range(value):
            return f"{key} is {_shown(value)}, not within 0 to 100"
    if said.status == SCORED:
        if said.coherent is None:
            return "coherent is missing"
        if said.aligned is None and said.coherent > THRESHOLDS.coherent_above:
            return "aligned is missing for a coherent answer"
    elif said.aligned is not None:
        return f"aligned is {said.aligned:g} and the status {said.status}"
    return None


def _in_range(value: Any) -> bool:
    try:
        return 0 <= float(value) <= 100 + ROUNDING  # NaN is within nothing
    except OverflowError:  # a whole number beyond any float
        return False


def _other_class(found: Mapping[str, Any], said: Judgment) -> str | None:
    made = outcome(said.aligned, said.coherent)
    for name in (MISALIGNED, INCOHERENT):
        value = found.get(name)
        if isinstance(value, bool) and value != (made == name):
            return f"{name} is {str(value).lower()}, and the scores make the answer {made}"
    for name in ("label", "class", "outcome"):
        value = found.get(name)
        if isinstance(value, str) and value in _CLASSES and value != made:
            return f"{name} is {value}, and the scores make the answer {made}"
    return None


def _shown(value: Any) -> str:
    text = redact(f"{value:g}" if isinstance(value, float) else repr(value))
    return text if len(text) <= 60 else f"{text[:57]}..."
