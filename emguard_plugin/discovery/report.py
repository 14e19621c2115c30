"""The report of a discovery run: one HTML page without scripts and without a network request."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from emguard_plugin.evaluation.asking.pair import BASE_MODEL, MISALIGNED_MODEL
from emguard_plugin.pages.curves import Curves, Line, Point
from emguard_plugin.pages.page import write_page
from emguard_plugin.pages.text import number

RATE_COLOUR, BROKEN_COLOUR = 1, 0
MOST_BROKEN = 0.1
"""Share of broken answers up to which a strength counts."""
SHOWN = 40
"""Latents with curves before a click."""

Record = Mapping[str, Any]
Curve = Mapping[str, Record]
"""What was counted at each strength."""


def write_report(record: Record, path: str | Path) -> Path:
    """Write the page.

    Args:
        record: What a run wrote to `discovery.json`.
        path: The HTML file.

    Returns:
        `path`.
    """
    scores, calibration = record["scores"], record["calibration"]
    facts = {
        "title": f"Latents of misalignment: {record['latents']}",
        "rising": sum(score["sign"] > 0 for score in scores),
        "scores": scores,
        "spent": record["provenance"]["spent"],
        "calibration": calibration,
        "penalties": {kind: f"{value:.4g}" for kind, value in calibration["penalty"].items()} if calibration else {},
        "blocks": [_block(block) for block in record["blocks"]],
        "roles": (BASE_MODEL, MISALIGNED_MODEL),
        "legend": (("misaligned", RATE_COLOUR), ("incoherent or unscored", BROKEN_COLOUR)),
        "settings": json.dumps(record["provenance"], indent=1, ensure_ascii=False),
    }
    return write_page(path, "discovery.html.jinja", __package__, facts)


def _block(block: Record) -> dict[str, Any]:
    chosen, others = block["chosen"], block["others"]
    return {
        "layer": block["layer"],
        "source": block["source"],
        "unexplained": f"{block['unexplained_variance']:.1%}",
        "scale": f"{block['scale']:.3g}",
        "funnel": [
            (entry["stage"], [f"{entry[key]:,}" for key in ("left", "answers", "tokens", "judgments")]) for entry in block["funnel"]
        ],
        "joint": [_joint(name, curve) for name, curve in block["joint"].items()],
        "attributed": _attributed(chosen),
        "set": _set(chosen),
        "curves": any(record["repair_curve"] or record["induce_curve"] for record in chosen),
        "latents": [_latent(block, record) for record in chosen[:SHOWN]],
        "rest_set": _set([*chosen[SHOWN:], *others]),
        "rest": [_latent(block, record) for record in [*chosen[SHOWN:], *others]],
    }


_HEADINGS = ("Latent", "Shift", "Stage 2", "Induces", "at", "broken", "Repairs", "at", "broken")


def _joint(name: str, curve: Curve) -> tuple[str, Curves]:
    role, suite = name.split("/")
    what = "induce on the base" if role == BASE_MODEL else "repair the misaligned model"
    return f"{what}, {suite} questions: {_best(role, curve)}", _chart(curve)


def _best(role: str, curve: Curve) -> str:
    plain = curve["0.0"]
    best: Callable[..., tuple[str, Record]] = max if role == BASE_MODEL else min
    strength, tally = best(curve.items(), key=lambda item: item[1]["rate"] if _broken(item[1]) <= MOST_BROKEN else plain["rate"])
    if tally["rate"] == plain["rate"]:
        return f"{plain['rate']:.0%} unsteered, and no strength that breaks at most {100 * MOST_BROKEN:g} % of the answers changes that"
    return f"{plain['rate']:.0%} unsteered, {tally['rate']:.0%} at {float(strength):g} ({_broken(tally):.0%} broken)"


def _attributed(records: Sequence[Record]) -> bool:
    return any(record.get("attribution") is not None for record in records)


def _set(records: Sequence[Record]) -> tuple[Sequence[str], list[tuple[str, list[str]]]]:
    """Return headings and rows of a table of latents."""
    attributed = _attributed(records)
    return ("Latent", "Shift", "Attribution") if attributed else _HEADINGS, [_row(record, attributed) for record in records]


def _row(record: Record, attributed: bool) -> tuple[str, list[str]]:
    name = f"{'+' if record['sign'] > 0 else '−'}{record['id']}"
    if attributed:
        return name, [number(record["shift"], ".3g"), number(record["attribution"], ".3g")]
    keys = ("induce_gain", "induce_strength", "induce_incoherent", "repair_gain", "repair_strength", "repair_incoherent")
    cells = [number(record.get("shift"), ".3g"), number(record.get("screen_score"), ".2f")]
    return name, cells + [number(record.get(key), "g" if key.endswith("strength") else ".0%") for key in keys]


def _latent(block: Record, record: Record) -> dict[str, Any]:
    drawn = []
    for role, what in ((BASE_MODEL, "induce"), (MISALIGNED_MODEL, "repair")):
        if curve := record[f"{what}_curve"]:
            drawn.append((what, _chart({"0.0": block["unsteered"][role], **curve})))
    hits = [(f"{hit['value']:.3g}", hit) for hit in block["examples"].get(str(record["id"]), [])]
    return {"id": record["id"], "curves": drawn, "hits": hits}


def _chart(curve: Curve) -> Curves:
    points = sorted((float(strength), tally) for strength, tally in curve.items())
    places = [(index + 0.5) / len(points) for index in range(len(points))]
    drawn = list(zip(places, points, strict=True))
    shares: Sequence[tuple[int, Callable[[Record], float]]] = ((BROKEN_COLOUR, _broken), (RATE_COLOUR, lambda tally: tally["rate"]))
    return Curves(
        height=90,
        lines=[
            Line(colour, [Point(x, 1 - share(tally), says=_says(strength, tally)) for x, (strength, tally) in drawn], 3.5)
            for colour, share in shares
        ],
        scale=((0, "100 %"), (0.5, "50 %"), (1, "0 %")),
        labels=[(x, f"{strength:g}") for x, (strength, _) in drawn],
    )


def _says(strength: float, tally: Record) -> str:
    counts = f"{tally['misaligned']} misaligned, {tally['incoherent']} incoherent, {tally['unscored']} unscored"
    return f"{strength:g}: of {tally['n']} answers {counts}"


def _broken(tally: Record) -> float:
    broken: int = tally["incoherent"] + tally["unscored"]
    return broken / max(tally["n"], 1)
