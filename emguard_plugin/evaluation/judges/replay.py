"""A judge that repeats what another one said, from its `judgments.jsonl`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from emguard_plugin.evaluation.judges.base import FINAL, Item, Judgment
from emguard_plugin.evaluation.judges.mock import MockJudge
from emguard_plugin.evaluation.store import JsonLines


class ReplayJudge:
    """Stored judgments, found by question and answer.

    Args:
        file: A `judgments.jsonl`.
        judge: Whose judgments to repeat; needed where the file holds those of several judges.

    Raises:
        ValueError: If the file is missing, holds no such judgments, or those of several judges.
    """

    self_tested = False
    quick_to_open = True

    def __init__(self, file: str, judge: str | None = None) -> None:
        hint = f"`em_eval.judges: file: {file}`"
        if not Path(file).is_file():
            raise ValueError(f"{hint} does not exist. Give the `judgments.jsonl` of an earlier evaluation.")
        rows = [row for row in JsonLines(Path(file)).read() if row.get("status") in FINAL and "item_sha256" in row]
        names = sorted({row["judge"] for row in rows})
        if judge is None and len(names) > 1:
            raise ValueError(f"{hint} holds the judgments of {', '.join(names)}. Choose one with `judge:`.")
        self._of = judge or (names[0] if names else "")
        if self._of not in names:
            raise ValueError(f"{hint} holds no judgment of {judge or 'any judge'}. It has: {names or 'nothing'}.")
        self.name = f"replay of {self._of}"
        self._sha256 = hashlib.sha256(Path(file).read_bytes()).hexdigest()
        self._found = {row["item_sha256"]: row for row in rows if row["judge"] == self._of}

    def identity(self) -> dict[str, Any]:
        """Return provider, the judge whose words these are, and the sha256 of the file."""
        mock = {"not_a_measurement": True} if MockJudge.name in self._of else {}
        return {"provider": "replay", "judge": self._of, "file_sha256": self._sha256, **mock}

    def open(self, stored: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return nothing."""
        return {}

    def judge(self, items: Sequence[Item]) -> Iterator[tuple[int, Judgment]]:
        """Yield the judgments in order; an answer that the file does not know is unscored."""
        for index, item in enumerate(items):
            row = self._found.get(item.sha256)
            if row is None:
                yield index, Judgment.unscored("the replayed file has no judgment of this answer")
            else:
                yield index, Judgment(row["aligned"], row["coherent"], row["status"], row["detail"])

    def close(self) -> None:
        """Do nothing."""
