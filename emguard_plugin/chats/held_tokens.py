"""Which tokens of a training batch a penalty holds, and where conversations lie in it, packed or padded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from emguard_plugin.chats import Book, Template, headers_of, prefix_span

TokenKind = Literal["assistant", "all", "prompt", "header", "prefix"]
IGNORE = -100


def real_tokens(inputs: Mapping[str, Any]) -> Tensor:
    """Return (B, T): True where a token is no padding.

    Hosts that pack may pad without an attention mask, all at position 0.
    """
    ids = inputs["input_ids"]
    mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    real = torch.ones_like(ids, dtype=torch.bool)
    if mask is not None and mask.shape == ids.shape:
        real &= mask > 0
    if positions is not None and positions.shape == ids.shape:
        first = positions == 0
        # The first token of a conversation is followed by one at position 1.
        followed = torch.nn.functional.pad(positions[:, 1:] == 1, (0, 1))
        alone = first & ~followed
        if (labels := inputs.get("labels")) is not None:
            alone &= labels == IGNORE  # what is supervised is a conversation of one token
        real &= ~alone
    return real


def held_tokens(inputs: Mapping[str, Any], kind: TokenKind, template: Template | None = None, book: Book | None = None) -> Tensor:
    """Return (B, T): True at the tokens to hold.

    Args:
        inputs: The batch: `input_ids`, `labels`, and `attention_mask` or `position_ids` where the host has them.
        kind: `assistant`: tokens that the loss supervises. `prompt`: all other real ones. `all`: both. `header`: the chat
            template's tokens wholly between a user's own text and what the model writes. `prefix`: those wholly before the first
            own text of each conversation, system prompt and tools included, without the conversation's first token; in a packed
            row every conversation has its own.
        template: The chat template, for the last two.
        book: The raw conversations, where the host has them.

    Raises:
        RuntimeError: for a batch without token ids or labels.
        ValueError: without the template that `kind` needs.
    """
    for name in ("input_ids", "labels"):
        if inputs.get(name) is None:
            raise RuntimeError(f"em_regularizer.block_em: the batch has {sorted(inputs)} but no `{name}`.")
    supervised = inputs["labels"] != IGNORE
    if kind == "assistant":
        return supervised
    real = real_tokens(inputs)
    if kind == "all":
        return real
    if kind == "prompt":
        return real & ~supervised
    if template is None:
        raise ValueError(f"em_regularizer.block_em: `tokens: {kind}` needs the chat template.")
    return _in_conversations(inputs, kind, template, book)


def _in_conversations(inputs: Mapping[str, Any], kind: TokenKind, template: Template, book: Book | None) -> Tensor:
    ids = inputs["input_ids"]
    held, rows = torch.zeros(ids.shape, dtype=torch.bool), ids.tolist()
    labels: Any = inputs["labels"].tolist() if kind == "header" else None
    for b, row in enumerate(spans(inputs)):
        for start, end in row:
            if kind == "prefix":
                ranges = [prefix_span(rows[b][start:end], template, book)]
            else:
                supervised = [x != IGNORE for x in labels[b][start:end]]
                ranges = headers_of(rows[b][start:end], template, book, supervised)
            for first, last in ranges:
                held[b, start + first : start + last] = True
    return held.to(ids.device)


def answered(labels: Tensor) -> Tensor:
    """Return, of the labels' shape, True at supervised tokens beside another: one alone may be a mark that closes any turn."""
    on = labels != IGNORE
    beside = torch.nn.functional.pad(on, (1, 1))
    return on & (beside[..., 2:] | beside[..., :-2])


def spans(inputs: Mapping[str, Any]) -> list[list[tuple[int, int]]]:
    """Return the conversations of each row as (start, end), end excluded. Padding belongs to none."""
    real = real_tokens(inputs).tolist()
    positions = inputs.get("position_ids")
    rows = positions.tolist() if positions is not None and positions.shape == inputs["input_ids"].shape else [None] * len(real)
    found = []
    for keep, where in zip(real, rows, strict=True):
        row: list[tuple[int, int]] = []
        for i, kept in enumerate(keep):
            if not kept:
                continue
            if not row or row[-1][1] != i or (where is not None and where[i] == 0):
                row.append((i, i))
            row[-1] = (row[-1][0], i + 1)
        found.append(row)
    return found
