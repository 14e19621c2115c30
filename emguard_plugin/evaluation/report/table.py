"""The comparison as a table for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from emguard_plugin.evaluation.report.columns import Column, Extra, Judged, NamedSummary, columns_of, judged_by, judges_of
from emguard_plugin.evaluation.report.prose import agreements, set_aside
from emguard_plugin.pages.text import clean, percent

if TYPE_CHECKING:
    from rich.table import Table

    from emguard_plugin.evaluation.run_folder.summary import Summary
    from emguard_plugin.evaluation.statistics.figures import Rate


def comparison_table(runs: Sequence[NamedSummary], extra: Extra | None = None, judge: str | None = None, force: bool = False) -> Table:
    """Lay runs side by side: base, then each fine-tuned model, one row each, and one group of rows for each judge.

    Args:
        runs: (name, summary or the path of one) per fine-tuned model.
        extra: Further columns, as {row name: {heading: text}}; for example seconds per step.
        judge: Name of the judge; default is all, one group of rows each.
        force: Also lay side by side what was measured by different protocols; the caption says so.

    Returns:
        A `rich` table. Intervals are 95 % Wilson intervals.

    Raises:
        ValueError: If the protocols differ and `force` is off, or if no judge has the name.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    columns, doubt = columns_of(runs, force)
    extra = extra or {}
    headings = list(dict.fromkeys(heading for cells in extra.values() for heading in cells))
    judges = judges_of(columns) if judge is None else [judge]
    if judge is not None and judge not in judges_of(columns):
        raise ValueError(f"no judge {judge!r}; judges: {', '.join(judges_of(columns))}.")
    lines = [f"NOT COMPARABLE: {doubt}"] if doubt else []
    lines += [note for column in columns for note in _left_out(column, judges[0])]
    lines += [note for column in columns for name in judges for note in _unscored(column, name)]
    lines += [sentence for column in columns if column.role == "tuned" for sentence in notes(column.summary)]
    title = "Emergent misalignment" + (f", judged by {clean(judges[0])}" if len(judges) == 1 else "")
    # Eight columns in 80 characters.
    table = Table(title=Text(title), caption=Text(clean("\n".join(lines))) if lines else None, box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("model", overflow="fold")
    for heading in ("in-domain", "EM, all\nanswers", "EM,\ncoherent", "coherent", "n", *headings):
        table.add_column(heading, justify="right")
    for number, name in enumerate(judges):
        if len(judges) > 1:
            table.add_section()
            table.add_row(Text(f"judged by {clean(name)}", style="italic"))
        # Times and the like are no judge's; they stand in the first group.
        further = headings if number == 0 else []
        for model in judged_by(columns, name):
            # Text, not str: names come from users, and rich would read markup in them.
            cells: list[str | Text] = [*_cells(model), *(Text(clean(extra.get(model.name, {}).get(heading, "–"))) for heading in further)]
            table.add_row(Text(clean(model.name)), *cells)
    return table


def notes(summary: Summary) -> Iterator[str]:
    """Yield what belongs below the rates: how far the judges agree, and which judgments are not shown."""
    yield from agreements(summary)
    if text := set_aside(summary):
        yield text


def _cells(model: Judged) -> list[str]:
    return [
        _two_lines(model.adherence),
        _two_lines(model.open_ended.em_all),
        _two_lines(model.open_ended.em_coherent),
        percent(model.open_ended.coherence.value),
        str(model.open_ended.em_all.n),
    ]


def _left_out(column: Column, judge: str) -> Iterator[str]:
    """Yield what stands in no rate: questions that could not be asked, and reasoning that led to no answer."""
    refused = column.summary.not_asked if column.role == "tuned" else []
    if refused:
        names = dict.fromkeys(one.question for one in refused)
        yield f"{column.name}: {len(names)} questions not asked, as the chat template refuses them ({', '.join(names)})"
    rates = column.rates("questions", judge)
    if rates and rates.unfinished_traces:
        share = percent(rates.unfinished_traces / rates.answers)
        yield f"{column.name}: {rates.unfinished_traces} unfinished reasoning traces ({share}), unscored"


def _unscored(column: Column, judge: str) -> Iterator[str]:
    """Yield how many answers stand in no rate because the judge gave no score."""
    rates = column.rates("questions", judge)
    if rates and rates.unscored.count:
        yield f"{column.name}: {rates.unscored.count} of {rates.answers} answers unscored by {judge} ({percent(rates.unscored.value)})"


def _two_lines(rate: Rate | None) -> str:
    """Write a rate above its interval."""
    if rate is None or rate.interval is None:
        return "–"
    low, high = rate.interval
    return f"{percent(rate.value)}\n{100 * low:.1f}–{100 * high:.1f}"
