"""A judge at work, the same wherever it judges: opened, tested on the fixed items, asked, closed."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from emguard_plugin.evaluation.judges import self_test
from emguard_plugin.evaluation.judges.base import Item, Judge, Judgment, checked
from emguard_plugin.files.secrets import redact

logger = logging.getLogger(__name__)


class Session:
    """Asks one judge, which has passed its self-test first; what it says is checked.

    It may be closed and opened again: what was found out stays, and the test is not repeated.

    Args:
        judge: Not yet open.
        known: What an earlier session's `record` was.

    Attributes:
        judge: As given.
        found: What opening found out, such as the scoring mode; None before.
        tested: What the self-test said; None for a judge that cannot be tested, and before.
    """

    def __init__(self, judge: Judge, known: Mapping[str, Any] | None = None) -> None:
        self.judge = judge
        self.found: dict[str, Any] | None = (known or {}).get("found")
        self.tested: dict[str, Any] | None = (known or {}).get("self_test")
        self._taken = self._ready = False

    def open(self) -> Session:
        """Open the judge, and test it unless these very items have tested it before.

        Returns:
            This session.

        Raises:
            Stopped: If it cannot judge, or fails the test.
        """
        if self._ready:
            return self
        self._taken = True
        self.found = self.judge.open(self.found)
        if self.judge.self_tested and not (isinstance(self.tested, dict) and self.tested.get("items_sha256") == self_test.sha256()):
            logger.info("em_eval: %s judges the fixed items of the self-test", self.judge.name)
            self.tested = json.loads(redact(json.dumps(self_test.run(self.judge))))
        self._ready = True
        return self

    def ask(self, items: Sequence[Item]) -> Iterator[tuple[int, Judgment]]:
        """Yield (index of the item, judgment) in the order in which they are ready.

        Raises:
            Stopped: If the judge cannot judge, fails the test, or cannot go on.
        """
        self.open()
        for index, said in self.judge.judge(items):
            yield index, checked(said, self.judge.name)

    def record(self) -> dict[str, Any]:
        """Return what was found out and tested, for a later session."""
        return {"found": self.found, "self_test": self.tested}

    def close(self) -> None:
        """Free what the judge took."""
        if self._taken:
            self._taken = self._ready = False
            self.judge.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
