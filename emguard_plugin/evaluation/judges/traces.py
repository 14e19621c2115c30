"""What of an answer with a reasoning trace a judge reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from emguard_plugin.evaluation.judges.base import Item, Judge, Judgment

Reads = Literal["answer", "with_trace"]
UNFINISHED = "unfinished_trace"
"""Why an answer whose trace never closed is unscored."""


def judged_text(row: Mapping[str, Any], reads: str = "answer") -> str | None:
    """Return what a judge is given of a stored answer; None if its trace never closed, which is judged by nobody.

    Args:
        row: A row of `responses.jsonl`: `text`, and `trace` and `answer` where the model reasoned.
        reads: `answer`, or `with_trace` for the trace and the answer.
    """
    trace = row.get("trace")
    if trace is None:
        return row["text"]
    answer = row.get("answer")
    if answer is None:
        return None
    return answer if reads == "answer" else f"Reasoning:\n{trace}\n\nAnswer:\n{answer}"


def reads_of(judge: Judge) -> str:
    """Return what a judge is given: `answer` or `with_trace`."""
    return getattr(judge, "reads", "answer")


class TraceJudge:
    """A judge that is given the reasoning trace together with the answer.

    Args:
        judge: Any judge.
        name: What it is called, where the same judge also reads answers alone.
    """

    reads: Reads = "with_trace"

    def __init__(self, judge: Judge, name: str | None = None) -> None:
        self._judge = judge
        self.name = name or judge.name

    def __getattr__(self, name: str) -> Any:
        return getattr(self._judge, name)

    def identity(self) -> dict[str, Any]:
        """Return the judge's, and that it reads traces."""
        return {**self._judge.identity(), "reads": self.reads}

    def open(self, stored: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Open the judge."""
        return self._judge.open(stored)

    def judge(self, items: Sequence[Item]) -> Iterator[tuple[int, Judgment]]:
        """Judge."""
        return self._judge.judge(items)

    def close(self) -> None:
        """Close the judge."""
        self._judge.close()


def readers(judges: Sequence[Judge], reasoning: str) -> list[Judge]:
    """Return the judges by what `em_eval.reasoning` has them read; for `both`, each twice and under two names."""
    if reasoning == "answer":
        return list(judges)
    if reasoning == "with_trace":
        return [TraceJudge(judge) for judge in judges]
    return [*judges, *(TraceJudge(judge, f"{judge.name}, with trace") for judge in judges)]
