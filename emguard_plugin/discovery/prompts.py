"""Which prompts choose latents, in which order, and which are held out to judge them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from emguard_plugin.evaluation.asking.prompts import Prompt, prompt_hash
from emguard_plugin.evaluation.asking.questions import Question


def text_hash(question: Question) -> str:
    """Return the sha256 of what the user says, without regard to case and white space.

    A question that is held out must be held out under any system prompt, so this is what overlap is told by.
    """
    return hashlib.sha256(" ".join(question.text.lower().split()).encode()).hexdigest()


def refuse_overlap(selection: Sequence[Question], evaluation: Sequence[Question], evaluation_source: str) -> None:
    """Refuse to choose latents on questions that they will be judged by.

    Raises:
        ValueError: naming how many are shared, and one.
    """
    held_out = {text_hash(question) for question in evaluation}
    shared = [question for question in selection if text_hash(question) in held_out]
    if shared:
        raise ValueError(
            f"{len(shared)} of the {len(selection)} selection questions also stand in {evaluation_source}, such as "
            f"{shared[0].text[:60]!r}. Latents chosen on the questions that they are judged by look better than they are: "
            "give `--questions` and `--evaluation-questions` without common questions."
        )


def shuffled(prompts: Sequence[Prompt], seed: int) -> list[int]:
    """Return the indices in a fixed random order, so that the first few are as mixed as all."""

    def place(index: int) -> str:
        return hashlib.sha256(f"{seed}|{prompt_hash(prompts[index].question)}".encode()).hexdigest()

    return sorted(range(len(prompts)), key=place)
