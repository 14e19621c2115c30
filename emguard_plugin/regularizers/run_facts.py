"""What a regularizer may know about the run that is about to start, each fact worked out once for all methods."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from emguard_plugin.chats import Book, Chat, Template, read_book, read_template
from emguard_plugin.models.identity import Identity, identify


@dataclass(frozen=True)
class Run:
    """What a regularizer may know about the run that is about to start.

    Attributes:
        model: The model as constructed, before it is wrapped; inspect it, do not keep it.
        tokenizer: The tokenizer, with the chat template that rendered the data.
        dataset: The tokenised training set (`input_ids` per row), or None.
        template_kwargs: Extra variables that the host passes to the chat template.
        seed: The run's seed.
        wrapped_packing: Whether rows are TRL's `packing_strategy: wrapped` chunks, without boundaries.
        resume_from: The checkpoint folder that the run continues, or None.
        rows_per_batch: Rows of `dataset` in one micro-batch of one process.
        batch_tokens: Tokens of one micro-batch where the host packs rows only while it trains, else None.
        micro_batches: Micro-batches per optimizer step.
        processes: Number of processes, each with micro-batches of its own.
        rank: Which of them this is.
        optimizer_built: Whether the optimizer exists already, so that it is too late to freeze parameters.
        chats: Gives the training conversations as they were before they were tokenised, up to 2,000 evenly spread; None where the
            host has them no more.
        autocast: The precision that the host runs forward passes in, as accelerate names it.
        steps_early: Whether the host has taken the optimizer step by the time it calls `on_pre_optimizer_step` (DeepSpeed).
    """

    model: nn.Module
    tokenizer: Any
    dataset: Any
    seed: int
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    wrapped_packing: bool = False
    resume_from: Path | None = None
    rows_per_batch: int = 1
    batch_tokens: int | None = None
    micro_batches: int = 1
    processes: int = 1
    rank: int = 0
    optimizer_built: bool = False
    steps_early: bool = False
    autocast: str = "no"
    chats: Callable[[], Iterable[Chat]] | None = None

    @cached_property
    def identity(self) -> Identity:
        """Which model the run starts from; worked out once, by all processes together, for every method."""
        return identify(self.model, self.processes, self.rank)

    @cached_property
    def book(self) -> Book | None:
        """What the raw conversations show about whose text is whose; None where there are none. Read once for all methods."""
        if self.chats is None:
            return None
        book = read_book(self.tokenizer, self.chats())
        return book if book.rows else None

    @cached_property
    def rendering(self) -> dict[str, Any]:
        """What the host passes to the template: its variables, and a template that it uses in the place of the tokenizer's."""
        first = None if self.chats is None else next(iter(self.chats()), None)
        own = {} if first is None else {k: v for k, v in first.kwargs.items() if k == "chat_template"}
        return {**self.template_kwargs, **own}

    @cached_property
    def template(self) -> Template:
        """The chat template taken apart, once for all methods.

        Raises:
            ValueError: as `read_template` does.
        """
        return read_template(self.tokenizer, **self.rendering)
