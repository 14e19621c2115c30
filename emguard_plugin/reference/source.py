"""Where a method has the model before this run from: the adapter switched off, a frozen copy, or what was recorded of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import nn

from emguard_plugin.models.adapters import adapter_off, adapter_starts_at_zero, is_sharded, peft_model
from emguard_plugin.models.modes import eval_mode
from emguard_plugin.reference.words import live_needs


class Source:
    """What a `cache` key comes to with the model at hand.

    Args:
        key: The key, as the YAML has it.
        cache: `auto` (live where an adapter allows it, else memory), `live`, `memory`, `copy` or a folder.
        model: Before training.
        adapter_off: Whether switching the adapter off gives the model before this run; default: what the model shows.
        beside: The host's own frozen copy of the model before this run, where it has one; used by `auto` and `live` without an adapter.

    Attributes:
        adapter_off: As given, or found.
        beside: As given, where it is used.
        live: The reference runs beside the model at each step; nothing is recorded.
        copied: It runs as a frozen copy.
        folder: Where it is recorded to, or None for memory.

    Raises:
        ValueError: for `live` without an adapter that can be switched off for it, and for `copy` of weights that are spread over
            processes.
    """

    def __init__(self, key: str, cache: str, model: nn.Module, adapter_off: bool | None = None, beside: nn.Module | None = None) -> None:
        self.key = key
        self.adapter_off = adapter_starts_at_zero(model) if adapter_off is None else adapter_off
        self.copied = cache == "copy"
        self.beside = beside if cache in ("auto", "live") and not self.adapter_off else None
        if cache == "live" and not self.adapter_off and self.beside is None:
            raise ValueError(live_needs(key, peft_model(model) is not None))
        if self.copied and is_sharded(model):
            raise ValueError(
                f"`{key}: copy` needs whole weights on every process, and these are spread over processes. Use `cache: memory` or a folder."
            )
        self.live = self.copied or cache == "live" or self.beside is not None or (cache == "auto" and self.adapter_off)
        self.folder = None if cache in ("auto", "live", "memory", "copy") else Path(cache).expanduser()

    def describe(self) -> str:
        """Return a few words for the line that says what is active."""
        if self.copied:
            return "a frozen copy"
        if self.beside is not None:
            return "the trainer's reference model"
        if self.live:
            return "adapter off"
        return f"recorded in {'memory' if self.folder is None else self.folder}"

    def in_words(self) -> str:
        """Return what the reference is, for an error."""
        if self.copied:
            return "the frozen copy"
        if self.beside is not None:
            return "the trainer's reference model"
        if self.live:
            return "the model with its adapter switched off"
        return f"the reference {'recorded in memory' if self.folder is None else f'in {self.folder}'}"

    @contextlib.contextmanager
    def reading(self, model: nn.Module) -> Iterator[nn.Module]:
        """Run the reference: without gradient or dropout, the adapter off where that is what makes a model the reference.

        Yields:
            What to run: `model`, or the host's own reference beside it.
        """
        runs = model if self.beside is None else self.beside
        with torch.no_grad(), eval_mode(runs), adapter_off(runs) if self.adapter_off else contextlib.nullcontext():
            yield runs


def lost(checkpoint: Path, what: str, method: str) -> ValueError:
    """Return the error of a resumed run whose reference is gone.

    Args:
        checkpoint: That the run continues.
        what: It holds none of.
        method: Of the YAML.
    """
    return ValueError(
        f"{checkpoint} holds no {what}, so the model before this run is lost: `{method}` would hold to weights that are already tuned. "
        f"Start afresh without `resume_from_checkpoint`, or remove `{method}:`."
    )


def batches(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Return rows in batches for a recording, the shortest first, of at most so many tokens with their padding.

    Args:
        lengths: Of each row.
        tokens: At most, in a batch of more than one row.
    """
    found: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if not found or (len(found[-1]) + 1) * lengths[i] > tokens:
            found.append([])
        found[-1].append(i)
    return found
