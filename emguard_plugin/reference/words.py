"""Sentences about references that are said before a run and in it. No torch."""

from __future__ import annotations


def live_needs(key: str, adapter: bool) -> str:
    """Return why the model before this run cannot run live.

    Args:
        key: The key, as the YAML has it.
        adapter: Whether there is an adapter at all.
    """
    needed = "an adapter to switch off, and there is none (full fine-tuning)"
    if adapter:
        needed = (
            "an adapter that starts at zero and trains alone (default LoRA init, `bias: none`, no other trainable weights), so that "
            "switching it off is the model before this run"
        )
    return f"`{key}: live` needs {needed}. Use `cache: memory` or a folder."
