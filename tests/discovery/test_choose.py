"""Baseline sets, and sets united."""

import pytest
import torch

from emguard_plugin.discovery.choose import baseline, unite
from emguard_plugin.discovery.screen import Finding
from emguard_plugin.discovery.shift import Candidate
from emguard_plugin.latents.sae import subset
from tests.discovery.parts import standard_sae

POOL = [Candidate(i, 9.0 - i, 1 if i % 3 else -1) for i in range(9)]
SHORT = [Finding(c, screen_score=float(c.id), repair_gain=0.1 * (c.id - 5)) for c in reversed(POOL)]
VALID = POOL[4:8]


def chosen(rule, valid=VALID, seed=0):
    return baseline(rule, 3, POOL, SHORT, valid, seed)


def test_rules():
    assert [c.id for c in chosen("top_shift")] == [0, 1, 2]
    assert [c.id for c in chosen("screen")] == [8, 7, 6]
    assert [c.id for c in chosen("repair")] == [8, 7, 6]
    assert [c.id for c in chosen("k_plus")] == [4, 5, 7]
    assert [c.id for c in chosen("k_minus")] == [6]
    assert chosen("random") == chosen("random")
    assert len({tuple(c.id for c in chosen("random", seed=s)) for s in range(5)}) > 1


@pytest.mark.parametrize("valid", [VALID, [c for c in VALID if c.sign > 0]])
def test_shuffled_signs_are_never_the_found_ones_throughout(valid):
    seeds = [[c.sign for c in chosen("shuffled_signs", valid, seed)] for seed in range(6)]
    assert all([c.id for c in chosen("shuffled_signs", valid, s)] == [c.id for c in valid] for s in range(6))
    assert any(signs != [c.sign for c in valid] for signs in seeds)


def test_of_two_records_the_one_that_repairs_more_decides_the_sign():
    sae = standard_sae(layer=1)
    first, second = subset(sae, [3, 5], [1, 1]), subset(sae, [5, 9], [-1, 1])
    scores = [
        {"layer": 1, "id": 3, "sign": 1, "repair_gain": 0.2}, {"layer": 1, "id": 5, "sign": 1, "repair_gain": 0.1},
        {"layer": 1, "id": 5, "sign": -1, "repair_gain": 0.4}, {"layer": 1, "id": 9, "sign": 1, "repair_gain": None},
    ]  # fmt: skip
    encoders, records = unite([[first], [second]], scores)
    assert encoders[0].ids == [3, 5, 9]
    assert encoders[0].signs.tolist() == [1, -1, 1]
    assert [r["repair_gain"] for r in records] == [0.2, 0.4, None]
    h = torch.randn(4, 32)
    whole = subset(sae, [3, 5, 9], [1, -1, 1])
    assert torch.allclose(encoders[0].encode(h), whole.encode(h), atol=1e-6)


def test_latents_of_two_saes_are_not_mixed():
    parts = [[subset(standard_sae(seed=seed), [1, 2], [1, 1])] for seed in (0, 1)]
    with pytest.raises(ValueError, match="latent 1 differs in the sets to unite"):
        unite(parts, [])
    with pytest.raises(ValueError, match="differ in mode"):
        unite([[subset(standard_sae(), [1], [1], mode)] for mode in ("relu_pre", "sae")], [])
