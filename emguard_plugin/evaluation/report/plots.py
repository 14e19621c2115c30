"""The plots of the report: rates with intervals, by category, by question, by threshold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from emguard_plugin.evaluation.judges.outcomes import THRESHOLDS
from emguard_plugin.evaluation.report import marks
from emguard_plugin.evaluation.report.columns import Column, bounds, percent
from emguard_plugin.evaluation.report.text import escape
from emguard_plugin.evaluation.statistics.figures import Rate

COLOURS = 6
OPEN_QUESTIONS = 12
"""How many questions are shown before a click, the most misaligned ones."""


def colour_of(index: int, columns: Sequence[Column]) -> int:
    """Return the number of a column's colour. Grey is the base's; a page without a base starts at the first colour."""
    shift = 0 if columns[0].role == "base" else 1
    return (index + shift) % COLOURS


def _legend(columns: Sequence[Column]) -> str:
    keys = [f'<span class="key c{colour_of(i, columns)}">{escape(column.name)}</span>' for i, column in enumerate(columns)]
    return f'<div class="legend">{"".join(keys)}</div>'


def _row(name: str, lane: str, value: str, kind: str = "") -> str:
    return f'<div class="row {kind}"><div class="name">{name}</div><div class="track">{lane}</div><div class="value">{value}</div></div>'


def _axis() -> str:
    return f'<div class="row axis-row"><div></div><div>{marks.axis()}</div><div></div></div>'


def rates_plot(columns: Sequence[Column], judge: str) -> Iterator[str]:
    """Yield the rates of all models, with both intervals."""
    yield "<h2>Rates</h2>"
    yield ('<p class="note">Dot: the share. Thick whisker: 95 % interval for these questions; thin whisker: for questions like these.</p>')
    yield '<div class="plot">'
    for heading, suite, field in (
        ("EM rate, all scored answers", "questions", "em_all"),
        ("EM rate, coherent answers", "questions", "em_coherent"),
        ("In-domain adherence", "in_domain", "em_all"),
        ("Coherence", "questions", "coherence"),
    ):
        measured = [column.rates(suite, judge) for column in columns]
        if not any(measured):
            continue
        yield f'<div class="group"><h3>{heading}</h3>'
        for index, (column, rates) in enumerate(zip(columns, measured, strict=True)):
            if rates:
                rate = getattr(rates, field)
                yield _row(escape(column.name), marks.lane(rate, colour_of(index, columns)), percent(rate.value))
        yield "</div>"
    yield f"{_axis()}</div>"


def category_plot(columns: Sequence[Column], judge: str) -> Iterator[str]:
    """Yield EM by category, each question a bubble; nothing where the suite has no categories."""
    rates = [column.rates("questions", judge) for column in columns]
    if not rates[-1].by_category:
        return
    yield "<h2>EM rate by category</h2>"
    yield ('<p class="note">Tick: the rate over the category. Bubbles: its questions, larger where several have the same rate.</p>')
    yield f'{_legend(columns)}<div class="plot strip">'
    colours = [colour_of(index, columns) for index in range(len(columns))]
    for name in [group.name for group in rates[-1].by_category]:
        lanes, values = [], []
        for index, found in enumerate(rates):
            total = next((group.em for group in found.by_category if group.name == name), None)
            inside = [g.em.value for g in found.by_question if g.category == name and g.em.value is not None]
            lanes.append((total, inside))
            value = percent(total.value) if total else "–"
            values.append(f'<span class="c{colours[index]}">{value}</span>')
        yield _row(escape(name), marks.strip(lanes, colours), "".join(values))
    yield f"{_axis()}</div>"


def question_plot(columns: Sequence[Column], judge: str) -> Iterator[str]:
    """Yield one row per question, the most misaligned first; the tail stands behind a click."""
    found = [{g.name: g.em for g in column.rates("questions", judge).by_question} for column in columns]
    names = sorted(found[-1], key=lambda name: -max((by[name].value or 0 for by in found if name in by), default=0))
    yield "<h2>EM rate by question</h2>"
    yield (
        '<p class="note">Dot: the share of misaligned answers to the question. Whisker: its 95 % Wilson interval. The '
        "questions on which any model does worst come first.</p>"
    )
    yield _legend(columns)
    yield f'<div class="plot strip">{"".join(_question_row(name, found, columns) for name in names[:OPEN_QUESTIONS])}'
    yield f"{_axis()}</div>"
    if rest := names[OPEN_QUESTIONS:]:
        yield f"<details><summary>{len(rest)} more questions</summary>"
        yield f'<div class="plot strip">{"".join(_question_row(name, found, columns) for name in rest)}{_axis()}</div>'
        yield "</details>"


def _question_row(name: str, found: Sequence[dict[str, Rate]], columns: Sequence[Column]) -> str:
    lanes, values = [], []
    for index, by in enumerate(found):
        rate, colour = by.get(name), colour_of(index, columns)
        lanes.append(marks.lane(rate, colour) if rate else "")
        shown = f"{rate.count} / {rate.n}" if rate else "–"
        values.append(f'<span class="c{colour}">{shown}</span>')
    return _row(escape(name).replace("/", "/<wbr>"), "".join(lanes), "".join(values))


def threshold_plot(columns: Sequence[Column], judge: str) -> Iterator[str]:
    """Yield the EM rate as the threshold on `aligned` moves."""
    curves = [[(point.aligned_below, point.em_all) for point in c.rates("questions", judge).curve] for c in columns]
    if all(rate.value is None for curve in curves for _, rate in curve):
        return
    yield "<h2>EM rate by threshold</h2>"
    yield (
        '<p class="note">Were answers called misaligned below another score for <code>aligned</code> than '
        f"{THRESHOLDS.aligned_below:g}. A rate that hangs on the threshold is a rate of answers on the edge. Whiskers: "
        "95 % intervals for questions like these.</p>"
    )
    yield _legend(columns)
    yield marks.curves(curves, [colour_of(index, columns) for index in range(len(columns))])
    head = "".join(f"<th>below {threshold:g}</th>" for threshold, _ in curves[0])
    rows = "".join(
        f"<tr><th>{escape(column.name)}</th>"
        + "".join(
            f'<td data-label="below {threshold:g}"><span>{percent(rate.value)}<small>{bounds(rate.interval_clustered)}</small></span></td>'
            for threshold, rate in curve
        )
        + "</tr>"
        for column, curve in zip(columns, curves, strict=True)
    )
    yield f'<table class="cards"><thead><tr><th>Model</th>{head}</tr></thead><tbody>{rows}</tbody></table>'
