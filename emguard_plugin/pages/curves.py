"""Where the lines of a chart run; `marks.html.jinja` draws them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Point:
    """One dot; places are shares of the chart's width and height, from its upper left corner.

    Attributes:
        x: Place from the left.
        y: Place from the top.
        whisker: The ends of its interval, from the top.
        says: What it says where a mouse rests on it.
    """

    x: float
    y: float
    whisker: tuple[float, float] | None = None
    says: str = ""


@dataclass(frozen=True)
class Line:
    """Dots of one colour, joined from left to right."""

    colour: int
    points: Sequence[Point]
    radius: float

    @property
    def edges(self) -> list[tuple[Point, Point]]:
        """The pairs of dots to be joined."""
        return list(pairwise(self.points))


@dataclass(frozen=True)
class Curves:
    """A chart.

    Attributes:
        height: In pixels; it is as wide as the page.
        lines: From the lowest to the uppermost.
        scale: (place from the top, text) at its left.
        labels: (place from the left, text) below it.
    """

    height: int
    lines: Sequence[Line]
    scale: Sequence[tuple[float, str]]
    labels: Sequence[tuple[float, str]]
