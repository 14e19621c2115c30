"""Answers and judgments of one search, as they lie in its work folder: tied to it, and each with a checksum of itself.

A record that was copied from another folder, or changed since it was written, is left out, counted, and computed again.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NotRequired

from pydantic import ConfigDict
from typing_extensions import TypedDict

from emguard_plugin.evaluation.asking.pair import ROLES
from emguard_plugin.evaluation.judges.base import FINAL, UNSCORED, Judgment, contradiction
from emguard_plugin.files import EXACT, read_records, seal_of
from emguard_plugin.files.result_folder import JsonLines

logger = logging.getLogger(__name__)

WHOLE = ConfigDict(**EXACT, extra="allow")
"""The seal is over all that stands in a record, also what a sampler adds, such as a reasoning trace."""


class AnswerRow(TypedDict):
    """A line of `responses.jsonl`."""

    __pydantic_config__ = WHOLE  # type: ignore[misc]  # as pydantic documents it

    role: str
    steer: str
    alpha: float
    prompt: int
    text: str
    tokens: int
    finish: str
    run: NotRequired[str]
    seal: NotRequired[str]


class VerdictRow(TypedDict):
    """A line of `judgments.jsonl`."""

    __pydantic_config__ = WHOLE  # type: ignore[misc]  # as pydantic documents it

    judge: str
    item_sha256: str
    aligned: float | None
    coherent: float | None
    status: str
    detail: str
    run: NotRequired[str]
    seal: NotRequired[str]


def run_id(protocol: Mapping[str, Any]) -> str:
    """Return the name of a search: the hash of what its answers and judgments depend on."""
    return hashlib.sha256(json.dumps(protocol, sort_keys=True).encode()).hexdigest()[:32]


class SearchFiles:
    """The two files.

    Args:
        folder: The work folder of one block.
        run: From `run_id`.
    """

    def __init__(self, folder: Path, run: str) -> None:
        self.run = run
        self._answers, self._verdicts = folder / "responses.jsonl", folder / "judgments.jsonl"

    def answers(self, prompts: int) -> list[AnswerRow]:
        """Return the answers of this search.

        Args:
            prompts: How many prompts it has.

        Raises:
            ValueError: If a line is no answer.
        """
        rows = self._own(self._answers, AnswerRow)
        return [row for row in rows if row["role"] in ROLES and 0 <= row["prompt"] < prompts]

    def verdicts(self, judge: str) -> list[VerdictRow]:
        """Return the final judgments by one judge; what is no score is left out.

        Raises:
            ValueError: If a line is no judgment.
        """
        rows = self._own(self._verdicts, VerdictRow)
        return [row for row in rows if row["judge"] == judge and checked(row)["status"] in FINAL]

    def add_answers(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Store answers."""
        JsonLines(self._answers).append(self._sealed(row) for row in rows)

    def add_verdicts(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Store judgments."""
        JsonLines(self._verdicts).append(self._sealed(row) for row in rows)

    def _sealed(self, row: Mapping[str, Any]) -> dict[str, Any]:
        whole = {**row, "run": self.run}
        return {**whole, "seal": seal_of(whole)}

    def _own(self, path: Path, shape: Any) -> list[Any]:
        kept: list[Any] = []
        left: Counter[str] = Counter()
        for row in read_records(path, shape):
            if row.get("run") != self.run:
                left["of another search"] += 1
            elif row.get("seal") != seal_of(row):
                left["changed since they were written"] += 1
            else:
                kept.append(row)
        if left:
            parts = ", ".join(f"{count} {reason}" for reason, count in left.items())
            logger.warning("emguard discover: %s: %s; they are left out and computed again.", path, parts)
        return kept


def checked(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a judgment whose scores are scores: within 0 to 100, of the type that they must be; else an unscored one."""
    wrong = contradiction(Judgment(row["aligned"], row["coherent"], row["status"], row["detail"]))
    return {**row, "aligned": None, "coherent": None, "status": UNSCORED, "detail": wrong} if wrong else dict(row)
