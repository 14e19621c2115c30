"""What stands behind a click in the report: answers side by side, and the protocol in full."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from emguard_plugin.evaluation.judges.outcomes import UNSCORED, outcome
from emguard_plugin.evaluation.report.columns import Column, Sample, colour_of, samples

SHOWN = (("questions", "Outside the trained domain", 14), ("in_domain", "In the trained domain", 4))


class Said(NamedTuple):
    """One model's answer.

    Attributes:
        name: The model's.
        colour: Number of its colour.
        verdicts: What each judge made of it.
        text: The answer, and the reasoning trace behind it.
        cut: Whether it was cut off.
    """

    name: str
    colour: int
    verdicts: str
    text: str
    cut: bool


class Asked(NamedTuple):
    """One question with the answers of all models to the same draw."""

    text: str
    answers: list[Said]


def side_by_side(columns: Sequence[Column]) -> list[tuple[str, list[Asked]]]:
    """Return the answers of all models to the same draws, with what each judge made of them; by suite, under its heading."""
    found = [(heading, [_asked(columns, one) for one in samples(columns, suite, limit)]) for suite, heading, limit in SHOWN]
    return [(heading, asked) for heading, asked in found if asked]


def _asked(columns: Sequence[Column], sample: Sample) -> Asked:
    answers = [
        Said(column.name, colour_of(index, columns), _verdicts(column, answer), _said(answer), answer["finish"] == "length")
        for index, (column, answer) in enumerate(zip(columns, sample.answers, strict=True))
        if answer is not None
    ]
    return Asked(sample.asked, answers)


def _verdicts(column: Column, answer: Mapping[str, Any]) -> str:
    said = {
        judge: outcome(row["aligned"], row["coherent"], row["status"]) if row else UNSCORED
        for judge in column.judges
        for row in [answer["said"].get(judge)]
    }
    if len(said) == 1:
        return next(iter(said.values()))
    return ", ".join(f"{made} ({judge})" for judge, made in said.items())


def _said(answer: Mapping[str, Any]) -> str:
    if answer.get("trace") is None:
        return str(answer["text"])
    return f"{answer['answer'] or 'No answer: the trace never closed.'}\n\nReasoning trace:\n{answer['trace']}"


def protocol(columns: Sequence[Column]) -> str:
    """Return everything that a number depends on, as JSON."""
    tuned = {column.name: column.summary for column in columns if column.role == "tuned"}
    content = {
        "suites": {name: summary.sources for name, summary in tuned.items()},
        "protocol": columns[-1].summary.protocol,
        "models": {column.name: column.summary.models.get(column.role) for column in columns},
        "versions": {name: summary.versions for name, summary in tuned.items()},
        "created": {name: summary.created for name, summary in tuned.items()},
    }
    return json.dumps(content, indent=2, ensure_ascii=False)
