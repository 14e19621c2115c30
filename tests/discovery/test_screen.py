"""Stages 2 and 3 on benches whose answers are known: halving decides as the published schedule does, for far fewer answers."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from emguard_plugin.discovery import plan
from emguard_plugin.discovery.bench import Ask
from emguard_plugin.discovery.screen import Screen, _descent, _everything, keep, run_together, rung_ends
from emguard_plugin.discovery.settings import Settings
from emguard_plugin.discovery.tally import Tally, allowed_broken
from emguard_plugin.evaluation.asking.pair import BASE_MODEL, MISALIGNED_MODEL
from tests.discovery.parts import ToyBench, hashed

SETTINGS = Settings(pool=40, shortlist=8, size=5)
PROMPTS = 44


def search(bench, settings, prompts=PROMPTS):
    screen = Screen(bench, range(prompts), settings)
    screen.ask_unsteered()
    shortlist = screen.shortlist(bench.pool())
    return shortlist, screen.calibrate(shortlist)


def figures(found):
    return [(f.candidate, f.induce.alpha, f.induce_gain, f.repair.alpha, f.repair_gain) for f in found]


@pytest.mark.parametrize("noise", [0, 1])
def test_halving_finds_the_set_of_the_published_schedule_with_a_fifth_of_the_answers(noise):
    full, fast = ToyBench(noise=noise), ToyBench(noise=noise)
    whole, short = search(full, SETTINGS.full())[1], search(fast, SETTINGS)[1]
    assert {f.candidate.id for f in short} <= set(range(6))
    assert figures(short) == figures(whole)
    assert len(full.asked) > 5 * len(fast.asked)


@given(st.integers(0, 10_000), st.integers(3, 30), st.integers(0, 9))
@hypothesis_settings(max_examples=60, deadline=None)
def test_descent_finds_exactly_the_largest_safe_strength_even_where_breaking_is_not_monotone(seed, prompts, allowed):
    class Random:
        def ask(self, asks):
            kinds = ("aligned", "misaligned", "incoherent")
            return {a: kinds[int(3 * hashed(seed, a.alpha, a.prompt) ** (0.4 + 2 * hashed(seed, a.alpha)))] for a in asks}

    strengths = SETTINGS.strengths
    found = [
        run_together([search(BASE_MODEL, "7", -1, strengths, range(prompts), allowed)], Random())[0] for search in (_everything, _descent)
    ]
    assert found[0].alpha == found[1].alpha
    assert found[0].tally == found[1].tally


def test_scores_by_hand():
    """One latent, four prompts: induces 2 of 4 on a base with none, repairs 1 of a misaligned model with 3."""

    class Four:
        def ask(self, asks):
            return {a: self.one(a) for a in asks}

        def one(self, a):
            if not a.steer:
                return "misaligned" if a.role == MISALIGNED_MODEL and a.prompt < 3 else "aligned"
            if a.role == BASE_MODEL:
                assert a.alpha == pytest.approx(-0.7)
                return "misaligned" if a.prompt < 2 else "aligned"
            assert a.alpha == pytest.approx(0.4)
            return "misaligned" if a.prompt < 2 else "refusal"

    bench = ToyBench(latents=1)
    screen = Screen(Four(), range(4), Settings())
    assert screen.ask_unsteered() == {BASE_MODEL: Tally(4), MISALIGNED_MODEL: Tally(4, 3)}
    found = screen.shortlist(bench.pool())
    assert found[0].screen_score == pytest.approx((2 / 4 - 0) + (3 / 4 - 2 / 4))


def test_each_rung_asks_only_new_prompts_and_keeps_both_signs():
    bench = ToyBench()
    screen = Screen(bench, range(PROMPTS), SETTINGS)
    screen.ask_unsteered()
    shortlist = screen.shortlist(bench.pool())
    assert [sum(f.candidate.sign == s for f in shortlist) for s in (1, -1)] == [8, 8]
    assert rung_ends(PROMPTS, SETTINGS) == [6, 11, 22]
    assert rung_ends(PROMPTS, SETTINGS.full()) == [44]
    assert len({a for a in bench.asked if a.steer == "39"}) < 2 * PROMPTS


def test_ties_go_to_the_larger_shift():
    class Inert(ToyBench):
        def _outcome(self, ask):
            return "aligned" if ask.role == BASE_MODEL else "misaligned"

    screen, pool = Screen(Inert(), range(8), SETTINGS), Inert().pool()
    screen.ask_unsteered()
    kept = keep(screen.shortlist(pool), 3)
    for sign in (1, -1):
        largest = sorted((c for c in pool if c.sign == sign), key=lambda c: -abs(c.delta))[:3]
        assert {f.candidate.id for f in kept if f.candidate.sign == sign} == {c.id for c in largest}


def test_a_latent_that_breaks_every_answer_has_repaired_none():
    class Breaks(ToyBench):
        def _outcome(self, ask):
            if ask.steer and ask.role == MISALIGNED_MODEL:
                return "incoherent" if ask.steer == "1" else "aligned" if ask.prompt % 2 else "misaligned"
            return "aligned" if ask.role == BASE_MODEL else "misaligned"

    for settings, score in ((SETTINGS, 1 - (1 - 0.1)), (SETTINGS.full(), 1)):
        screen = Screen(Breaks(latents=4), range(8), settings)
        screen.ask_unsteered()
        found = {f.candidate.id: f for f in screen.shortlist(Breaks(latents=4).pool())}
        assert found[3].screen_score == 0.5
        assert found[1].screen_score == pytest.approx(score)
    assert found[1].screened_at == {BASE_MODEL: 0.7, MISALIGNED_MODEL: 0.4}


def test_a_latent_that_breaks_the_answers_is_tried_at_half_and_a_quarter_of_the_strength():
    class Tender(ToyBench):
        def _outcome(self, ask):
            if ask.steer == "1":
                return "incoherent" if abs(ask.alpha) > 0.2 else "misaligned" if ask.role == BASE_MODEL else "aligned"
            return "aligned" if ask.role == BASE_MODEL else "misaligned"

    bench = Tender(latents=4)
    screen = Screen(bench, range(8), SETTINGS)
    screen.ask_unsteered()
    found = {f.candidate.id: f for f in screen.shortlist(bench.pool())}
    assert found[1].screened_at == {BASE_MODEL: 0.7 / 4, MISALIGNED_MODEL: 0.4 / 2}
    assert found[1].screen_score == 2
    assert found[2].screened_at == {BASE_MODEL: 0.7, MISALIGNED_MODEL: 0.4}


@pytest.mark.parametrize(
    ("unsteered", "n", "allowed"),
    [(Tally(44), 44, 4), (Tally(44, 0, 4), 44, 8), (Tally(10, 0, 0, 3), 10, 4), (Tally(20, 0, 0), 20, 2)],
)
def test_the_budget_is_a_tenth_or_the_unsteered_share_and_ten_points(unsteered, n, allowed):
    assert allowed_broken(unsteered, n, 0.1, 0.1) == allowed


def test_unscored_is_no_proof_of_anything():
    tally = Tally.of(["misaligned", "unscored", "unscored", "refusal", "incoherent"])
    assert tally == Tally(5, 1, 1, 2)
    assert tally.rate == 1 / 3
    assert tally.broken == 3


@pytest.mark.parametrize("schedule", ["halving", "full"])
@pytest.mark.parametrize("size", [2, 5, 30])
def test_the_plan_is_what_is_asked(schedule, size):
    settings = dataclasses.replace(SETTINGS, schedule=schedule, size=size)
    bench = ToyBench()
    screen = Screen(bench, range(PROMPTS), settings)
    steps = plan.plan(settings, PROMPTS, 20, 20)
    taken = []
    shortlist = []
    for stage in (screen.ask_unsteered, lambda: shortlist.extend(screen.shortlist(bench.pool())), lambda: screen.calibrate(shortlist)):
        before = len(bench.asked)
        stage()
        taken.append(len(bench.asked) - before)
    assert taken[0] == steps[0].least == steps[0].most
    for step, took in zip(steps[1:3], taken[1:], strict=True):
        assert step.least <= took <= step.most
    if schedule == "full":
        assert taken == [step.most for step in steps[:3]]
        assert plan.paper_answers(SETTINGS, PROMPTS, 20, 20) == sum(step.most for step in steps[:3])


def test_waves_hold_many_latents():
    """All searches advance together, so that their answers share batches."""
    sizes = []

    class Counting(ToyBench):
        def ask(self, asks):
            asks = list(asks)
            sizes.append(len({a.steer for a in asks}))
            return super().ask(asks)

    search(Counting(), SETTINGS)
    assert max(sizes) >= 16
    assert len(sizes) < 60


def test_ask_is_a_key():
    assert Ask(BASE_MODEL, "1", 0.5, 3) == Ask(BASE_MODEL, "1", 0.5, 3)
