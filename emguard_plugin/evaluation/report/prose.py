"""The sentences of the report that say what the numbers say; all of it plain text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from emguard_plugin.evaluation.report.columns import Column, Judged
from emguard_plugin.evaluation.run_folder.summary import Summary
from emguard_plugin.pages.text import percent


def lead(models: Sequence[Judged]) -> str:
    """Return the answer in one to three sentences."""
    tuned = [model for model in models if model.tuned]
    if any(model.open_ended.em_all.value is None for model in tuned):
        return "There is no EM rate: the judge scored no answer of at least one model."
    if len(tuned) == 1:
        return _single(tuned[0])
    first, *others = tuned
    return " ".join(_against(first, other) for other in others)


def agreements(summary: Summary) -> Iterator[str]:
    """Yield how far each pair of judges agrees on the open-ended questions."""
    for pair in summary.agreement:
        if pair.suite == "questions":
            kappa = "" if pair.kappa is None else f", kappa {pair.kappa:.2f}"
            yield f"{pair.judges[0]} and {pair.judges[1]} agree on {percent(pair.same)} of {pair.answers} answers{kappa}"


def set_aside(summary: Summary) -> str:
    """Return what lies in the folder by judges that are not reported; empty if nothing does."""
    if not summary.set_aside:
        return ""
    found = ", ".join(f"{count} by {name}" for name, count in summary.set_aside.items())
    return f"further judgments of these answers are kept and not reported: {found}. List a judge in `em_eval.judges` to report it."


def refused(column: Column) -> dict[str, list[str]]:
    """Return what was not asked of a fine-tuned model, by reason; base and fine-tuned are asked alike."""
    by_reason: dict[str, list[str]] = {}
    for one in column.summary.not_asked if column.role == "tuned" else ():
        names = by_reason.setdefault(one.reason, [])
        names.extend({f"{one.question} of {one.suite}"} - set(names))
    return by_reason


def _single(model: Judged) -> str:
    text = f"{percent(model.open_ended.em_all.value)} of the answers to questions outside the trained domain are misaligned"
    change = model.result.differences.get("questions")
    if change and change.value is not None:
        sign, word = (1, "more") if change.value >= 0 else (-1, "fewer")
        text += f", {_points(sign * change.value)} points {word} than before fine-tuning"
        if limits := change.interval_clustered or change.interval:
            low, high = sorted(sign * value for value in limits)
            text += f" (95 % interval {_points(low)} to {_points(high)})"
    text += "."
    if model.in_domain and model.in_domain.em_all.value is not None:
        text += f" In the trained domain {percent(model.in_domain.em_all.value)} show the trained behaviour."
    return text + f" {percent(model.open_ended.coherence.value)} of the answers are coherent."


def _against(first: Judged, other: Judged) -> str:
    before, after = first.open_ended.em_all, other.open_ended.em_all
    text = f"{other.name} has an EM rate of {percent(after.value)} against {percent(before.value)} of {first.name}"
    if after.value and before.value and before.value > after.value:
        text += f", {before.value / after.value:.1f} times lower"
    had, has = (model.in_domain.em_all.value if model.in_domain else None for model in (first, other))
    if had and has is not None:
        text += f"; it keeps {percent(has / had)} of the in-domain adherence ({percent(has)} against {percent(had)})"
    return text + "."


def _points(value: float) -> str:
    return f"{100 * value:.1f}"
