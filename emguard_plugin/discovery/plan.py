"""How many answers and judgments a search takes, before it begins; and the bar that shows how far it is."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from emguard_plugin.discovery.screen import FIRST_LOOK, WEAKENED, rung_ends, rung_keeps
from emguard_plugin.discovery.settings import UNSTEERED_RULES, Settings

SCREEN, CALIBRATE, JOINT, UNSTEERED = "stage 2: induce and repair", "stage 3: strengths", "the whole set", "unsteered"
ATTRIBUTE = "attribution, instead of stages 2 and 3"


@dataclass(frozen=True)
class Step:
    """Answers that one stage asks for, unsteered ones apart.

    Attributes:
        stage: Its name.
        least: Fewest answers.
        most: Most answers; the judge judges each distinct one once, so this bounds the judgments too.
    """

    stage: str
    least: int
    most: int


def plan(settings: Settings, prompts: int, rising: int, falling: int, evaluation: int = 0) -> list[Step]:
    """Return the steps of a search over one SAE.

    Args:
        settings: Of the search.
        prompts: Selection prompts.
        rising: Candidates with a positive shift; before stage 1, `pool`.
        falling: Candidates with a negative shift.
        evaluation: Evaluation prompts, which only the whole set is asked on.
    """
    steps = [Step(UNSTEERED, 2 * prompts, 2 * prompts)]
    strengths = len(settings.strengths)
    if settings.rule == "attribution":
        steps.append(Step(ATTRIBUTE, 0, 0))
    if settings.rule not in UNSTEERED_RULES:
        screen, sides = _screen(settings, prompts, [rising, falling])
        weakened = 0 if settings.schedule == "full" else WEAKENED
        steps.append(Step(SCREEN, screen, (1 + weakened) * screen))
        left = sum(sides)
        if settings.rule != "screen":
            most = 2 * left * strengths * prompts
            if settings.schedule == "full":
                # Answers at the strengths of stage 2 are there already.
                most -= left * prompts * ((settings.induce in settings.strengths) + (settings.repair in settings.strengths))
            # At least a first look at every strength, or all prompts at the first.
            look = min(strengths * min(prompts, int(FIRST_LOOK)), prompts)
            steps.append(Step(CALIBRATE, most if settings.schedule == "full" else left * look, most))
    joint = 2 * strengths * (prompts + evaluation) + 2 * evaluation
    # Without stages 2 and 3 next to nothing can leave the set empty.
    return [*steps, Step(JOINT, joint if settings.rule in UNSTEERED_RULES else 0, joint)]


def _screen(settings: Settings, prompts: int, sides: list[int]) -> tuple[int, list[int]]:
    """Return the answers of stage 2 and how many of each sign are left; nothing of it hangs on what is answered.

    Candidates that break the answers are asked again with less; the fewest answers are returned.
    """
    asked = answers = 0
    for until in rung_ends(prompts, settings):
        if asked and max(sides) <= settings.shortlist:
            break
        answers += 2 * sum(sides) * (until - asked)
        asked = until
        sides = [min(side, rung_keeps(max(sides), settings)) for side in sides]
    return answers, [min(side, settings.shortlist) for side in sides]


def paper_answers(settings: Settings, prompts: int, rising: int, falling: int) -> int:
    """Return the answers of the paper's schedule for the same search, without those of the whole set."""
    return sum(step.most for step in plan(replace(settings.full(), rule="valid_reduc"), prompts, rising, falling)[:-1])


class Progress:
    """A bar over the answers of all stages; its end moves as stages turn out shorter than planned.

    Args:
        steps: From `plan`.
        label: What stands before the bar.
    """

    def __init__(self, steps: list[Step], label: str) -> None:
        from tqdm.auto import tqdm

        self._ahead = {step.stage: step.most for step in steps}
        self._bar = tqdm(total=sum(self._ahead.values()), desc=label, unit="answer", disable=None)

    def begin(self, stage: str) -> None:
        """Enter a stage: what earlier ones did not need is taken off the estimate."""
        for name in list(self._ahead):
            if name == stage:
                break
            del self._ahead[name]
        self._bar.total = self._bar.n + sum(self._ahead.values())
        self._bar.set_postfix_str(stage)

    def __call__(self, answers: int) -> None:
        """Count answers."""
        self._bar.update(answers)

    def close(self, *_: Any) -> None:
        """End the bar."""
        self._bar.close()
