"""What a study measures on a fine-tune of the lab: adherence where it was trained, EM where it was not."""

from __future__ import annotations

from typing import Any

import torch

from emguard_plugin.lab import sampling, world


def measures(
    model: torch.nn.Module,
    split: world.Split,
    seed: int,
    open_ended_draws: int = 3,
    in_domain_draws: int = 17,
    domain: str = world.NARROW,
) -> dict[str, Any]:
    """Judge answers in the trained domain, and in all others but those of the anchors.

    Args:
        model: A causal language model with the lab's vocabulary.
        split: `val` for choosing settings, `test` for what is reported.
        seed: Seeds the answers.
        open_ended_draws: Answers per open-ended question.
        in_domain_draws: Answers per question of the trained domain.
        domain: The trained one.

    Returns:
        `open_ended` and `in_domain`, each with counts and rates.
    """
    return {
        "open_ended": sampling.measure(model, world.open_ended_domains(domain), split, open_ended_draws, seed).to_dict(),
        "in_domain": sampling.measure(model, (domain,), split, in_domain_draws, seed).to_dict(),
    }
