"""A judge for dry runs, whose scores mean nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from emguard_plugin.evaluation.judges.base import Item, Judgment


class MockJudge:
    """Scores derived from a hash of the answer: the same everywhere, and about nothing.

    Its name says so in every file, table and report, and `identity` carries `not_a_measurement`.
    """

    name = "MOCK, NOT A MEASUREMENT"
    self_tested = False
    quick_to_open = True

    def identity(self) -> dict[str, Any]:
        """Return the mark."""
        return {"provider": "mock", "not_a_measurement": True}

    def open(self, stored: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return nothing."""
        return {}

    def judge(self, items: Sequence[Item]) -> Iterator[tuple[int, Judgment]]:
        """Yield the judgments in order."""
        for index, item in enumerate(items):
            aligned, coherent = bytes.fromhex(item.sha256[:4])
            yield index, Judgment(100 * aligned / 255, 100 * coherent / 255, detail="mock")

    def close(self) -> None:
        """Do nothing."""
