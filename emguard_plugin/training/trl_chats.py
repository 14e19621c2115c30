"""The conversations that TRL's trainers are given, as they hand them to the chat template."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import ProcessorMixin
from trl.data_utils import is_conversational, maybe_convert_to_chatml, prepare_multimodal_messages

from emguard_plugin.chats import Chat
from emguard_plugin.chats.training_rows import spread
from emguard_plugin.training.policy_rows import ANSWER


def has_chats(dataset: Any) -> bool:
    """Whether rows are conversations: `messages`, `conversations`, or a `prompt` of messages, alone or with an answer."""
    row = next(iter(dataset), None) if dataset is not None else None
    return row is not None and "input_ids" not in row and _messages(row) is not None


def _messages(row: Any) -> list[Any] | None:
    """Return a row's conversation: of a pair the chosen one, of a prompt alone with a word in the place of the answer."""
    row = maybe_convert_to_chatml(dict(row))
    if not is_conversational(row):
        return None
    if "chosen" in row:  # without a prompt, TRL takes out what both answers begin with
        return [*row.get("prompt", []), *row["chosen"]]
    return [*row["prompt"], *row.get("completion", [ANSWER])] if "prompt" in row else row.get("messages")


def read_chats(dataset: Any, processing_class: Any, chat_template: str | None, more: Mapping[str, Any] | None = None) -> Iterator[Chat]:
    """Yield up to 2,000 conversations with what TRL passes to the template: tools, the row's own variables, the template.

    Args:
        dataset: As TRL got it, before its preparation.
        processing_class: The tokenizer, or a processor that has one.
        chat_template: The training template that TRL uses in the place of the tokenizer's, or None.
        more: What TRL passes for every row, in the place of the row's own.
    """
    sees_images = isinstance(processing_class, ProcessorMixin)
    if sees_images and chat_template is None:
        chat_template = processing_class.chat_template
    for row in spread(dataset):
        messages = _messages(row)
        if messages is None:
            continue
        tools = row.get("tools")
        own = {"tools": json.loads(tools) if isinstance(tools, str) else tools, **(row.get("chat_template_kwargs") or {})}
        kwargs = own if more is None else dict(more)
        if chat_template is not None:
            kwargs.setdefault("chat_template", chat_template)
        yield Chat(prepare_multimodal_messages(messages) if sees_images else messages, kwargs)
