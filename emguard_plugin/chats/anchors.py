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
from typing import Any, Literal, NamedTuple

from emguard_plugin import chats as ct
from emguard_plugin.chats.training_rows import conversations, supervised_conversations
from emguard_plugin.files import read_rows
from emguard_plugin.files.chats import Messages, messages_of

KEY = "em_regularizer.kl.anchors"
MIN_OVERLAP_CHARACTERS = 12
"""Shorter prompts ("Hi") occur in unrelated training rows."""
ENDINGS = (".jsonl", ".json", ".ndjson", ".jsonl.gz", ".json.gz", ".ndjson.gz")
"""Files of a folder that are read."""

Tokens = Literal["all", "assistant"]


class Chat(NamedTuple):
    """One anchor chat and where it stands, for error messages."""

    where: str
    messages: Messages


class Anchor(NamedTuple):
    """A tokenised anchor: its ids, and the positions t whose prediction of token t + 1 is held."""

    ids: tuple[int, ...]
    held: tuple[int, ...]


def bundled_path() -> Path:
    """Return the path of the anchor set that comes with the package."""
    return Path(str(resources.files("emguard_plugin.chats") / "anchors.jsonl"))


def load_chats(source: str) -> list[Chat]:
    """Read anchor chats.

    Args:
        source: `bundled`; a file of JSON Lines or one JSON list, packed as `.gz` or not; a folder with such files or one saved
            by `datasets`; or the name of a data set, with `:split` if not `train`. Every row has `messages`, a list of `role` and
            `content`, or is of another form that `emguard_plugin/files/chats.py` lists.

    Raises:
        ValueError: when nothing can be read there, it is empty, or a row is not a chat with a reply.
    """
    path = bundled_path() if source == "bundled" else Path(source).expanduser()
    if path.is_file():
        rows = _read_file(path)
    elif path.is_dir() and (files := sorted(f for f in path.iterdir() if f.name.endswith(ENDINGS))) and not _is_saved(path):
        rows = [row for file in files for row in _read_file(file)]
    else:
        rows = _read_dataset(source, path)
    if not rows:
        raise ValueError(f"`{KEY}: {source}` is empty. Give chats, one per line, or use `bundled`.")
    return [Chat(where, _check_chat(row, where)) for where, row in rows]


def _is_saved(path: Path) -> bool:
    return any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json", "state.json"))


def _read_file(path: Path) -> list[tuple[str, Any]]:
    try:
        return [(where, row) for where, row, _ in read_rows(path)]
    except ValueError as exc:
        raise ValueError(f"`{KEY}`: {exc}") from None


def _read_dataset(source: str, path: Path) -> list[tuple[str, Any]]:
    import datasets

    try:
        if path.is_dir() and _is_saved(path):
            found = datasets.load_from_disk(str(path))
            found = found["train"] if isinstance(found, datasets.DatasetDict) else found
        else:
            name, _, split = source.partition(":")
            found = datasets.load_dataset(name, split=split or "train")
    except Exception as exc:  # `datasets` raises many kinds, some of its own
        raise ValueError(
            f"`{KEY}: {source}` is no file, no folder with chats, and no data set that can be loaded "
            f"({type(exc).__name__}: {str(exc).splitlines()[0] if str(exc) else ''}). Give the path of a JSONL of chats, or "
            "`bundled`, `train` or `self`."
        ) from exc
    return [(f"{source}, row {i + 1}", row) for i, row in enumerate(found)]


def _check_chat(row: Any, where: str) -> Messages:
    try:
        messages = messages_of(row, where)
    except ValueError as exc:
        raise ValueError(f"`{KEY}`: {exc}") from None
    if not any(m["role"] == "user" for m in messages):
        raise ValueError(f"`{KEY}`: {where} has no user turn.")
    return messages


