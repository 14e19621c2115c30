"""Sentences about TReFT that are said before a run and in it. No torch."""

from __future__ import annotations


def no_rotary() -> str:
    """Return why a shared postfix reference cannot be had."""
    return (
        "`em_regularizer.treft.postfix_reference: shared` (the default) needs rotary positions, which this model lacks. Use `per_row` with "
        "an adapter, or `tokens: prefix`."
    )


def per_row_needs_adapter() -> str:
    """Return why the untuned model cannot run at each step."""
    return (
        "`em_regularizer.treft.postfix_reference: per_row` runs the untuned model at every step, which needs a fresh LoRA adapter to switch "
        "off, and there is none. Train with one, or use `shared`."
    )
