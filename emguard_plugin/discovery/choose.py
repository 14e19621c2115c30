"""From what the stages found to a set K; and sets united over layers, rounds and sources."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from emguard_plugin.discovery.screen import Finding
from emguard_plugin.discovery.settings import Rule
from emguard_plugin.discovery.shift import Candidate
from emguard_plugin.latents import SubsetEncoder

_PER_LATENT = ("weight", "bias", "directions", "threshold", "gate_weight", "gate_bias")


def baseline(
    rule: Rule, size: int, pool: Sequence[Candidate], shortlist: Sequence[Finding], valid: Sequence[Candidate], seed: int
) -> list[Candidate]:
    """Return the set of a baseline rule.

    Args:
        rule: `top_shift`: the largest |Delta|. `random`: any candidates. `screen`: the best of stage 2. `repair`: the best
            repair of stage 3, whatever it induces. `shuffled_signs`, `k_plus`, `k_minus`: of the valid set, with signs drawn
            anew, or one sign alone; the paper's ablations (its Figure 26), to which a set is compared.
        size: Latents in the set.
        pool: All candidates, largest |Delta| first.
        shortlist: What stage 2 kept, best first.
        valid: The set of `valid_reduc`.
        seed: Draws latents and signs.
    """
    rng = random.Random(f"{rule}-{seed}")
    if rule == "top_shift":
        return list(pool[:size])
    if rule == "random":
        return rng.sample(list(pool), min(size, len(pool)))
    if rule == "screen":
        return [finding.candidate for finding in shortlist[:size]]
    if rule == "repair":
        ranked = sorted(shortlist, key=lambda f: (-(f.repair_gain or 0.0), -abs(f.candidate.delta), f.candidate.id))
        return [f.candidate for f in ranked if (f.repair_gain or 0.0) > 0][:size]
    if rule == "shuffled_signs":
        signs = [c.sign for c in valid]
        if len(set(signs)) == 1:  # shuffling equal signs changes nothing: half of them are turned over
            signs[::2] = [-sign for sign in signs[::2]]
        rng.shuffle(signs)
        return [Candidate(c.id, c.delta, sign) for c, sign in zip(valid, signs, strict=True)]
    wanted = {"k_plus": (1,), "k_minus": (-1,)}.get(rule, (1, -1))
    return [c for c in valid if c.sign in wanted]


def unite(groups: Iterable[Sequence[SubsetEncoder]], scores: Iterable[dict[str, Any]]) -> tuple[list[SubsetEncoder], list[dict[str, Any]]]:
    """Unite sets of encoders: one encoder per layer, each latent once, with the record that ranks it highest.

    Args:
        groups: Encoders of each set, found on one base model.
        scores: Records of all sets; of two about one latent, the one with the larger repair gain stays, then attribution.

    Returns:
        The encoders in order of layers, and the records of what they hold, best first.

    Raises:
        ValueError: If two encoders of a layer are of different kinds or SAEs of different width.
    """
    best: dict[tuple[int, int], dict[str, Any]] = {}
    for record in scores:
        key = record["layer"], record["id"]
        if key not in best or _rank(record) > _rank(best[key]):
            best[key] = record
    layers: dict[int, list[SubsetEncoder]] = {}
    for encoder in (encoder for group in groups for encoder in group):
        layers.setdefault(encoder.layer, []).append(encoder)
    united = [_join(parts, best) for _, parts in sorted(layers.items())]
    kept = [best[e.layer, i] for e in united for i in e.ids if (e.layer, i) in best]
    return united, kept


def _rank(record: dict[str, Any]) -> tuple[float, float]:
    return record.get("repair_gain") or 0.0, record.get("attribution") or 0.0


def _join(parts: Sequence[SubsetEncoder], best: dict[tuple[int, int], dict[str, Any]]) -> SubsetEncoder:
    first = parts[0]
    for other in parts[1:]:
        for name in ("architecture", "mode", "norm", "width", "k"):
            if getattr(other, name) != getattr(first, name):
                raise ValueError(
                    f"layer {first.layer}: the sets to unite differ in {name}, {getattr(first, name)} and {getattr(other, name)}. "
                    "Latents of one layer must come from one SAE, in one mode."
                )
    rows: dict[int, tuple[SubsetEncoder, int]] = {}
    for part in parts:
        for at, latent in enumerate(part.ids):
            known = rows.get(latent)
            if known and not torch.allclose(known[0].weight[known[1]], part.weight[at]):
                raise ValueError(f"layer {first.layer}: latent {latent} differs in the sets to unite, so they come from two SAEs.")
            rows.setdefault(latent, (part, at))
    signs = [best.get((first.layer, i), {}).get("sign", int(part.signs[at])) for i, (part, at) in rows.items()]
    tensors = {
        name: torch.stack([getattr(part, name)[at] for part, at in rows.values()])
        for name in _PER_LATENT
        if getattr(first, name) is not None
    }
    whole = {name: getattr(first, name) for name in ("cut_weight", "cut_bias", "norm", "k")}
    return SubsetEncoder(
        layer=first.layer, ids=list(rows), signs=torch.tensor(signs, dtype=torch.float32), architecture=first.architecture,
        mode=first.mode, **tensors, **whole,
    )  # fmt: skip
