"""Sentences about BLOCK-EM that are said before a run and in it. No torch."""

from __future__ import annotations


def freeze_needs_adapter() -> str:
    """Return why nothing can be frozen above the blocked layer."""
    return "`em_regularizer.block_em.freeze_above` needs an adapter, and there is none. Use LoRA, or remove the key."
