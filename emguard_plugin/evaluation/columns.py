"""What a table or a report shows side by side: the base model, then each fine-tuned one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from emguard_plugin.evaluation.store import JsonLines
from emguard_plugin.evaluation.summary import Role, SuiteRates, Summary

Run = tuple[str, "Summary | str | Path"]


@dataclass(frozen=True)
class Column:
    """One model of a comparison.

    Attributes:
        name: How it is called.
        summary: The result it stands in.
        role: Which model of that result it is.
    """

    name: str
    summary: Summary
    role: Role

    def rates(self, suite: str, judge: str | None = None) -> SuiteRates | None:
        """Return its rates on one suite, or None if they were not measured."""
        return self.summary.rates(self.role, suite, judge)


def columns_of(runs: Sequence[Run], force: bool = False) -> tuple[list[Column], str | None]:
    """Lay runs side by side, their common base first.

    Args:
        runs: (name, summary or the path of one) per fine-tuned model.
        force: Also lay side by side what was measured by different protocols.

    Returns:
        The columns, and the reason why they do not compare, or None.

    Raises:
        ValueError: If there is no run, if two have the same name, or if the protocols differ and `force` is off.
    """
    loaded = [(name, run if isinstance(run, Summary) else Summary.load(run)) for name, run in runs]
    names = [name for name, _ in loaded]
    if not loaded or len(set(names)) < len(names):
        raise ValueError(f"a comparison needs at least one run, and a name of its own for each; found {names}.")
    first_name, first = loaded[0]
    doubt = None
    for name, summary in loaded[1:]:
        if summary.fingerprint != first.fingerprint:
            parts = [key for key in first.protocol if first.protocol[key] != summary.protocol.get(key)]
            doubt = f"{name!r} was measured by another protocol than {first_name!r}; they differ in {', '.join(parts)}"
            if not force:
                raise ValueError(f"{doubt}. Measure both in the same way, or force the comparison; it is marked then.")
    columns: list[Column] = []
    for name, summary in loaded:
        base = summary.models.get("base")
        known = [column.summary.models["base"] for column in columns if column.role == "base"]
        if base is not None and base not in known:
            columns.append(Column("base" if not known else f"base of {name}", summary, "base"))
    return columns + [Column(name, summary, "tuned") for name, summary in loaded], doubt


@dataclass
class Sample:
    """One question with the answer of each column to the same draw; None where a column has none."""

    suite: str
    question: str
    category: str | None
    asked: str
    answers: list[dict[str, Any] | None] = field(default_factory=list)


def samples(columns: Sequence[Column], suite: str, judge: str, limit: int) -> list[Sample]:
    """Return draw 0 of up to `limit` questions, evenly spread over the suite; empty if the files are not there.

    The choice looks at no answer, so it shows neither the best nor the worst.
    """
    by_column = [_answers(column, suite, judge) for column in columns]
    first = next((answers for answers in by_column if answers), {})
    rates = columns[-1].rates(suite, judge)
    category = {group.name: group.category for group in rates.by_question} if rates else {}
    keys = list(first)
    chosen = [keys[index * len(keys) // limit] for index in range(limit)] if len(keys) > limit else keys
    return [
        Sample(suite, key, category.get(key), first[key]["asked"], [answers.get(key) for answers in by_column])
        for key in chosen
    ]


def _answers(column: Column, suite: str, judge: str) -> dict[str, dict[str, Any]]:
    folder = column.summary.folder
    if folder is None:
        return {}

    def wanted(row: dict[str, Any]) -> bool:
        return (row["role"], row["suite"], row["paraphrase"], row["draw"]) == (column.role, suite, 0, 0)

    scores = {
        row["question"]: row
        for row in JsonLines(folder / "judgments.jsonl").read()
        if wanted(row) and row["judge"] == judge
    }
    found = {row["question"]: row for row in JsonLines(folder / "responses.jsonl").read() if wanted(row)}
    rates = column.rates(suite, judge)
    order = [group.name for group in rates.by_question] if rates else list(found)
    return {name: {**found[name], **scores.get(name, {})} for name in order if name in found}


def percent(value: float | None) -> str:
    """Write a share as `12.3 %`, or a dash for none."""
    return "–" if value is None else f"{100 * value:.1f} %"


def bounds(interval: tuple[float, float] | None) -> str:
    """Write an interval in percent as `10.1 to 14.9`, or a dash for none."""
    return "–" if interval is None else f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}"
