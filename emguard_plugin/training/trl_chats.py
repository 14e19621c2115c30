"""The conversations that TRL's SFT trainer is given, as it hands them to the chat template."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from transformers import ProcessorMixin
from trl.data_utils import is_conversational, maybe_convert_to_chatml, prepare_multimodal_messages

from emguard_plugin.chats import Chat
from emguard_plugin.chats.training_rows import spread


def has_chats(dataset: Any) -> bool:
    """Whether rows are conversations: `messages`, `conversations`, or `prompt` and `completion` as messages."""
    row = next(iter(dataset), None) if dataset is not None else None
    return row is not None and "input_ids" not in row and _messages(row) is not None


def _messages(row: Any) -> list[Any] | None:
    row = maybe_convert_to_chatml(dict(row))
    if not is_conversational(row):
        return None
    return row["prompt"] + row["completion"] if "prompt" in row else row.get("messages")


def read_chats(dataset: Any, processing_class: Any, chat_template: str | None) -> Iterator[Chat]:
    """Yield up to 2,000 conversations with what TRL passes to the template: tools, the row's own variables, the template.

    Args:
        dataset: As TRL got it, before its preparation.
        processing_class: The tokenizer, or a processor that has one.
        chat_template: The training template that TRL uses in the place of the tokenizer's, or None.
    """
    sees_images = isinstance(processing_class, ProcessorMixin)
    if sees_images and chat_template is None:
        chat_template = processing_class.chat_template
    for row in spread(dataset):
        messages = _messages(row)
        if messages is None:
            continue
        tools = row.get("tools")
        kwargs = {"tools": json.loads(tools) if isinstance(tools, str) else tools, **(row.get("chat_template_kwargs") or {})}
        if chat_template is not None:
            kwargs.setdefault("chat_template", chat_template)
        yield Chat(prepare_multimodal_messages(messages) if sees_images else messages, kwargs)
