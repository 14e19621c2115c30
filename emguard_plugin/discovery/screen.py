"""Stages 2 and 3: steer each candidate, keep those that induce and repair, and find the strength that each bears.

The searches know prompts by number and models by role, and get their answers from whatever has `ask`.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, field

from emguard_plugin.discovery.bench import UNSTEERED, Ask, Asker
from emguard_plugin.discovery.settings import Settings
from emguard_plugin.discovery.shift import Candidate
from emguard_plugin.discovery.tally import Tally, allowed_broken
from emguard_plugin.evaluation.asking.pair import BASE_MODEL, MISALIGNED_MODEL

RUNGS = (1 / 8, 1 / 4, 1 / 2)
"""Share of the prompts that the rungs of stage 2 have asked. The last one cuts to the shortlist, whose rank stage 3 decides."""
KEPT = 0.4
"""Share of the candidates that goes on to the next rung; most latents do nothing, and show it on a few prompts."""
FEWEST = 4
"""Prompts that the first rung asks at least."""
BREAKS, WEAKENED = 1 / 3, 2
"""A candidate that breaks a larger share of the answers at stage 2's strength is tried at half of it, this many times. What breaks
a model at one strength may be what steers it at another, and would look like repair otherwise."""
FIRST_LOOK = 1.5
"""A strength is first asked on this many times the prompts that suffice to reject it; then on twice as many each time."""

Search = Generator[list[Ask], dict[Ask, str], "Strength"]


@dataclass
class Strength:
    """What one latent does to one model, strength by strength.

    Attributes:
        alpha: The largest strength within the budget, without sign; None if there is none.
        tally: At that strength, over all prompts.
        curve: Every strength that was tried; one that was given up early has fewer answers.
    """

    alpha: float | None = None
    tally: Tally | None = None
    curve: dict[float, Tally] = field(default_factory=dict)


@dataclass
class Finding:
    """What is known about a candidate. Gains are in shares of answers."""

    candidate: Candidate
    screened: dict[str, Tally] = field(default_factory=dict)
    screened_at: dict[str, float] = field(default_factory=dict)
    screen_score: float = 0.0
    induce: Strength | None = None
    repair: Strength | None = None
    induce_gain: float | None = None
    repair_gain: float | None = None


class Screen:
    """The two steering stages over one set of candidates.

    Args:
        bench: Gets the answers.
        order: The prompts, in the order in which they are asked.
        settings: Strengths, budget, sizes, schedule.
    """

    def __init__(self, bench: Asker, order: Sequence[int], settings: Settings) -> None:
        self.bench, self.order, self.settings = bench, list(order), settings
        self.unsteered: dict[str, Tally] = {}
        self._plain: dict[Ask, str] = {}

    def ask_unsteered(self) -> dict[str, Tally]:
        """Ask both models without steering; the answers are shared by every comparison that follows."""
        asks = [Ask(role, UNSTEERED, 0.0, prompt) for role in (BASE_MODEL, MISALIGNED_MODEL) for prompt in self.order]
        self._plain = self.bench.ask(asks)
        self.unsteered = {role: self._plain_tally(role, self.order) for role in (BASE_MODEL, MISALIGNED_MODEL)}
        return self.unsteered

    def _plain_tally(self, role: str, prompts: Iterable[int]) -> Tally:
        return Tally.of(self._plain[Ask(role, UNSTEERED, 0.0, prompt)] for prompt in prompts)

    def shortlist(self, pool: Sequence[Candidate]) -> list[Finding]:
        """Stage 2. Steer every candidate at one strength, and keep the best per sign.

            S2_k = [m(base; +alpha_ind) - m(base; 0)] + [m(mis; 0) - m(mis; -alpha_rep)]         (arXiv 2602.00767, eq. 7)

        The published schedule is just that. With `halving` a rung of the prompts is asked at a time, and a part of the candidates
        goes on to the next; a latent that breaks the answers is tried at half the strength; and what breaks beyond the budget is
        taken off the score, since a broken answer is not repaired.

        Returns:
            The shortlist, best first.
        """
        settings = self.settings
        alive, asked = [Finding(candidate) for candidate in pool], 0
        for finding in alive:
            finding.screened_at = {BASE_MODEL: settings.induce, MISALIGNED_MODEL: settings.repair}
        for until in rung_ends(len(self.order), settings):
            if asked and most_per_sign(alive) <= settings.shortlist:
                break
            asked = until
            self._rung(alive, self.order[:asked])
            alive = keep(alive, rung_keeps(most_per_sign(alive), settings))
        return keep(alive, settings.shortlist)

    def _rung(self, alive: Sequence[Finding], prompts: Sequence[int]) -> None:
        waiting = [(finding, role) for finding in alive for role in (BASE_MODEL, MISALIGNED_MODEL)]
        while waiting:
            asks = {(f.candidate.id, role): self._screening(f, role, prompts) for f, role in waiting}
            # What was asked before costs nothing: the bench remembers.
            said = self.bench.ask(ask for group in asks.values() for ask in group)
            broke = []
            for finding, role in waiting:
                tally = Tally.of(said[ask] for ask in asks[finding.candidate.id, role])
                finding.screened[role] = tally
                if self._weaken(finding, role, tally):
                    broke.append((finding, role))
            waiting = broke
        for finding in alive:
            finding.screen_score = self._score(finding, prompts)

    def _screening(self, finding: Finding, role: str, prompts: Sequence[int]) -> list[Ask]:
        candidate, way = finding.candidate, 1 if role == BASE_MODEL else -1
        return [Ask(role, str(candidate.id), way * candidate.sign * finding.screened_at[role], p) for p in prompts]

    def _weaken(self, finding: Finding, role: str, tally: Tally) -> bool:
        start = self.settings.induce if role == BASE_MODEL else self.settings.repair
        if self.settings.schedule == "full" or tally.broken_share <= BREAKS:
            return False
        if finding.screened_at[role] <= start * 0.5**WEAKENED:
            return False
        finding.screened_at[role] /= 2
        return True

    def _score(self, finding: Finding, prompts: Sequence[int]) -> float:
        score = 0.0
        for role, way in ((BASE_MODEL, 1), (MISALIGNED_MODEL, -1)):
            steered = finding.screened[role]
            score += way * (steered.rate - self._plain_tally(role, prompts).rate)
            if self.settings.schedule != "full":
                allowed = max(self.settings.budget, self.unsteered[role].broken_share + self.settings.budget_extra)
                score -= max(0.0, steered.broken_share - allowed)
        return score

    def calibrate(self, findings: Sequence[Finding]) -> list[Finding]:
        """Stage 3. Find the largest strength within the budget, and rank by what it repairs (ValidReduc).

        Kept is what induces something on the base and repairs something on the misaligned model; the rank is by

            m(mis; 0) - m(mis; -alpha*_rep)                                              (arXiv 2602.00767, eq. 13)

        ties by |Delta|. Induction is a filter alone, so `halving` asks for it down the ranking, until the set is full.

        Returns:
            The valid ones, best first; at most `size` of them.
        """
        size, full = self.settings.size, self.settings.schedule == "full"
        self._search(findings, MISALIGNED_MODEL)
        ranked = sorted(findings, key=lambda f: (-(f.repair_gain or 0.0), -abs(f.candidate.delta), f.candidate.id))
        if full:
            self._search(ranked, BASE_MODEL)
        valid: list[Finding] = []
        promising = [f for f in ranked if (f.repair_gain or 0.0) > 0]
        while promising and len(valid) < size:
            take = len(promising) if full else size - len(valid)
            batch, promising = promising[:take], promising[take:]
            if not full:
                self._search(batch, BASE_MODEL)
            valid += [f for f in batch if (f.induce_gain or 0.0) > 0]
        return valid[:size]

    def _search(self, findings: Sequence[Finding], role: str) -> None:
        """Find alpha* of many latents at once, so that their answers share batches."""
        way = 1 if role == BASE_MODEL else -1
        plain = self.unsteered[role]
        allowed = allowed_broken(plain, len(self.order), self.settings.budget, self.settings.budget_extra)
        search = _everything if self.settings.schedule == "full" else _descent
        searches = [
            search(role, str(f.candidate.id), way * f.candidate.sign, self.settings.strengths, self.order, allowed) for f in findings
        ]
        for finding, strength in zip(findings, run_together(searches, self.bench), strict=True):
            gain = None if strength.tally is None else way * (strength.tally.rate - plain.rate)
            if role == BASE_MODEL:
                finding.induce, finding.induce_gain = strength, gain
            else:
                finding.repair, finding.repair_gain = strength, gain


def rung_ends(n: int, settings: Settings) -> list[int]:
    """Return after how many of n prompts each rung of stage 2 ends."""
    if settings.schedule == "full":
        return [n]
    return sorted({min(n, max(FEWEST, math.ceil(share * n))) for share in RUNGS})


def rung_keeps(most: int, settings: Settings) -> int:
    """Return how many of each sign go on to the next rung, of at most `most`: a share, and never less than the shortlist."""
    return max(settings.shortlist, math.ceil(KEPT * most))


def most_per_sign(findings: Sequence[Finding]) -> int:
    """Return how many the larger sign has."""
    return max(sum(f.candidate.sign == sign for f in findings) for sign in (1, -1))


def keep(findings: Sequence[Finding], per_sign: int) -> list[Finding]:
    """Return the best by screen score, at most `per_sign` of each sign; ties by |Delta|."""
    ranked = sorted(findings, key=lambda f: (-f.screen_score, -abs(f.candidate.delta), f.candidate.id))
    kept = {f.candidate.id for sign in (1, -1) for f in [g for g in ranked if g.candidate.sign == sign][:per_sign]}
    return [f for f in ranked if f.candidate.id in kept]


def _everything(role: str, steer: str, way: int, strengths: Sequence[float], order: Sequence[int], allowed: int) -> Search:
    """Ask every strength on every prompt, as the paper does."""
    asks = {alpha: [Ask(role, steer, way * alpha, p) for p in order] for alpha in strengths}
    said = yield [ask for group in asks.values() for ask in group]
    curve = {alpha: Tally.of(said[ask] for ask in group) for alpha, group in asks.items()}
    safe = [alpha for alpha, tally in curve.items() if tally.broken <= allowed]
    return Strength(max(safe), curve[max(safe)], curve) if safe else Strength(curve=curve)


def _descent(role: str, steer: str, way: int, strengths: Sequence[float], order: Sequence[int], allowed: int) -> Search:
    """Go down from the largest strength, and give one up as soon as it has broken more answers than it may on all prompts.

    Further prompts can only break more, so the largest strength within the budget is exactly that of `_everything`.

    Returns:
        The largest strength within the budget, with its counts.

    Yields:
        The asks of each wave; what was said to them is sent back.
    """
    curve: dict[float, Tally] = {}
    for alpha in sorted(strengths, reverse=True):
        tally, at, look = Tally(), 0, math.ceil(FIRST_LOOK * (allowed + 1))
        while at < len(order) and tally.broken <= allowed:
            asks = [Ask(role, steer, way * alpha, p) for p in order[at : at + look]]
            said = yield asks
            tally += Tally.of(said[ask] for ask in asks)
            at, look = at + len(asks), 2 * look
        curve[alpha] = tally
        if tally.broken <= allowed:
            return Strength(alpha, tally, curve)
    return Strength(curve=curve)


def run_together(searches: Sequence[Search], bench: Asker) -> list[Strength]:
    """Run searches side by side: each wave asks what all of them wait for."""
    results: dict[int, Strength] = {}
    waiting: dict[int, list[Ask]] = {}

    def step(index: int, said: dict[Ask, str] | None) -> None:
        try:
            waiting[index] = next(searches[index]) if said is None else searches[index].send(said)
        except StopIteration as stop:
            waiting.pop(index, None)
            results[index] = stop.value

    for index in range(len(searches)):
        step(index, None)
    while waiting:
        said = bench.ask(ask for asks in waiting.values() for ask in asks)
        for index in list(waiting):
            step(index, said)
    return [results[index] for index in range(len(searches))]
