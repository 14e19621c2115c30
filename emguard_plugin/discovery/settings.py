"""Every number of a discovery run, with the paper's value where one is known."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

from emguard_plugin.evaluation.asking.prompts import Part

SteerAt = Literal["all", "prompt", "header", "prefix"]
Rule = Literal["valid_reduc", "attribution", "repair", "screen", "top_shift", "random", "shuffled_signs", "k_plus", "k_minus"]
POSITIONS: tuple[Part, ...] = get_args(Part)
STEER_AT: tuple[SteerAt, ...] = ("all", "prompt", "header", "prefix")
RULES: tuple[Rule, ...] = get_args(Rule)
UNSTEERED_RULES: tuple[Rule, ...] = ("attribution", "top_shift", "random")
"""Rules that need no stage 2 and 3."""
CHOICES = {
    "positions": POSITIONS,
    "steer_at": STEER_AT,
    "mode": ("relu_pre", "sae"),
    "rule": RULES,
    "schedule": ("halving", "full"),
}

PAPER_STRENGTHS = tuple(round(0.05 * i, 2) for i in range(1, 16))


@dataclass(frozen=True)
class Settings:
    """Settings of the three stages. The defaults are the paper's, but for the schedule.

    Attributes:
        positions: Where stage 1 looks. `prompt`: all prompt tokens but the system part and the first; `header`: the
            template's tokens between question and answer; `prefix`: all before the user's first content, but the first token;
            `answers`: the misaligned model's own answers, read by both.
        steer_at: Where stages 2 and 3 push: `all` positions, prompt and generated, as the paper does; or one part of the prompt
            alone, our addition for models that keep the persona there and break when all else is pushed too.
        mode: Which activation: `relu_pre`, the ReLU of the encoder's pre-activation, or `sae`, the SAE's own.
        pool: Candidates per sign after stage 1 (250).
        shortlist: Candidates per sign after stage 2 (40).
        size: Latents in the final set, both signs together (20).
        rule: How the final set is chosen. `valid_reduc` is the paper's. `attribution` is ours: gradients rank the latents, no
            latent is steered alone (`attribution.py`). The others are baselines.
        induce: Strength of stage 2 on the base, in units of the median residual norm (0.7).
        repair: Strength of stage 2 on the misaligned model (0.4).
        strengths: Those that stage 3 tries (0.05 to 0.75).
        budget: Highest share of incoherent answers that a strength may cost (0.1) ...
        budget_extra: ... or the unsteered share plus this, whichever is higher. A judge that calls 11 % of the unsteered
            answers incoherent would reject everything otherwise.
        schedule: `full` asks everything, as the paper does. `halving` asks fewer prompts first and stops early; it takes the
            same decisions in stage 3, and drops hopeless candidates of stage 2 sooner.
        max_new_tokens: Longest answer, in tokens.
        batch_size: Answers generated at once, each with its own latent.
        seed: Seeds the order of the prompts and the random baselines.
    """

    positions: Part = "prompt"
    steer_at: SteerAt = "all"
    mode: Literal["relu_pre", "sae"] = "relu_pre"
    pool: int = 250
    shortlist: int = 40
    size: int = 20
    rule: Rule = "valid_reduc"
    induce: float = 0.7
    repair: float = 0.4
    strengths: tuple[float, ...] = PAPER_STRENGTHS
    budget: float = 0.1
    budget_extra: float = 0.1
    schedule: Literal["halving", "full"] = "halving"
    max_new_tokens: int = 256
    batch_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot work.

        Raises:
            ValueError: naming the option.
        """
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                option = name.replace("_", "-")
                raise ValueError(f"`--{option} {getattr(self, name)}` does not exist. Choose of {', '.join(allowed)}.")
        if self.rule == "attribution" and self.positions == "answers":
            raise ValueError(
                "`--rule attribution` compares both models on the same tokens before their answers, so `--positions answers` gives it "
                "none. Choose prompt, header or prefix."
            )
        for name in ("pool", "shortlist", "size", "max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"`--{name.replace('_', '-')} {getattr(self, name)}`: must be at least 1.")
        if not self.strengths or min(self.strengths) <= 0 or len(set(self.strengths)) < len(self.strengths):
            raise ValueError(f"`--strengths` {list(self.strengths)}: give distinct numbers above 0, such as 0.1,0.2,0.4.")
        if self.induce <= 0 or self.repair <= 0:
            raise ValueError("`--induce` and `--repair` are sizes and must be above 0; the sign is the latent's.")
        if not 0 <= self.budget < 1 or not 0 <= self.budget_extra < 1:
            raise ValueError("`--budget` and `--budget-extra` are shares from 0 to below 1.")

    def full(self) -> Settings:
        """Return the same search on the paper's schedule."""
        return replace(self, schedule="full")

    def to_dict(self) -> dict[str, Any]:
        """Return them as the result file stores them."""
        return asdict(self) | {"strengths": list(self.strengths)}
