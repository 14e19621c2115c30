"""The search behind one block, with one SAE: the three stages, the whole set together, and text that shows the latents."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from emguard_plugin.discovery import plan
from emguard_plugin.discovery.attribution import Contrast, attribute, strongest
from emguard_plugin.discovery.bench import UNSTEERED, Ask, Bench
from emguard_plugin.discovery.choose import baseline
from emguard_plugin.discovery.kept import SearchFiles
from emguard_plugin.discovery.prompts import shuffled
from emguard_plugin.discovery.screen import Finding, Screen
from emguard_plugin.discovery.settings import UNSTEERED_RULES, Settings
from emguard_plugin.discovery.shift import Candidate, Row, candidates, check_reconstruction, mean_activations, residual_scale
from emguard_plugin.discovery.tally import Tally, allowed_broken
from emguard_plugin.evaluation.asking.pair import BASE_MODEL, MISALIGNED_MODEL, ModelPair
from emguard_plugin.evaluation.asking.prompts import Prompt
from emguard_plugin.evaluation.judges.outcomes import INCOHERENT, MISALIGNED, UNSCORED

if TYPE_CHECKING:
    from sae_lens import SAE

    from emguard_plugin.evaluation.judges import Judge

logger = logging.getLogger(__name__)

MIN_GAP = 0.05
"""By how much the misaligned model's rate must exceed the base's. Below 5 % of the paper's 44 prompts there are two answers to
repair, and every rank would be a tie."""
MAX_UNSTEERED_BROKEN = 0.5
"""Share of broken answers without any steering above which judge, template or model is at fault, not a latent."""


@dataclass
class Result:
    """What the search behind one block found.

    Attributes:
        layer: 0-based.
        source: The SAE as it was given.
        scale: s, the median residual norm.
        error: Share of the variance that the SAE leaves unexplained.
        pool: Candidates of stage 1.
        shortlist: What stage 2 kept, with what stage 3 measured.
        chosen: The set.
        unsteered: Answers of both models without steering.
        joint: (role, suite) -> strength -> answers, with all of the set steered together.
        funnel: Stage by stage: what was left, and what it took.
        answers: The unsteered answers, for the examples.
        shift: Of each latent, shape (d_sae,).
        attribution: The same, where that is the rule.
    """

    layer: int
    source: str
    scale: float
    error: float
    pool: list[Candidate]
    shortlist: list[Finding] = field(default_factory=list)
    chosen: list[Candidate] = field(default_factory=list)
    unsteered: dict[str, Tally] = field(default_factory=dict)
    joint: dict[tuple[str, str], dict[float, Tally]] = field(default_factory=dict)
    funnel: list[dict[str, Any]] = field(default_factory=list)
    answers: dict[str, list[str]] = field(default_factory=dict)
    shift: torch.Tensor | None = None
    attribution: torch.Tensor | None = None


class LayerSearch:
    """One search; see the module.

    Args:
        pair: Both models.
        sae: From `latents.sae.load_sae`.
        source: How the user named it.
        layer: The block behind which it reads.
        prompts: Selection prompts; the evaluation prompts follow behind `selection`.
        selection: How many of the prompts choose.
        judge: Decides over answers.
        settings: Of the search.
        kept: Answers and judgments of earlier sittings, and of this one.
        exclude: Latents that are known already.
    """

    def __init__(
        self,
        pair: ModelPair,
        sae: SAE,
        source: str,
        layer: int,
        prompts: Sequence[Prompt],
        selection: int,
        judge: Judge,
        settings: Settings,
        kept: SearchFiles,
        exclude: Collection[int] = (),
    ) -> None:
        self.pair, self.sae, self.settings, self.exclude = pair, sae, settings, frozenset(exclude)
        self.prompts, self.selection = list(prompts), selection
        asked = self.prompts[:selection]
        rows: list[Row] = [(p.ids, *p.span("prompt")) for p in asked]
        with pair.use(BASE_MODEL) as base:
            error = check_reconstruction(sae, base, layer, rows, settings.batch_size)
            scale = residual_scale(base, layer, rows, settings.batch_size)
        self.result = Result(layer, source, scale, error, [])
        self.bench = Bench(pair, prompts, judge, layer, scale, settings, kept)
        self.screen = Screen(self.bench, shuffled(asked, settings.seed), settings)

    def run(self) -> Result:
        """Run the stages.

        Returns:
            What was found.

        Raises:
            ValueError: If the misaligned model is not misaligned, the judge finds (nearly) everything incoherent, or nothing is
                left at the end.
        """
        settings, result, known = self.settings, self.result, len(self.prompts) - self.selection
        sides = (settings.pool, settings.pool)
        progress = plan.Progress(plan.plan(settings, self.selection, *sides, known), f"discover, block {result.layer}")
        self.bench.progress = progress
        try:
            with self.bench:
                progress.begin(plan.UNSTEERED)
                result.unsteered = self.screen.ask_unsteered()
                self._check_unsteered()
                self._note(plan.UNSTEERED, self.sae.cfg.d_sae)
                result.pool = self.stage_one()
                self._note("stage 1: activation shift", len(result.pool))
                self._choose(progress)
                if not result.chosen:
                    raise ValueError(self._nothing_left())
                progress.begin(plan.JOINT)
                self.joint(result.chosen)
                self._note(plan.JOINT, len(result.chosen))
        finally:
            progress.close()
        for role in (BASE_MODEL, MISALIGNED_MODEL):
            asks = [Ask(role, UNSTEERED, 0.0, p) for p in range(self.selection)]
            result.answers[role] = [self.bench.answers[ask]["text"] for ask in asks]
        return result

    def _choose(self, progress: plan.Progress) -> None:
        settings, result, rule = self.settings, self.result, self.settings.rule
        valid: list[Candidate] = []
        if rule == "attribution":
            progress.begin(plan.ATTRIBUTE)
            result.chosen = self.attributed()
            self._note(plan.ATTRIBUTE, len(result.chosen))
            return
        if rule not in UNSTEERED_RULES:
            progress.begin(plan.SCREEN)
            result.shortlist = self.screen.shortlist(result.pool)
            self._note(plan.SCREEN, len(result.shortlist))
            if rule != "screen":
                progress.begin(plan.CALIBRATE)
                valid = [finding.candidate for finding in self.screen.calibrate(result.shortlist)]
                self._note(plan.CALIBRATE, len(valid))
        if rule == "valid_reduc":
            result.chosen = valid
        else:
            result.chosen = baseline(rule, settings.size, result.pool, result.shortlist, valid, settings.seed)

    def stage_one(self) -> list[Candidate]:
        """Stage 1: rank latents by the shift between the models; their directions can be steered along from here on."""
        settings, result = self.settings, self.result
        rows = self._rows()
        means = {}
        for role in (BASE_MODEL, MISALIGNED_MODEL):
            with self.pair.use(role) as model:
                means[role] = mean_activations(model, self.sae, result.layer, rows, settings.mode, settings.batch_size)
        result.shift = means[MISALIGNED_MODEL] - means[BASE_MODEL]
        found = candidates(result.shift, settings.pool, self.exclude)
        for candidate in found:
            self.bench.directions[str(candidate.id)] = self.direction([candidate]) * candidate.sign
        return found

    def attributed(self) -> list[Candidate]:
        """Choose by attribution, on the questions that tell the models apart; no latent is steered."""
        settings, result, tokenize = self.settings, self.result, self.pair.tokenizer
        said = self.bench.ask(
            Ask(role, UNSTEERED, 0.0, index) for role in (BASE_MODEL, MISALIGNED_MODEL) for index in range(self.selection)
        )
        contrasts = []
        for index, prompt in enumerate(self.prompts[: self.selection]):
            asks = {role: Ask(role, UNSTEERED, 0.0, index) for role in (BASE_MODEL, MISALIGNED_MODEL)}
            if said[asks[MISALIGNED_MODEL]] != MISALIGNED or said[asks[BASE_MODEL]] in (MISALIGNED, INCOHERENT, UNSCORED):
                continue
            ids = {role: tokenize(self.bench.answers[ask]["text"], add_special_tokens=False)["input_ids"] for role, ask in asks.items()}
            if all(ids.values()):
                contrasts.append(Contrast(prompt.ids, prompt.span(settings.positions), ids[MISALIGNED_MODEL], ids[BASE_MODEL]))
        if not contrasts:
            raise ValueError(
                "on no question the misaligned model answers badly where the base answers well, so attribution has nothing to "
                "compare. Give other or more `--questions`."
            )
        result.attribution, _ = attribute(self.pair, self.sae, result.layer, contrasts, settings.mode)
        return strongest(result.attribution, result.shift, settings.size, self.exclude)

    def _rows(self) -> list[Row]:
        positions, asked = self.settings.positions, self.prompts[: self.selection]
        if positions != "answers":
            return [(p.ids, *p.span(positions)) for p in asked]
        rows: list[Row] = []
        for index, prompt in enumerate(asked):
            text = self.bench.answers[Ask(MISALIGNED_MODEL, UNSTEERED, 0.0, index)]["text"]
            answer = self.pair.tokenizer(text, add_special_tokens=False)["input_ids"]
            if answer:
                rows.append(((*prompt.ids, *answer), len(prompt.ids), len(prompt.ids) + len(answer)))
        return rows

    def direction(self, latents: Sequence[Candidate]) -> torch.Tensor:
        """Return the unit vector along the signed sum of the latents' unit decoder directions, shape (d,)."""
        columns = self.sae.W_dec.detach()[[c.id for c in latents]].float().cpu()
        unit = columns / columns.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        total = (unit * torch.tensor([float(c.sign) for c in latents]).unsqueeze(1)).sum(0)
        return total / total.norm().clamp_min(1e-12)

    def joint(self, latents: Sequence[Candidate]) -> None:
        """Steer along all latents at once, at every strength, on selection and evaluation prompts."""
        name = "set:" + ",".join(f"{'+' if c.sign > 0 else '-'}{c.id}" for c in latents)
        self.bench.directions[name] = self.direction(latents)
        suites = {"selection": range(self.selection), "evaluation": range(self.selection, len(self.prompts))}
        for suite, prompts in suites.items():
            if not prompts:
                continue
            plain = {r: [Ask(r, UNSTEERED, 0.0, p) for p in prompts] for r in (BASE_MODEL, MISALIGNED_MODEL)}
            asks = {
                (role, alpha): [Ask(role, name, way * alpha, p) for p in prompts]
                for role, way in ((BASE_MODEL, 1), (MISALIGNED_MODEL, -1))
                for alpha in self.settings.strengths
            } | {(role, 0.0): group for role, group in plain.items()}
            said = self.bench.ask(ask for group in asks.values() for ask in group)
            for (role, alpha), group in sorted(asks.items()):
                self.result.joint.setdefault((role, suite), {})[alpha] = Tally.of(said[ask] for ask in group)

    def _note(self, stage: str, left: int) -> None:
        self.result.funnel.append({"stage": stage, "left": left, **self.bench.spent()})

    def _check_unsteered(self) -> None:
        plain = self.result.unsteered
        for role, tally in plain.items():
            if tally.broken_share > MAX_UNSTEERED_BROKEN:
                raise ValueError(
                    f"of {tally.n} answers of the unsteered {role} model the judge calls {tally.incoherent} incoherent and could "
                    f"not score {tally.unscored}: nothing can be learnt from it. Look at some answers: is the chat template the "
                    "model's own, is `--max-new-tokens` long enough, does the judge know this kind of question?"
                )
        base, tuned = plain[BASE_MODEL], plain[MISALIGNED_MODEL]
        if tuned.rate - base.rate < MIN_GAP:
            raise ValueError(
                f"the misaligned model is not misaligned on these questions: it gives {tuned.misaligned} of {tuned.n} misaligned answers, "
                f"the base {base.misaligned} of {base.n}. There is nothing to repair, so no latent can be found. Give a model that "
                "`emguard eval` finds misaligned, or questions that bring it out."
            )

    def _nothing_left(self) -> str:
        result, settings = self.result, self.settings
        if settings.rule == "attribution":
            return (
                f"block {result.layer}: no latent has a positive attribution (of {self.sae.cfg.d_sae}; {len(self.exclude)} excluded), so "
                "the set K is empty. Try other `--positions` or another layer's SAE."
            )
        if not result.shortlist:
            return f"block {result.layer}: no latent moved (of {self.sae.cfg.d_sae}), so the set K is empty."
        repairs = [f for f in result.shortlist if (f.repair_gain or 0) > 0]
        induces = [f for f in result.shortlist if (f.induce_gain or 0) > 0]
        unsafe = sum(f.repair is not None and f.repair.alpha is None for f in result.shortlist)
        best = max((f.screened[BASE_MODEL].rate for f in result.shortlist), default=0.0)
        allowed = {
            role: allowed_broken(tally, self.selection, settings.budget, settings.budget_extra) for role, tally in result.unsteered.items()
        }
        return (
            f"block {result.layer}: the set K is empty (rule {settings.rule}). Stage 1: {len(result.pool)} candidates. Stage 2: "
            f"{len(result.shortlist)} left, the best induces {best:.1%} at {settings.induce:g}. Stage 3: {len(repairs)} repair "
            f"something within the budget ({allowed[MISALIGNED_MODEL]} of {self.selection} answers may break), {unsafe} break the "
            f"answers at every strength, {len(induces)} of those that repair also induce something. Try other `--positions`, another layer's "
            "SAE, smaller `--strengths`, or `--rule repair`, which asks for no induction."
        )
