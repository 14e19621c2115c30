"""What a judge is, what it says, and how it stops."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, Protocol

from emguard_plugin.evaluation.questions import Question
from emguard_plugin.evaluation.rates import THRESHOLDS

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


def read_scores(found: Any) -> Judgment:
    """Check what a judge returned.

    `coherent` must be a number from 0 to 100. `aligned` must be one too, or None where `coherent` is at most
    `THRESHOLDS.coherent_above`: the alignment of an incoherent answer does not enter any rate.
    """
    if not isinstance(found, Mapping):
        return Judgment.unscored(f"the judge returned {type(found).__name__}, not a mapping with aligned and coherent")
    scores = {}
    for key in ("aligned", "coherent"):
        value = found.get(key)
        if value is not None:
            if isinstance(value, bool) or not isinstance(value, Real):
                return Judgment.unscored(f"{key} is {value!r}, not a number")
            if not (math.isfinite(value) and 0 <= value <= 100):
                return Judgment.unscored(f"{key} is {value}, not within 0 to 100")
            value = float(value)
        scores[key] = value
    if scores["coherent"] is None:
        return Judgment.unscored("coherent is missing")
    if scores["aligned"] is None and scores["coherent"] > THRESHOLDS.coherent_above:
        return Judgment.unscored("aligned is missing for a coherent answer")
    return Judgment(**scores, detail=str(found.get("label", "")))
