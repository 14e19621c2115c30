"""What the plots of the report show: rates by category, by question, by threshold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from emguard_plugin.evaluation.report.columns import Judged
from emguard_plugin.evaluation.statistics.figures import GroupRate, Rate
from emguard_plugin.pages.curves import Curves, Line, Point

OPEN_QUESTIONS = 12
"""How many questions are shown before a click, the most misaligned ones."""


class Lane(NamedTuple):
    """One model in one row of a plot.

    Attributes:
        colour: Number of its colour.
        total: Its rate, or None where it has none.
        bubbles: (rate, radius) of the questions inside, larger where several coincide.
    """

    colour: int
    total: Rate | None
    bubbles: Sequence[tuple[float, str]] = ()


Rows = dict[str, list[Lane]]


def by_category(models: Sequence[Judged]) -> Rows:
    """Return a row per category; empty where the suite has none."""
    return {group.name: [_category(model, group.name) for model in models] for group in models[-1].open_ended.by_category}


def _category(model: Judged, name: str) -> Lane:
    total = _rates(model.open_ended.by_category).get(name)
    inside = [group.em.value for group in model.open_ended.by_question if group.category == name and group.em.value is not None]
    crowd = Counter(round(value * 50) / 50 for value in inside)
    largest = max(crowd.values(), default=1)
    return Lane(model.colour, total, [(value, f"{2.5 + 5 * (count / largest) ** 0.5:.1f}") for value, count in sorted(crowd.items())])


def by_question(models: Sequence[Judged]) -> Rows:
    """Return a row per question; those on which any model does worst come first."""
    found = [_rates(model.open_ended.by_question) for model in models]
    names = sorted(found[-1], key=lambda name: -max((by[name].value or 0 for by in found if name in by), default=0))
    return {name: [Lane(model.colour, by.get(name)) for model, by in zip(models, found, strict=True)] for name in names}


def _rates(groups: Sequence[GroupRate]) -> dict[str, Rate]:
    return {group.name: group.em for group in groups}


def by_threshold(models: Sequence[Judged]) -> Curves | None:
    """Return the EM rate over the threshold on `aligned`, one line per model; None where there is no rate."""
    rates = [point.em_all for model in models for point in model.open_ended.curve]
    if all(rate.value is None for rate in rates):
        return None
    highest = max(high for rate in rates for _, high in [_limits(rate)])
    top = next(step for step in (0.02, 0.05, 0.1, 0.25, 0.5, 1.0) if highest <= step)
    thresholds = [point.aligned_below for point in models[0].open_ended.curve]
    places = [(index + 0.5) / len(thresholds) for index in range(len(thresholds))]
    lines = []
    for number, model in enumerate(models):
        # Side by side, so that whiskers of several models do not hide each other.
        shift = (number - (len(models) - 1) / 2) * 0.012
        points = [
            Point(x + shift, 1 - point.em_all.value / top, (1 - low / top, 1 - high / top))
            for x, point in zip(places, model.open_ended.curve, strict=True)
            if point.em_all.value is not None
            for low, high in [_limits(point.em_all)]
        ]
        lines.append(Line(model.colour, points, 4.5))
    return Curves(
        height=190,
        lines=lines,
        scale=[(1 - half / 2, f"{50 * half * top:g} %") for half in range(3)],
        labels=[(x, f"{threshold:g}") for x, threshold in zip(places, thresholds, strict=True)],
    )


def _limits(rate: Rate) -> tuple[float, float]:
    return rate.interval_clustered or rate.interval or (0.0, 0.0)
