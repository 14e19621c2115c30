"""Inline SVG marks for shares. Positions are percentages, so a lane stretches with the page and text does not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from emguard_plugin.evaluation.summary import Bounds, Rate

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
