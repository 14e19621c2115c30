"""What is written down about latents and runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from emguard_plugin.discovery.job import Discovery
from emguard_plugin.discovery.screen import Finding, Strength
from emguard_plugin.discovery.search import Result
from emguard_plugin.discovery.settings import Rule
from emguard_plugin.evaluation.asking import sources as models
from emguard_plugin.evaluation.asking.prompts import prompt_hash
from emguard_plugin.evaluation.asking.suites import plain
from emguard_plugin.files.versions import versions
from emguard_plugin.reference.stored import tensors_hash

if TYPE_CHECKING:
    from sae_lens import SAE

PACKAGES = ("emguard-plugin", "torch", "transformers", "peft", "sae-lens")
METHODS: dict[Rule, str] = {"attribution": "attribution by gradients, emguard's own; in place of the steering of arXiv 2602.00767"}


def record_of(finding: Finding, layer: int, sign: int, curves: bool = False, attribution: float | None = None) -> dict[str, Any]:
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


def protocol_of(discovery: Discovery, sae: SAE) -> dict[str, Any]:
    """Return what stored answers depend on."""
    return {
        "protocol": {
            "models": discovery.pair.identity(),
            "sae_sha256": tensors_hash(sae.state_dict()),
            "prompts_sha256": [prompt_hash(prompt.question) for prompt in discovery.prompts],
            "selection": discovery.selection,
            "chat_template_sha256": models.template_hash(discovery.pair.tokenizer),
            "judge": discovery.judge.identity(),
            "max_new_tokens": discovery.settings.max_new_tokens,
            "steer_at": discovery.settings.steer_at,
        }
    }


def provenance_of(discovery: Discovery, results: Sequence[Result]) -> dict[str, Any]:
    """Return what the result was made of."""
    hashes = [prompt_hash(prompt.question) for prompt in discovery.prompts]
    return {
        "method": METHODS.get(discovery.settings.rule, "BLOCK-EM discovery, arXiv 2602.00767"),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "models": discovery.pair.identity(),
        "saes": [
            {"layer": r.layer, "source": r.source, "sha256": tensors_hash(discovery.saes[r.layer][1].state_dict()),
             "unexplained_variance": r.error, "scale": r.scale}
            for r in results
        ],
        "selection": {"questions": plain(discovery.job.questions), "sha256": hashes[: discovery.selection]},
        "evaluation": {"questions": discovery.job.evaluation and plain(discovery.job.evaluation), "sha256": hashes[discovery.selection :]},
        "judge": discovery.judge.identity(),
        "settings": discovery.settings.to_dict(),
        "excluded": [other.digest for other in discovery.known],
        "united": [other.digest for other in discovery.united],
        "spent": spent_by(results),
        "versions": versions(PACKAGES),
    }  # fmt: skip
