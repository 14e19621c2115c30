"""What a regularizer may know about the run that is about to start, each fact worked out once for all methods."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from emguard_plugin.chats import Book, Chat, Known, Template, read_book, read_template, short_of_answers
from emguard_plugin.chats.training_rows import IGNORE, labelled_conversations, sample
from emguard_plugin.models.adapters import is_sharded, peft_model
from emguard_plugin.models.identity import Identity, identify
from emguard_plugin.models.kv import base_causal_lm

LOOKED_AT = 256
"""Rows that are looked at one by one before the first step."""
TEMPLATE_REGIONS = ("prefix", "postfix", "header")
"""Parts of the template: nothing of a query or an answer belongs to them."""

Row = tuple[list[int], list[int] | None]


@dataclass(frozen=True)
class RunFacts:
    """What a regularizer may know about the run that is about to start.

    Attributes:
        model: The model as constructed, before it is wrapped; inspect it, do not keep it.
        tokenizer: The tokenizer, with the chat template that rendered the data.
        dataset: The tokenised training set (`input_ids` per row), or None. Read `sample` where some rows are enough.
        template_kwargs: Extra variables that the host passes to the chat template.
        seed: The run's seed.
        wrapped_packing: Whether rows are TRL's `packing_strategy: wrapped` chunks, without boundaries.
        resume_from: The checkpoint folder that the run continues, or None.
        rows_per_batch: Rows of `dataset` in one micro-batch of one process.
        batch_tokens: Tokens of one micro-batch where `dataset` does not show them (packed while it trains, answers drawn), else None.
        answers_drawn: Whether the model writes the answers while it trains, so that `dataset` has a word in their place.
        micro_batches: Micro-batches per optimizer step.
        processes: Number of processes, each with micro-batches of its own.
        rank: Which of them this is.
        optimizer_built: Whether the optimizer exists already, so that it is too late to freeze parameters.
        chats: Gives the training conversations as they were before they were tokenised, up to 2,000 evenly spread; None where the
            host has them no more.
        reference_model: The host's own reference, as DPO, KTO and GRPO have one in full fine-tuning; see `shared_reference`.
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
    batch_tokens: float | None = None
    answers_drawn: bool = False
    micro_batches: int = 1
    processes: int = 1
    rank: int = 0
    optimizer_built: bool = False
    steps_early: bool = False
    autocast: str = "no"
    chats: Callable[[], Iterable[Chat]] | None = None
    reference_model: nn.Module | None = None

    @cached_property
    def identity(self) -> Identity:
        """Which model the run starts from; worked out once, by all processes together, for every method."""
        return identify(self.model, self.processes, self.rank)

    @cached_property
    def shared_reference(self) -> nn.Module | None:
        """The host's own reference, where it is the very model before this run and both are whole on every process; else None."""
        own = self.reference_model
        if own is None or peft_model(self.model) is not None or is_sharded(self.model) or is_sharded(own):
            return None
        return own if identify(own, self.processes, self.rank).reference == self.identity.reference else None

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

    @cached_property
    def sample(self) -> list[dict[str, Any]]:
        """Up to 2,000 training rows, evenly spread: the one walk over the data set. What tells of ids and labels is kept of each.

        Raises:
            ValueError: when rows have no `input_ids`.
        """
        return sample(self.dataset)

    @cached_property
    def rows(self) -> list[Row]:
        """Conversations of up to 256 of these rows, each with its labels; None where the host makes them only when it collates."""
        return list(labelled_conversations(self.sample, LOOKED_AT))

    def known(self, ids: Sequence[int], region: str) -> Known | None:
        """Return whose text stands where in a conversation, as the raw ones show it; None where they do not.

        Args:
            ids: Of the conversation.
            region: What is held of it: a `prefix` stands before the turns, anything else among them.
        """
        known = None if self.book is None else self.book.find(ids)
        return self.book.whole(known) if self.book is not None and known is not None and region != "prefix" else known

    def answers_alone(self, region: str) -> bool:
        """Return whether the loss takes answers alone.

        Raw conversations show it. From ids alone: where it takes rows whole, their first token is supervised too.

        Args:
            region: As for `known`; the raw conversations are asked about parts of the template alone.
        """
        labelled = [(ids, labels) for ids, labels in self.rows if labels]
        asked = labelled if region in TEMPLATE_REGIONS else []
        known = [(row, labels) for ids, labels in asked if (row := self.known(ids, region)) is not None]
        if known:
            return not any(
                labels[i] != IGNORE
                for row, labels in known
                for a, b in ((0, row.prefix), *short_of_answers(row.headers, [x != IGNORE for x in labels]), *row.users)
                for i in range(a, min(b, len(labels)))
            )
        begun = all(labels[0] == IGNORE for _, labels in labelled)
        return bool(labelled) and begun and any(x != IGNORE for x in labelled[0][1])

    @property
    def context_length(self) -> int:
        """The most tokens that model and tokenizer take."""
        config = base_causal_lm(self.model).config.get_text_config()
        longest = getattr(config, "max_position_embeddings", None) or 2**31
        return min(int(longest), int(getattr(self.tokenizer, "model_max_length", None) or 2**31))
