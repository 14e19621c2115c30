"""Sentences about BLOCK-EM that are said before a run and in it. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def freeze_needs_adapter() -> str:
    """Return why nothing can be frozen above the blocked layer."""
    return "`em_regularizer.block_em.freeze_above` needs an adapter, and there is none. Use LoRA, or remove the key."


def drawn_answers(cache: str) -> str:
    """Return why nothing can be recorded of answers that the model writes while it trains.

    Args:
        cache: As the YAML has it.
    """
    return (
        f"`em_regularizer.block_em.cache: {cache}`: the model writes the answers of this run while it trains, so no row is there before "
        "the first step or comes twice. Train a fresh LoRA adapter with `cache: auto`, whose base model runs beside it, or set `cache: copy`."
    )


def set_in_words(layers: Sequence[int], signs: Mapping[int, int]) -> str:
    """Return how many latents of which sign sit where.

    Args:
        layers: 0-based decoder layers.
        signs: How many latents rise (1) and fall (-1) with misalignment.
    """
    where = f"layer{'s' * (len(layers) > 1)} {', '.join(map(str, layers))}"
    return f"{signs.get(1, 0)} latents of K+ and {signs.get(-1, 0)} of K- after {where}"
