"""Inline SVG marks for shares. Positions are percentages, so a lane stretches with the page and text does not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

from emguard_plugin.evaluation.statistics.figures import Bounds, Rate

LANE = 18


def lane(rate: Rate, colour: int) -> str:
    """Draw one rate: a dot, a thick whisker for these questions, a thin one for questions like these."""
    if rate.value is None:
        return f'<svg class="lane" height="{LANE}"></svg>'
    return (
        f'<svg class="lane c{colour}" height="{LANE}"><rect class="bar" width="{_x(rate.value)}" height="100%"/>'
        f"{_whisker(rate.interval_clustered, 'thin')}{_whisker(rate.interval, 'thick')}"
        f'<circle cx="{_x(rate.value)}" cy="50%" r="5"/></svg>'
    )


def strip(groups: Sequence[tuple[Rate | None, Sequence[float]]], colours: Sequence[int]) -> str:
    """Draw one lane per model: a tick at its rate and a bubble for its questions, larger where several coincide.

    Args:
        groups: Per model, the rate over all its answers and the rate of each question.
        colours: Their colours.
    """
    lanes = []
    for index, (total, questions) in enumerate(groups):
        middle = LANE * (index + 0.5)
        crowd = Counter(round(value * 50) / 50 for value in questions)
        largest = max(crowd.values(), default=1)
        bubbles = "".join(
            f'<circle class="bubble" cx="{_x(value)}" cy="{middle:g}" r="{2.5 + 5 * (count / largest) ** 0.5:.1f}"/>'
            for value, count in sorted(crowd.items())
        )
        tick = "" if total is None or total.value is None else _tick(total.value, middle)
        lanes.append(f'<g class="c{colours[index]}">{bubbles}{tick}</g>')
    return f'<svg class="lane" height="{LANE * len(groups)}">{"".join(lanes)}</svg>'


def curves(models: Sequence[Sequence[tuple[float, Rate]]], colours: Sequence[int]) -> str:
    """Draw rates over a threshold, one line per model, with a scale of their own.

    Args:
        models: Per model, (threshold, rate), thresholds ascending and the same for all.
        colours: Their colours.
    """
    ends = [rate.interval_clustered or rate.interval or (0.0, 0.0) for model in models for _, rate in model]
    top = next(step for step in (0.02, 0.05, 0.1, 0.25, 0.5, 1.0) if max(high for _, high in ends) <= step)
    steps = len(models[0])
    parts = []
    for number, (model, colour) in enumerate(zip(models, colours, strict=True)):
        # Side by side, so that whiskers of several models do not hide each other.
        shift = (number - (len(models) - 1) / 2) * 1.2
        xs = [100 * (index + 0.5) / steps + shift for index in range(steps)]
        points = [(x, rate) for x, (_, rate) in zip(xs, model, strict=True) if rate.value is not None]
        lines = "".join(
            f'<line class="edge" x1="{a:.2f}%" y1="{_y(p.value, top)}" x2="{b:.2f}%" y2="{_y(q.value, top)}"/>'
            for (a, p), (b, q) in pairwise(points)
        )
        dots = "".join(
            f'<line class="thin" x1="{x:.2f}%" x2="{x:.2f}%" y1="{_y(low, top)}" y2="{_y(high, top)}"/>'
            f'<circle cx="{x:.2f}%" cy="{_y(rate.value, top)}" r="4.5"/>'
            for x, rate in points
            for low, high in [rate.interval_clustered or rate.interval]
        )
        parts.append(f'<g class="c{colour}">{lines}{dots}</g>')
    places = [f"{100 * (index + 0.5) / steps:.2f}%" for index in range(steps)]
    labels = "".join(f'<span style="left:{at}">{t:g}</span>' for at, (t, _) in zip(places, models[0], strict=True))
    scale = "".join(f'<span style="top:{100 - 50 * half}%">{50 * half * top:g} %</span>' for half in range(3))
    return (
        f'<div class="curve"><div class="scale" aria-hidden="true">{scale}</div><div><svg class="lane chart" height="190">'
        f'{"".join(parts)}</svg><div class="axis" aria-hidden="true">{labels}</div></div></div>'
    )


def _y(value: float, top: float) -> str:
    return f"{100 * (1 - value / top):.2f}%"


def axis() -> str:
    """Return the labels under a column of lanes."""
    marks = "".join(f'<span style="left:{at}%">{at}{" %" if at == 100 else ""}</span>' for at in (0, 25, 50, 75, 100))
    return f'<div class="axis" aria-hidden="true">{marks}</div>'


def _x(value: float) -> str:
    return f"{100 * value:.2f}%"


def _whisker(interval: Bounds | None, kind: str) -> str:
    if interval is None:
        return ""
    return f'<line class="{kind}" x1="{_x(interval[0])}" x2="{_x(interval[1])}" y1="50%" y2="50%"/>'


def _tick(value: float, y: float) -> str:
    return f'<line class="tick" x1="{_x(value)}" x2="{_x(value)}" y1="{y - 8:g}" y2="{y + 8:g}"/>'
