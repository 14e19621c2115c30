"""The report: one HTML page without scripts and without a network request."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from emguard_plugin.evaluation.judges.outcomes import THRESHOLDS
from emguard_plugin.evaluation.report import plots
from emguard_plugin.evaluation.report.columns import Column, Extra, Judged, NamedSummary, columns_of, judged_by, judges_of
from emguard_plugin.evaluation.report.details import protocol, side_by_side
from emguard_plugin.evaluation.report.prose import lead, refused, set_aside
from emguard_plugin.evaluation.run_folder.summary import Summary
from emguard_plugin.evaluation.statistics.figures import Rate, SuiteRates
from emguard_plugin.evaluation.statistics.rates import why_unscored
from emguard_plugin.pages.page import write_page
from emguard_plugin.pages.text import bounds, number, percent

Cell = str | int | tuple[str, ...]
Row = tuple[str, list[Cell]]

HEADINGS = ("Model", "EM, all answers", "EM, coherent answers", "In-domain adherence", "Coherence", "Refusals", "Unscored", "Answers")
MISSING = 0.05
"""Share of answers, unscored or cut off, from which on the rate is given with a warning."""


def write_report(summary: Summary, path: str | Path) -> Path:
    """Write the report of one run; see `write_comparison`."""
    return write_comparison([("fine-tuned", summary)], path)


def write_comparison(
    runs: Sequence[NamedSummary], path: str | Path, extra: Extra | None = None, force: bool = False, title: str | None = None
) -> Path:
    """Write one page that lays runs side by side.

    It holds the answer in a few lines, the rates with their intervals, a plot by category and question, sample answers
    behind a click (from the folders of the summaries, where they lie), and the protocol in full.

    Args:
        runs: (name, summary or the path of one) per fine-tuned model.
        path: The HTML file to write.
        extra: Further table columns, as {row name: {heading: text}}; for example seconds per step.
        force: Also lay side by side what was measured by different protocols; the page is marked then.
        title: Title of the page.

    Returns:
        `path`.

    Raises:
        ValueError: If the protocols differ and `force` is off.
    """
    columns, doubt = columns_of(runs, force)
    tuned = [column for column in columns if column.role == "tuned"]
    judges = [(judge, judged_by(columns, judge)) for judge in judges_of(columns)]
    facts = {
        "title": title or "Emergent misalignment: " + ", ".join(name for name, _ in runs),
        "doubt": doubt,
        "judges": [_results(judge, models, extra or {} if index == 0 else {}) for index, (judge, models) in enumerate(judges) if models],
        "agreement": [row for column in tuned for row in _agreement(column)],
        "fleiss": [column.summary.fleiss_kappa for column in tuned if column.summary.fleiss_kappa is not None],
        "set_aside": [(column.name, text) for column in tuned if (text := set_aside(column.summary))],
        "asked": side_by_side(columns),
        "fingerprint": columns[-1].summary.fingerprint[:16],
        "protocol": protocol(columns),
        "example": columns[-1].summary.example_prompt,
        "threshold": THRESHOLDS.aligned_below,
    }
    return write_page(path, "report.html.jinja", __package__, facts)


def _results(judge: str, models: Sequence[Judged], extra: Extra) -> dict[str, Any]:
    """What the page says by one judge."""
    questions = list(plots.by_question(models).items())
    curves = plots.by_threshold(models)
    return {
        "name": judge,
        "models": models,
        "legend": [(model.name, model.colour) for model in models],
        "lead": lead(models),
        "measured": all(model.result.measured for model in models),
        "stopped": list(dict.fromkeys(model.result.stopped for model in models if model.result.stopped)),
        "refused": [(model.name, names, reason) for model in models for reason, names in refused(model.column).items()],
        "doubtful": list(_doubtful(models)),
        "headings": [*HEADINGS, *_headings(extra)],
        "rates": [_rates(model, extra) for model in models],
        "further": _further(models),
        "plots": [_plot(heading, models, suite, field) for heading, suite, field in _PLOTS],
        "categories": plots.by_category(models),
        "questions": questions[: plots.OPEN_QUESTIONS],
        "more_questions": questions[plots.OPEN_QUESTIONS :],
        "curves": curves,
        "thresholds": ["Model", *(f"below {label}" for _, label in curves.labels)] if curves else [],
        "by_threshold": [
            (model.name, [(percent(point.em_all.value), bounds(point.em_all.interval_clustered)) for point in model.open_ended.curve])
            for model in models
        ],
    }


_PLOTS = (
    ("EM rate, all scored answers", "open_ended", "em_all"),
    ("EM rate, coherent answers", "open_ended", "em_coherent"),
    ("In-domain adherence", "in_domain", "em_all"),
    ("Coherence", "open_ended", "coherence"),
)


def _plot(heading: str, models: Sequence[Judged], suite: str, field: str) -> tuple[str, list[tuple[Judged, Rate]]]:
    return heading, [(model, getattr(rates, field)) for model in models if (rates := getattr(model, suite))]


class Doubtful(NamedTuple):
    """Where a reader must know more before using the numbers.

    Attributes:
        place: Model and questions.
        rates: What was measured.
        reasons: Why answers are unscored, where many are.
        cut: Whether many answers were cut off.
    """

    place: str
    rates: SuiteRates
    reasons: str
    cut: bool


def _doubtful(models: Sequence[Judged]) -> Iterator[Doubtful]:
    for model in models:
        for rates, kind in ((model.open_ended, "open-ended"), (model.in_domain, "in-domain")):
            if rates:
                reasons = why_unscored(rates, most=10) if (rates.unscored.value or 0.0) > MISSING else ""
                yield Doubtful(f"{model.name}, {kind} questions", rates, reasons, rates.truncated > MISSING * rates.answers)


def _headings(extra: Extra) -> list[str]:
    return list(dict.fromkeys(heading for cells in extra.values() for heading in cells))


def _rates(model: Judged, extra: Extra) -> Row:
    shown = model.open_ended
    further = extra.get(model.name, {})
    cells: list[Cell] = [_share(rate) for rate in (shown.em_all, shown.em_coherent, model.adherence, shown.coherence)]
    cells += [percent(shown.refusal.value), percent(shown.unscored.value), shown.answers]
    return model.name, cells + [further.get(heading, "–") for heading in _headings(extra)]


def _share(rate: Rate | None) -> Cell:
    if rate is None or rate.value is None:
        return "–"
    return percent(rate.value), bounds(rate.interval), bounds(rate.interval_clustered)


def _further(models: Sequence[Judged]) -> list[Row]:
    """The suites of `em_eval.also`, which are never pooled with the EM rate."""
    suites = [model.result.rates.get(model.column.role, {}) for model in models]
    known = dict.fromkeys(name for by in suites for name in by if name not in ("questions", "in_domain"))
    return [(name, [_share(by[name].em_all if name in by else None) for by in suites]) for name in known]


def _agreement(column: Column) -> Iterator[Row]:
    for pair in column.summary.agreement:
        measures = [percent(pair.same), number(pair.kappa, ".2f"), number(pair.spearman, ".2f")]
        yield f"{column.name}: {pair.suite}", [" / ".join(pair.judges), *measures, pair.answers]
