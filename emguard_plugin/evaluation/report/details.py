"""What stands behind a click in the report: answers side by side, and the protocol in full."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence

from emguard_plugin.evaluation.judges.outcomes import UNSCORED, outcome
from emguard_plugin.evaluation.report.columns import Column, samples
from emguard_plugin.evaluation.report.plots import colour_of
from emguard_plugin.evaluation.report.text import escape

SAMPLES = {"questions": 14, "in_domain": 4}


def side_by_side(columns: Sequence[Column]) -> Iterator[str]:
    """Yield the answers of all models to the same draws, with what each judge made of them."""
    chosen = [one for suite, limit in SAMPLES.items() for one in samples(columns, suite, limit)]
    if not chosen:
        return
    yield "<h2>Answers side by side</h2>"
    yield (
        '<p class="note">The first draw of evenly spaced questions, chosen without regard to the answers; each row uses '
        "the same random numbers. A misaligned model's answers may be harmful.</p>"
    )
    suite = None
    for one in chosen:
        if one.suite != suite:
            suite = one.suite
            yield f"<h3>{'Outside the trained domain' if suite == 'questions' else 'In the trained domain'}</h3>"
        chips, texts = [], []
        for index, (column, answer) in enumerate(zip(columns, one.answers, strict=True)):
            if answer is None:
                continue
            colour = colour_of(index, columns)
            chips.append(f'<span class="chip c{colour}">{escape(column.name)}: {_verdicts(column, answer)}</span>')
            cut = " (cut off)" if answer["finish"] == "length" else ""
            texts.append(f'<section class="c{colour}"><h4>{escape(column.name)}{cut}</h4><p>{escape(_said(answer))}</p></section>')
        yield (
            f'<details><summary>{escape(one.asked)}<span class="chips">{"".join(chips)}</span></summary>'
            f'<div class="side">{"".join(texts)}</div></details>'
        )


def _verdicts(column: Column, answer: Mapping) -> str:
    said = {
        judge: outcome(row["aligned"], row["coherent"], row["status"]) if row else UNSCORED
        for judge in column.judges
        for row in [answer["said"].get(judge)]
    }
    if len(said) == 1:
        return next(iter(said.values()))
    return ", ".join(f"{made} ({escape(judge)})" for judge, made in said.items())


def _said(answer: Mapping) -> str:
    if answer.get("trace") is None:
        return answer["text"]
    return f"{answer['answer'] or 'No answer: the trace never closed.'}\n\nReasoning trace:\n{answer['trace']}"


def protocol(columns: Sequence[Column]) -> Iterator[str]:
    """Yield everything that a number depends on."""
    summary = columns[-1].summary
    yield "<h2>Protocol</h2>"
    yield '<p class="note">Results compare where the protocol is the same; its fingerprint is '
    yield f"<code>{escape(summary.fingerprint[:16])}</code>.</p>"
    models = {column.name: column.summary.models.get(column.role) for column in columns}
    content = {
        "suites": {column.name: column.summary.sources for column in columns if column.role == "tuned"},
        "protocol": summary.protocol,
        "models": models,
        "versions": {column.name: column.summary.versions for column in columns if column.role == "tuned"},
        "created": {column.name: column.summary.created for column in columns if column.role == "tuned"},
    }
    yield f"<pre>{escape(json.dumps(content, indent=2, ensure_ascii=False))}</pre>"
    yield "<details><summary>The first question as the model sees it</summary>"
    yield f"<pre>{escape(summary.example_prompt)}</pre></details>"
