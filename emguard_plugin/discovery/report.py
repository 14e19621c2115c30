"""The report of a discovery run: one HTML page without scripts and without a network request."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from emguard_plugin.evaluation.asking.pair import BASE_MODEL, MISALIGNED_MODEL
from emguard_plugin.evaluation.report.page import html_page
from emguard_plugin.evaluation.report.text import escape

RATE_COLOUR, BROKEN_COLOUR, HEIGHT = 1, 0, 90
SHOWN = 40
"""Latents with curves before a click."""

Curve = Mapping[str, Mapping[str, Any]]


def write_report(record: Mapping[str, Any], path: str | Path) -> Path:
    """Write the page.

    Args:
        record: What a run wrote to `discovery.json`.
        path: The HTML file.
    """
    path = Path(path)
    title = f"Latents of misalignment: {record['latents']}"
    parts = [f"<h1>{escape(title)}</h1>", *_lead(record)]
    for block in record["blocks"]:
        parts += _block(block)
    parts += _about(record)
    path.write_text(html_page(title, parts), encoding="utf-8")
    return path


def _lead(record: Mapping[str, Any]) -> Iterator[str]:
    spent, scores = record["provenance"]["spent"], record["scores"]
    plus = sum(score["sign"] > 0 for score in scores)
    yield (
        f'<p class="lead">{len(scores)} latents: {plus} that rise with misalignment and {len(scores) - plus} that fall. '
        f"{spent['answers']:,} answers of {spent['tokens']:,} tokens, {spent['judgments']:,} judgments.</p>"
    )
    if calibration := record["calibration"]:
        cells = "".join(f"<tr><th>{escape(kind)}</th><td>{value:.4g}</td></tr>" for kind, value in calibration["penalty"].items())
        yield "<h2>The unguarded model's own penalty</h2>"
        yield (
            '<p class="note">On its narrow training chats, per supervised token: the yardstick. Where it is near 0, blocking these '
            f"tokens constrains nothing. Gap of the task loss: {calibration['task_loss_gap']:.3f} nats per token.</p>"
        )
        yield f"<table><thead><tr><th>Tokens</th><th>Penalty</th></tr></thead><tbody>{cells}</tbody></table>"


def _block(block: Mapping[str, Any]) -> Iterator[str]:
    yield f"<h2>Block {block['layer']}</h2>"
    yield (
        f'<p class="note">SAE {escape(block["source"])}; it leaves {block["unexplained_variance"]:.1%} of the variance unexplained. '
        f"Strengths are in units of {block['scale']:.3g}, the median norm of the residual stream.</p>"
    )
    yield "<h3>Funnel</h3>"
    rows = []
    for entry in block["funnel"]:
        numbers = "".join(f"<td>{entry[key]:,}</td>" for key in ("left", "answers", "tokens", "judgments"))
        rows.append(f"<tr><th>{escape(entry['stage'])}</th>{numbers}</tr>")
    yield _table(("Stage", "Latents left", "Answers so far", "Tokens", "Judgments"), rows)
    yield from _whole_set(block)
    yield from _latents(block)


def _whole_set(block: Mapping[str, Any]) -> Iterator[str]:
    yield "<h3>All latents of the set together</h3>"
    yield (
        '<p class="note">Share of misaligned and of broken answers over the strength: the base pushed along the signed sum of the '
        "set's unit directions, the misaligned model pushed back. Each latent weighs the same in it, whatever the fine-tune did.</p>"
    )
    yield _legend()
    for name, curve in block["joint"].items():
        role, suite = name.split("/")
        what = "induce on the base" if role == BASE_MODEL else "repair the misaligned model"
        yield f'<p class="note">{what}, {escape(suite)} questions: {escape(_best(role, curve))}</p>{_chart(curve)}'


def _best(role: str, curve: Curve) -> str:
    plain = curve.get("0.0")
    picked = max if role == BASE_MODEL else min
    strength, tally = picked(curve.items(), key=lambda item: item[1]["rate"] if _broken(item[1]) <= 0.1 else plain["rate"])
    if tally["rate"] == plain["rate"]:
        return f"{plain['rate']:.0%} unsteered, and no strength that breaks at most 10 % of the answers changes that"
    return f"{plain['rate']:.0%} unsteered, {tally['rate']:.0%} at {float(strength):g} ({_broken(tally):.0%} broken)"


def _latents(block: Mapping[str, Any]) -> Iterator[str]:
    chosen, others = block["chosen"], block["others"]
    yield "<h3>The set</h3>"
    if _attributed(chosen):
        yield (
            "<p class=\"note\">By attribution, which is emguard's own rule: a latent's share in how much the fine-tune prefers the "
            "misaligned answers, in nats per question. No latent was steered alone, so there are no curves.</p>"
        )
    yield _set_table(chosen)
    yield "<h3>Latent by latent</h3>"
    if any(record["repair_curve"] or record["induce_curve"] for record in chosen):
        yield _legend()
    for record in chosen[:SHOWN]:
        yield from _latent(block, record)
    if rest := [*chosen[SHOWN:], *others]:
        yield f"<details><summary>{len(rest)} more</summary>"
        yield _set_table(rest)
        for record in rest:
            yield from _latent(block, record)
        yield "</details>"


def _attributed(records: Sequence[Mapping[str, Any]]) -> bool:
    return any(record.get("attribution") is not None for record in records)


def _set_table(records: Sequence[Mapping[str, Any]]) -> str:
    if not _attributed(records):
        return _table(_HEADINGS, [_row(record) for record in records])
    numbers = [(_name(r), _number(r["shift"], ".3g"), _number(r["attribution"], ".3g")) for r in records]
    rows = [f"<tr><th>{name}</th><td>{shift}</td><td>{share}</td></tr>" for name, shift, share in numbers]
    return _table(("Latent", "Shift", "Attribution"), rows)


def _name(record: Mapping[str, Any]) -> str:
    return f"{({1: '+', -1: '−'})[record['sign']]}{record['id']}"


_HEADINGS = ("Latent", "Shift", "Stage 2", "Induces", "at", "broken", "Repairs", "at", "broken")


def _row(record: Mapping[str, Any]) -> str:
    keys = ("induce_gain", "induce_strength", "induce_incoherent", "repair_gain", "repair_strength", "repair_incoherent")
    cells = [_number(record.get("shift"), ".3g"), _number(record.get("screen_score"), ".2f")]
    cells += [_number(record.get(key), "g" if key.endswith("strength") else ".0%") for key in keys]
    return f"<tr><th>{_name(record)}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _latent(block: Mapping[str, Any], record: Mapping[str, Any]) -> Iterator[str]:
    yield f'<div class="group"><h3>Latent {record["id"]}</h3>'
    for role, what in ((BASE_MODEL, "induce"), (MISALIGNED_MODEL, "repair")):
        if curve := record[f"{what}_curve"]:
            yield f'<p class="note">{what}</p>{_chart({"0.0": block["unsteered"][role], **curve})}'
    for hit in block["examples"].get(str(record["id"]), []):
        yield (
            f'<p class="note">{hit["value"]:.3g}: {escape(hit["before"])} <b>{escape(hit["token"])}</b> {escape(hit["after"])} '
            f"<small>(a conversation with the {escape(hit['answer_of'])} model)</small></p>"
        )
    yield "</div>"


def _legend() -> str:
    return (
        f'<div class="legend"><span class="key c{RATE_COLOUR}">misaligned</span>'
        f'<span class="key c{BROKEN_COLOUR}">incoherent or unscored</span></div>'
    )


def _chart(curve: Curve) -> str:
    points = sorted((float(strength), tally) for strength, tally in curve.items())
    places = [100 * (index + 0.5) / len(points) for index in range(len(points))]
    lines = [
        _line(list(zip(places, points, strict=True)), colour, share)
        for colour, share in ((BROKEN_COLOUR, _broken), (RATE_COLOUR, lambda tally: tally["rate"]))
    ]
    labels = "".join(f'<span style="left:{x:.2f}%">{strength:g}</span>' for x, (strength, _) in zip(places, points, strict=True))
    scale = "".join(f'<span style="top:{top}%">{share}</span>' for top, share in ((0, "100 %"), (50, "50 %"), (100, "0 %")))
    return (
        f'<div class="curve"><div class="scale" style="height:{HEIGHT}px" aria-hidden="true">{scale}</div>'
        f'<div><svg class="lane chart" height="{HEIGHT}">{"".join(lines)}</svg><div class="axis" aria-hidden="true">{labels}</div></div></div>'
    )


def _line(points: Sequence[tuple[float, tuple[float, Mapping[str, Any]]]], colour: int, share: Any) -> str:
    drawn = [(x, 100 * (1 - share(tally)), strength, tally) for x, (strength, tally) in points]
    edges = "".join(
        f'<line class="edge" x1="{a:.2f}%" y1="{p:.2f}%" x2="{b:.2f}%" y2="{q:.2f}%"/>' for (a, p, *_), (b, q, *_) in pairwise(drawn)
    )
    dots = "".join(
        f'<circle cx="{x:.2f}%" cy="{y:.2f}%" r="3.5"><title>{strength:g}: of {tally["n"]} answers {tally["misaligned"]} misaligned, '
        f"{tally['incoherent']} incoherent, {tally['unscored']} unscored</title></circle>"
        for x, y, strength, tally in drawn
    )
    return f'<g class="c{colour}">{edges}{dots}</g>'


def _broken(tally: Mapping[str, Any]) -> float:
    return (tally["incoherent"] + tally["unscored"]) / max(tally["n"], 1)


def _about(record: Mapping[str, Any]) -> Iterator[str]:
    yield "<h2>Protocol</h2>"
    yield (
        '<p class="note">A share counts all scored answers, refusals and incoherent ones included; an incoherent answer is never '
        f"misaligned. Roles: {BASE_MODEL}, {MISALIGNED_MODEL}.</p>"
    )
    shown = json.dumps(record["provenance"], indent=1, ensure_ascii=False)
    yield f"<details><summary>Everything that was set</summary><pre>{escape(shown)}</pre></details>"


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form).replace("-", "−")


def _table(headings: Sequence[str], rows: Sequence[str]) -> str:
    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    return f'<div class="wide figures"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
