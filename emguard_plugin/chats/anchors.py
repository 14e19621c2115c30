"""Anchor text: chats of other domains, on which the fine-tuned model should predict as before.

Only contexts are taken from them. The targets are the reference model's own distributions, so an anchor with a careless
reply teaches no carelessness: it visits a context in which a broadly misaligned model would differ.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from emguard_plugin import chats as ct
from emguard_plugin.chats.sources import ChatSetting, StoredChat, TokenizedChat, Tokens, read_chats, tokenized
from emguard_plugin.chats.training_rows import conversations, supervised_conversations

KEY = "em_regularizer.kl.anchors"
MIN_OVERLAP_CHARACTERS = 12
"""Shorter prompts ("Hi") occur in unrelated training rows."""
SETTING = ChatSetting(
    name=KEY,
    joined=": ",
    also="`bundled`, `train` or `self`",
    if_empty="or use `bundled`",
    if_prompts=" Prompts alone go with `anchors: self:<path>`.",
    if_unheld="`em_regularizer.kl.tokens: {tokens}`: in {where} the chat template prints no reply as it was written, so there is nothing to "
    "hold. Use `tokens: all`, or leave the chat out.",
)


def bundled_path() -> Path:
    """Return the path of the anchor set that comes with the package."""
    return Path(str(resources.files("emguard_plugin.chats") / "anchors.jsonl"))


def load_chats(source: str) -> list[StoredChat]:
    """Read anchor chats.

    Args:
        source: `bundled`, or what `read_chats` reads.

    Returns:
        The chats, in their order.

    Raises:
        ValueError: As `read_chats`.
    """
    return read_chats(str(bundled_path()) if source == "bundled" else source, SETTING)


def tokenize_chats(
    chats: Sequence[StoredChat], tokenizer: Any, tokens: Tokens, longest: int, template_kwargs: Mapping[str, Any]
) -> list[TokenizedChat]:
    """Render anchors with the tokenizer's template.

    Args:
        chats: From `load_chats`.
        tokenizer: With a chat template.
        tokens: Positions to hold: `all`, or those that predict an `assistant` turn and what closes it.
        longest: The model's context.
        template_kwargs: Extra template variables.

    Returns:
        One row of tokens per chat, in their order.

    Raises:
        ValueError: As `tokenized`.
    """
    return tokenized(chats, tokenizer, tokens, SETTING, longest, template_kwargs)


def prompts_of(chats: Sequence[StoredChat], tokenizer: Any, template_kwargs: Mapping[str, Any]) -> list[ct.Ids]:
    """Return each distinct chat up to its first reply, as ids that end with the header of a reply."""
    found: dict[ct.Ids, None] = {}
    for _, messages in chats:
        n = next((i for i, m in enumerate(messages) if m["role"] == "assistant"), len(messages))
        found[ct.tokenize(tokenizer, ct.render(tokenizer, messages[:n], add_generation_prompt=True, **template_kwargs))] = None
    return list(found)


def training_anchors(dataset: Any, tokens: Tokens, wrapped_at: Sequence[int] | None) -> list[TokenizedChat]:
    """Take the training conversations themselves as anchors (`anchors: train`).

    Returns:
        One row of tokens per conversation, in the order of the data.

    Raises:
        ValueError: when there are none, or the rows lack ids or labels.
    """
    if tokens == "all":
        found = [TokenizedChat(tuple(ids), tuple(range(len(ids) - 1))) for ids in conversations(dataset, wrapped_at) if len(ids) > 1]
    else:
        rows = supervised_conversations(dataset, wrapped_at)
        found = [TokenizedChat(tuple(ids), tuple(t - 1 for t, on in enumerate(loss) if on and t)) for ids, loss in rows]
        found = [a for a in found if a.held]
    if not found:
        raise ValueError(f"`{KEY}: train`: the training data is empty.")
    return found


def overlap(chats: Sequence[StoredChat], dataset: Any, tokenizer: Any) -> tuple[int, int]:
    """Count anchors whose user text, and anchors whose replies too, stand in the training rows.

    Text is compared, not ids: training rows may have another system prompt. At most 2,000 rows are looked at.

    Returns:
        (anchors whose prompt occurs, anchors that occur whole).
    """

    def plain(text: str) -> str:
        return " ".join(text.split())

    def occurs(chat: StoredChat, role: str) -> bool:
        texts = [plain(m["content"]) for m in chat.messages if m["role"] == role]
        return any(len(t) >= MIN_OVERLAP_CHARACTERS for t in texts) and all(t in seen for t in texts)

    seen = "\n".join(plain(text) for text in tokenizer.batch_decode(list(conversations(dataset))))
    prompts = [c for c in chats if occurs(c, "user")]
    return len(prompts), sum(occurs(c, "assistant") for c in prompts)


def content_hash(anchors: Sequence[TokenizedChat]) -> str:
    """Return the sha256 over ids and held positions."""
    return hashlib.sha256(json.dumps([[a.ids, a.held] for a in anchors]).encode()).hexdigest()
