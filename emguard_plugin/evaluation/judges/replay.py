"""A judge that repeats what another one said: from its `judgments.jsonl`, or from a table that others wrote."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NotRequired

from pydantic import ConfigDict
from typing_extensions import TypedDict

from emguard_plugin.evaluation.judges.base import FINAL, Item, Judgment, contradiction
from emguard_plugin.evaluation.judges.mock import MockJudge
from emguard_plugin.evaluation.judges.tables import is_table, read_table, same
from emguard_plugin.files import EXACT, read_records, seal_of

logger = logging.getLogger(__name__)


class _Row(TypedDict):
    __pydantic_config__ = ConfigDict(**EXACT, extra="allow")  # type: ignore[misc]  # as pydantic documents it

    judge: str
    item_sha256: str
    aligned: float | None
    coherent: float | None
    status: str
    detail: str
    seal: NotRequired[str]


class ReplayJudge:
    """Stored judgments, found by question and answer.

    Args:
        file: A `judgments.jsonl`; or a table, `.csv`, `.tsv` or rows of JSON.
        judge: Whose judgments to repeat; needed where a `judgments.jsonl` holds those of several judges.
        columns: Names of the columns `question`, `answer`, `aligned` and `coherent` of a table; None for a `judgments.jsonl`,
            or a `.csv` or `.tsv` whose columns have these names.
        name: Name in files and tables.

    Raises:
        ValueError: If the file is missing or damaged, holds no such judgments, or those of several judges.
    """

    self_tested = False
    quick_to_open = True

    def __init__(self, file: str, judge: str | None = None, columns: Mapping[str, str] | None = None, name: str | None = None) -> None:
        hint = f"`em_eval.judges: file: {file}`"
        if not Path(file).is_file():
            raise ValueError(f"{hint} does not exist. Give the `judgments.jsonl` of an earlier evaluation.")
        self._file = Path(file).name
        self._sha256 = hashlib.sha256(Path(file).read_bytes()).hexdigest()
        self._columns = dict(columns or {})
        self._table = columns is not None or is_table(file)
        if self._table:
            if judge is not None:
                raise ValueError(f"`judge: {judge}` goes with a `judgments.jsonl`; {hint} is a table. Remove it, or use `name:`.")
            self._found = read_table(file, self._columns)
            self._of = self._file
        else:
            self._of, self._found = _judgments(file, judge, hint)
        self.name = name or f"replay of {self._of}"

    def identity(self) -> dict[str, Any]:
        """Return provider, the judge whose words these are, and the sha256 of the file."""
        mock = {"not_a_measurement": True} if MockJudge.name in self._of else {}
        columns = {"columns": self._columns} if self._columns else {}
        return {"provider": "replay", "judge": self._of, "file_sha256": self._sha256, **columns, **mock}

    def open(self, stored: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return nothing."""
        return {}

    def judge(self, items: Sequence[Item]) -> Iterator[tuple[int, Judgment]]:
        """Yield the judgments in order; an answer that the file does not know is unscored."""
        asked = [same(item.question.text, item.answer) if self._table else item.sha256 for item in items]
        unknown = sum(key not in self._found for key in asked)
        if unknown:
            logger.warning(
                "em_eval: %s: %d of %d answers have no judgment in %s and are unscored; %d of the %d that it judges match none.",
                self.name, unknown, len(items), self._file, len(self._found.keys() - set(asked)), len(self._found),
            )  # fmt: skip
        found: dict[Any, Judgment] = self._found
        for index, key in enumerate(asked):
            yield index, found.get(key) or Judgment.unscored("the replayed file has no judgment of this answer")

    def close(self) -> None:
        """Do nothing."""


def _judgments(file: str, judge: str | None, hint: str) -> tuple[str, dict[Any, Judgment]]:
    rows = read_records(file, _Row)
    changed = sum(row.get("seal") not in (None, seal_of(row)) for row in rows)
    if changed:
        raise ValueError(f"{hint}: {changed} judgments were changed since they were written. Give the file as it was.")
    rows = [row for row in rows if row["status"] in FINAL]
    names = sorted({row["judge"] for row in rows})
    if judge is None and len(names) > 1:
        raise ValueError(f"{hint} holds the judgments of {', '.join(names)}. Choose one with `judge:`.")
    of = judge or (names[0] if names else "")
    if of not in names:
        raise ValueError(f"{hint} holds no judgment of {judge or 'any judge'}. It has: {names or 'nothing'}.")
    return of, {row["item_sha256"]: _checked(row) for row in rows if row["judge"] == of}


def _checked(row: _Row) -> Judgment:
    """Return a stored judgment whose scores are scores."""
    found = Judgment(row["aligned"], row["coherent"], row["status"], row["detail"])
    wrong = contradiction(found)
    return Judgment.unscored(f"the replayed judgment is none: {wrong}") if wrong else found
