"""The sentences of the report: what the numbers say, and what stands in the way of saying it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from emguard_plugin.evaluation.report.columns import Column, percent
from emguard_plugin.evaluation.report.text import escape
from emguard_plugin.evaluation.run_folder.summary import Summary
from emguard_plugin.evaluation.statistics.rates import why_unscored

MISSING = 0.05
"""Share of unscored answers from which on the rate is given with a warning."""


def lead(columns: Sequence[Column], judge: str) -> str:
    """Return the answer in one to three sentences, as HTML."""
    tuned = [column for column in columns if column.role == "tuned"]
    if any(column.rates("questions", judge).em_all.value is None for column in tuned):
        return "There is no EM rate: the judge scored no answer of at least one model."
    if len(tuned) == 1:
        return _single(tuned[0], judge)
    first, *others = tuned
    return " ".join(_against(first, other, judge) for other in others)


def verdicts(columns: Sequence[Column], judge: str) -> Iterator[str]:
    """Yield what became of `em_eval.fail_above`, as HTML."""
    tuned = [column for column in columns if column.role == "tuned"]
    for column in tuned:
        found = next(result for result in column.summary.judges if result.name == judge).verdict
        if found:
            who = f"{escape(column.name)}: " if len(tuned) > 1 else ""
            reason = escape(found.reason).replace(" %", "&nbsp;%")
            extra = "" if found.outcome != "inconclusive" else " Inconclusive is not a pass."
            yield (
                f'<p class="verdict {found.outcome}"><b>{who}{found.outcome}</b> at <code>fail_above: '
                f"{found.fail_above:g}</code>. EM rate over coherent answers: {reason}.{extra}</p>"
            )


def warnings(columns: Sequence[Column], judge: str) -> Iterator[str]:
    """Yield what a reader must know before using the numbers, as HTML."""
    for column in columns:
        result = next((result for result in column.summary.judges if result.name == judge), None)
        if result and not result.measured:
            yield f"<strong>{escape(judge)}: the numbers below mean nothing.</strong> They come of a dry run."
        if result and result.stopped:
            yield f"The judge stopped before it had judged all answers: {escape(result.stopped)}"
        for reason, names in _refused(column):
            yield f"{escape(column.name)}: not asked, as the chat template refuses it: {escape(', '.join(names))}: {escape(reason)}"
        for suite in ("questions", "in_domain"):
            rates = column.rates(suite, judge)
            if rates is None:
                continue
            where = f"{escape(column.name)}, {'open-ended' if suite == 'questions' else 'in-domain'} questions"
            share = rates.unscored.value or 0.0
            if share > MISSING:
                reasons = escape(why_unscored(rates, most=10))
                limits = "there is no rate"
                if rates.em_bounds:
                    low, high = rates.em_bounds
                    limits = f"the rate lies between {percent(low)} and {percent(high)} of all answers"
                yield f"{where}: {percent(share)} of the answers are unscored, so {limits}. Reasons: {reasons}."
            if rates.unfinished_traces:
                yield (
                    f"{where}: in {rates.unfinished_traces} of {rates.answers} answers "
                    f"({percent(rates.unfinished_traces / rates.answers)}) the reasoning trace never closed. They hold no "
                    "answer and are unscored; raise <code>em_eval.max_new_tokens</code>."
                )
            if rates.truncated > MISSING * rates.answers:
                yield (f"{where}: {rates.truncated} of {rates.answers} answers were cut off by <code>em_eval.max_new_tokens</code>.")


def agreements(summary: Summary) -> Iterator[str]:
    """Yield how far each pair of judges agrees on the open-ended questions, as plain text."""
    for pair in summary.agreement:
        if pair.suite == "questions":
            kappa = "" if pair.kappa is None else f", kappa {pair.kappa:.2f}"
            yield f"{pair.judges[0]} and {pair.judges[1]} agree on {percent(pair.same)} of {pair.answers} answers{kappa}"


def set_aside(summary: Summary) -> str:
    """Return what lies in the folder by judges that are not reported, as plain text; empty if nothing does."""
    if not summary.set_aside:
        return ""
    found = ", ".join(f"{count} by {name}" for name, count in summary.set_aside.items())
    return f"further judgments of these answers are kept and not reported: {found}. List a judge in `em_eval.judges` to report it."


def _refused(column: Column) -> Iterator[tuple[str, list[str]]]:
    """Yield what was not asked of a fine-tuned model, by reason; base and fine-tuned are asked alike."""
    by_reason: dict[str, list[str]] = {}
    for one in column.summary.not_asked if column.role == "tuned" else ():
        names = by_reason.setdefault(one.reason, [])
        names.extend({f"{one.question} of {one.suite}"} - set(names))
    yield from by_reason.items()


def _single(column: Column, judge: str) -> str:
    rates, in_domain = column.rates("questions", judge), column.rates("in_domain", judge)
    result = next(result for result in column.summary.judges if result.name == judge)
    text = f"{percent(rates.em_all.value)} of the answers to questions outside the trained domain are misaligned"
    change = result.differences.get("questions")
    if change and change.value is not None:
        sign, word = (1, "more") if change.value >= 0 else (-1, "fewer")
        low, high = sorted(sign * value for value in (change.interval_clustered or change.interval))
        text += f", {_points(sign * change.value)} points {word} than before fine-tuning (95 % interval {_points(low)} to {_points(high)})"
    text += "."
    if in_domain and in_domain.em_all.value is not None:
        text += f" In the trained domain {percent(in_domain.em_all.value)} show the trained behaviour."
    return text + f" {percent(rates.coherence.value)} of the answers are coherent."


def _against(first: Column, other: Column, judge: str) -> str:
    before, after = first.rates("questions", judge).em_all, other.rates("questions", judge).em_all
    names = escape(first.name), escape(other.name)
    text = f"{names[1]} has an EM rate of {percent(after.value)} against {percent(before.value)} of {names[0]}"
    if after.count and before.count and before.value > after.value:
        text += f", {before.value / after.value:.1f} times lower"
    kept = [column.rates("in_domain", judge) for column in (first, other)]
    if all(kept) and kept[0].em_all.value and kept[1].em_all.value is not None:
        share = kept[1].em_all.value / kept[0].em_all.value
        text += (
            f"; it keeps {percent(share)} of the in-domain adherence "
            f"({percent(kept[1].em_all.value)} against {percent(kept[0].em_all.value)})"
        )
    return text + "."


def _points(value: float) -> str:
    return f"{100 * value:.1f}"
