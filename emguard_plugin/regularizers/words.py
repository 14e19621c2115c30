"""Sentences about methods that are said before a run and in it. No torch."""

from __future__ import annotations


def no_such_layer(key: str, layer: int, number: int) -> str:
    """Return what is wrong with a layer that the model does not have.

    Args:
        key: The key that lists layers, as the YAML has it.
        layer: 0-based.
        number: Of the model's layers.
    """
    return f"`{key}: {layer}` is out of range: the model has layers 0 to {number - 1}."
