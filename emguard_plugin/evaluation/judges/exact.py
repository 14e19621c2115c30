"""Judges: what turns a question and an answer into two scores. Unscored is an outcome of its own, never aligned."""

from __future__ import annotations

import hashlib
import importlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, Protocol

from emguard_plugin.config import JudgeConfig
from emguard_plugin.evaluation.questions import Question
from emguard_plugin.evaluation.rates import THRESHOLDS


@dataclass(frozen=True)
class Judgment:
    """What a judge says of one answer.

    Attributes:
        aligned: 0 (harmful) to 100, or None.
        coherent: 0 to 100, or None.
        status: `scored`, or `unscored` if the judge gave no valid scores.
        detail: Why it is unscored, or the judge's own label.
    """

    aligned: float | None
    coherent: float | None
    status: str = "scored"
    detail: str = ""

    @classmethod
    def unscored(cls, reason: str) -> Judgment:
        """Return the outcome of a judge that failed, with the reason."""
        return cls(None, None, "unscored", reason)


class Judge(Protocol):
    """Anything that scores answers."""

    @property
    def name(self) -> str:
        """Short name, unique in a run; stands in files and tables."""
        ...

    def identity(self) -> dict[str, Any]:
        """Return what the scores depend on, for the protocol: provider, model or source hash, mode, prompt hash."""
        ...

    def judge(self, question: Question, answer: str) -> Judgment:
        """Score one answer. A failure is `Judgment.unscored(reason)`, never an exception."""
        ...


class ExactJudge:
    """A Python function that decides without a model.

    Args:
        function: `package.module:function`, called as function(question_text, answer). It returns a mapping with
            `aligned` (0 to 100, or None for an incoherent answer), `coherent` (0 to 100) and optionally `label`.

    Raises:
        ValueError: If the function cannot be imported or called.
    """

    def __init__(self, function: str) -> None:
        self.name = function
        module_name, _, attribute = function.partition(":")
        hint = f"`em_eval.judges: function: {function}`"
        try:
            module = importlib.import_module(module_name)
        except Exception as error:
            raise ValueError(
                f"{hint}: importing {module_name} failed: {type(error).__name__}: {error}. Is it on the Python path?"
            ) from error
        self._function = getattr(module, attribute, None)
        if self._function is None:
            public = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
            raise ValueError(f"{hint}: {module_name} has no `{attribute}`. It has: {', '.join(public) or 'nothing'}.")
        if not callable(self._function):
            raise ValueError(f"{hint} is a {type(self._function).__name__}, not a function.")
        file = getattr(module, "__file__", None)
        self._source = hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else None

    def identity(self) -> dict[str, Any]:
        """Return provider, function and the sha256 of the module that defines it."""
        return {"provider": "exact", "function": self.name, "source_sha256": self._source}

    def judge(self, question: Question, answer: str) -> Judgment:
        """Score one answer."""
        try:
            found = self._function(question.text, answer)
        except Exception as error:
            return Judgment.unscored(f"{type(error).__name__}: {error}")
        return read_scores(found)


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


def build_judge(config: JudgeConfig) -> Judge:
    """Return the judge that one entry of `em_eval.judges` describes."""
    return ExactJudge(config.function)


def build_judges(configs: list[JudgeConfig]) -> list[Judge]:
    """Return all judges of a run.

    Raises:
        ValueError: If two have the same name: their scores could not be told apart.
    """
    judges = [build_judge(config) for config in configs]
    names = [judge.name for judge in judges]
    doubles = sorted({name for name in names if names.count(name) > 1})
    if doubles:
        raise ValueError(f"`em_eval.judges` lists {', '.join(doubles)} twice. Remove one.")
    return judges
