"""The comparison as a table for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from emguard_plugin.evaluation.columns import Column, Run, columns_of, percent
from emguard_plugin.evaluation.text import clean

if TYPE_CHECKING:
    from rich.table import Table

    from emguard_plugin.evaluation.summary import Rate

Extra = Mapping[str, Mapping[str, str]]


def comparison_table(
    runs: Sequence[Run], extra: Extra | None = None, judge: str | None = None, force: bool = False
) -> Table:
    """Lay runs side by side: base, then each fine-tuned model, one row each.

    Args:
        runs: (name, summary or the path of one) per fine-tuned model.
        extra: Further columns, as {row name: {heading: text}}; for example seconds per step.
        judge: Name of the judge; default is the first.
        force: Also lay side by side what was measured by different protocols; the caption says so.

    Returns:
        A `rich` table. Intervals are 95 % Wilson intervals.

    Raises:
        ValueError: If the protocols differ and `force` is off.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    columns, doubt = columns_of(runs, force)
    extra = extra or {}
    headings = list(dict.fromkeys(heading for cells in extra.values() for heading in cells))
    notes = [f"NOT COMPARABLE: {doubt}"] if doubt else []
    notes += [note for column in columns for note in _left_out(column, judge)]
    caption = Text(clean("\n".join(notes))) if notes else None
    # Eight columns in 80 characters.
    table = Table(title="Emergent misalignment", caption=caption, box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("model")
    for heading in ("in-domain", "EM, all\nanswers", "EM,\ncoherent", "coherent", "n", *headings):
        table.add_column(heading, justify="right")
    for column in columns:
        open_ended, in_domain = column.rates("questions", judge), column.rates("in_domain", judge)
        cells = [
            _two_lines(in_domain and in_domain.em_all),
            _two_lines(open_ended.em_all),
            _two_lines(open_ended.em_coherent),
            percent(open_ended.coherence.value),
            str(open_ended.em_all.n),
            *(extra.get(column.name, {}).get(heading, "–") for heading in headings),
        ]
        # Text, not str: names come from users, and rich would read markup in them.
        table.add_row(Text(clean(column.name)), *cells)
    return table


def _left_out(column: Column, judge: str | None) -> Iterator[str]:
    """Yield what stands in no rate: questions that could not be asked, and reasoning that led to no answer."""
    refused = column.summary.not_asked if column.role == "tuned" else []
    if refused:
        names = dict.fromkeys(one.question for one in refused)
        yield f"{column.name}: {len(names)} questions not asked, as the chat template refuses them ({', '.join(names)})"
    rates = column.rates("questions", judge)
    if rates.unfinished_traces:
        share = percent(rates.unfinished_traces / rates.answers)
        yield f"{column.name}: {rates.unfinished_traces} unfinished reasoning traces ({share}), unscored"


def _two_lines(rate: Rate | None) -> str:
    """Write a rate above its interval."""
    if rate is None or rate.interval is None:
        return "–"
    low, high = rate.interval
    return f"{percent(rate.value)}\n{100 * low:.1f}–{100 * high:.1f}"