def tokenize_chats(chats: Sequence[Chat], tokenizer: Any, tokens: Tokens, longest: int, template_kwargs: Mapping[str, Any]) -> list[Anchor]:
    """Render chats with the tokenizer's template.

    Args:
        chats: From `load_chats`.
        tokenizer: With a chat template.
        tokens: Positions to hold: `all`, or those that predict an `assistant` turn and what closes it.
        longest: The model's context.
        template_kwargs: Extra template variables.

    Raises:
        ValueError: for chats without a reply, longer than the context, or that the template cannot render.
    """
    import jinja2

    anchors = []
    for where, messages in chats:
        if not any(m["role"] == "assistant" for m in messages):
            raise ValueError(f"`{KEY}`: {where} has no assistant turn. Prompts alone go with `anchors: self:<path>`.")
        try:
            if tokens == "assistant":
                row = ct.known_row(tokenizer, messages, **template_kwargs)
                ids, held = row.ids, [t for a, b in row.replies for t in range(max(a, 1) - 1, b - 1)]
            else:
                ids = ct.tokenize(tokenizer, ct.render(tokenizer, messages, **template_kwargs))
                held = range(len(ids) - 1)
        except jinja2.TemplateError as exc:
            raise ValueError(f"`{KEY}`: the chat template cannot render {where} ({exc}).") from exc
        if not held:
            raise ValueError(
                f"`em_regularizer.kl.tokens: {tokens}`: in {where} the chat template prints no reply as it was written, so there is "
                "nothing to hold. Use `tokens: all`, or leave the chat out."
            )
        if len(ids) > longest:
            raise ValueError(f"`{KEY}`: {where} has {len(ids)} tokens, the model's context is {longest}. Shorten it or leave it out.")
        anchors.append(Anchor(ids, tuple(held)))
    return anchors


def prompts_of(chats: Sequence[Chat], tokenizer: Any, template_kwargs: Mapping[str, Any]) -> list[ct.Ids]:
    """Return each distinct chat up to its first reply, as ids that end with the header of a reply."""
    found: dict[ct.Ids, None] = {}
    for _, messages in chats:
        n = next((i for i, m in enumerate(messages) if m["role"] == "assistant"), len(messages))
        found[ct.tokenize(tokenizer, ct.render(tokenizer, messages[:n], add_generation_prompt=True, **template_kwargs))] = None
    return list(found)


def training_anchors(dataset: Any, tokens: Tokens, wrapped_at: Sequence[int] | None) -> list[Anchor]:
    """Take the training conversations themselves as anchors (`anchors: train`).

    Raises:
        ValueError: when there are none, or the rows lack ids or labels.
    """
    if tokens == "all":
        found = [Anchor(tuple(ids), tuple(range(len(ids) - 1))) for ids in conversations(dataset, wrapped_at) if len(ids) > 1]
    else:
        rows = supervised_conversations(dataset, wrapped_at)
        found = [Anchor(tuple(ids), tuple(t - 1 for t, on in enumerate(loss) if on and t)) for ids, loss in rows]
        found = [a for a in found if a.held]
    if not found:
        raise ValueError(f"`{KEY}: train`: the training data is empty.")
    return found


def overlap(chats: Sequence[Chat], dataset: Any, tokenizer: Any) -> tuple[int, int]:
    """Count anchors whose user text, and anchors whose replies too, stand in the training rows.

    Text is compared, not ids: training rows may have another system prompt. At most 2,000 rows are looked at.

    Returns:
        (anchors whose prompt occurs, anchors that occur whole).
    """

    def plain(text: str) -> str:
        return " ".join(text.split())

    def occurs(chat: Chat, role: str) -> bool:
        texts = [plain(m["content"]) for m in chat.messages if m["role"] == role]
        return any(len(t) >= MIN_OVERLAP_CHARACTERS for t in texts) and all(t in seen for t in texts)

    seen = "\n".join(plain(text) for text in tokenizer.batch_decode(list(conversations(dataset))))
    prompts = [c for c in chats if occurs(c, "user")]
    return len(prompts), sum(occurs(c, "assistant") for c in prompts)


def content_hash(anchors: Sequence[Anchor]) -> str:
    """Return the sha256 over ids and held positions."""
    return hashlib.sha256(json.dumps([[a.ids, a.held] for a in anchors]).encode()).hexdigest()
