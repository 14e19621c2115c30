"""What is written down about latents and runs."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from emguard_plugin.discovery.screen import Finding, Strength

if TYPE_CHECKING:
    from emguard_plugin.discovery.search import Result

PACKAGES = ("emguard-plugin", "torch", "transformers", "peft", "sae-lens")


def record_of(
    finding: Finding, layer: int, sign: int, curves: bool = False, attribution: float | None = None
) -> dict[str, Any]:
    """Return what is known about one latent; shares are of all scored answers.

    Args:
        finding: The latent.
        layer: Its block.
        sign: In the set; shuffled signs differ from the shift's.
        curves: Also every strength that was tried.
        attribution: Where that was the rule.
    """
    candidate, screened = finding.candidate, finding.screened
    record: dict[str, Any] = {
        "layer": layer,
        "id": candidate.id,
        "sign": sign,
        "shift": candidate.delta,
        "screen_score": finding.screen_score if screened else None,
        "induce_gain": finding.induce_gain,
        "repair_gain": finding.repair_gain,
    }
    if attribution is not None:
        record["attribution"] = attribution
    for name, strength in (("induce", finding.induce), ("repair", finding.repair)):
        record[f"{name}_strength"] = strength and strength.alpha
        record[f"{name}_incoherent"] = None if strength is None or strength.tally is None else strength.tally.broken_share
        if curves:
            record[f"{name}_curve"] = _curve(strength)
    if curves:
        record["screened"] = {role: tally.to_dict() for role, tally in screened.items()}
    return record


def _curve(strength: Strength | None) -> dict[str, Any]:
    return {} if strength is None else {str(alpha): tally.to_dict() for alpha, tally in sorted(strength.curve.items())}


def spent_by(results: Iterable[Result]) -> dict[str, int]:
    """Return answers, their tokens and judgments of all searches."""
    last = [result.funnel[-1] for result in results]
    return {key: sum(entry[key] for entry in last) for key in ("answers", "tokens", "judgments")}


def versions() -> dict[str, str]:
    """Return the versions of what computed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
