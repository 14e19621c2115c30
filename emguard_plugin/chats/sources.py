"""Chats from wherever a setting names them, and their tokens with the positions that are supervised."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from emguard_plugin import chats as ct
from emguard_plugin.files import read_rows
from emguard_plugin.files.chats import Messages, messages_of

ENDINGS = (".jsonl", ".json", ".ndjson", ".jsonl.gz", ".json.gz", ".ndjson.gz")
"""Files of a folder that are read."""

Tokens = Literal["all", "assistant"]


class StoredChat(NamedTuple):
    """One chat and where it stands, for error messages."""

    where: str
    messages: Messages


class TokenizedChat(NamedTuple):
    """A tokenised chat: its ids, and the positions t whose prediction of token t + 1 is held, or supervised."""

    ids: tuple[int, ...]
    held: tuple[int, ...]


@dataclass(frozen=True)
class ChatSetting:
    """The setting that names chats, in the words of whoever wrote it.

    Attributes:
        name: As the user writes it.
        joined: What stands between name and value.
        also: Its values that are no path.
        if_empty: What else helps where a file is empty.
        if_prompts: What helps where a chat has no reply.
        if_unheld: What is said where no position of the chat at `{where}` is held, with these `{tokens}`.
    """

    name: str
    joined: str
    also: str = ""
    if_empty: str = ""
    if_prompts: str = ""
    if_unheld: str = ""

    def given(self, source: str) -> str:
        """Return the setting with its value."""
        return f"`{self.name}{self.joined}{source}`"


def read_chats(source: str, setting: ChatSetting) -> list[StoredChat]:
    """Read chats.

    Args:
        source: A file of JSON Lines or one JSON list, packed as `.gz` or not; a folder with such files or one saved by `datasets`;
            or the name of a data set, with `:split` if not `train`. Every row has `messages`, a list of `role` and `content`, or
            is of another form that `emguard_plugin/files/chats.py` lists.
        setting: What names them.

    Returns:
        The chats, in their order.

    Raises:
        ValueError: when nothing can be read there, it is empty, or a row is not a chat with a user turn.
    """
    path = Path(source).expanduser()
    if path.is_file():
        rows = _read_file(path, setting)
    elif path.is_dir() and (files := sorted(f for f in path.iterdir() if f.name.endswith(ENDINGS))) and not _is_saved(path):
        rows = [row for file in files for row in _read_file(file, setting)]
    else:
        rows = _read_dataset(source, path, setting)
    if not rows:
        raise ValueError(f"{setting.given(source)} is empty. Give chats, one per line{setting.if_empty and ', '}{setting.if_empty}.")
    return [StoredChat(where, _check_chat(row, where, setting)) for where, row in rows]


def _is_saved(path: Path) -> bool:
    return any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json", "state.json"))


def _read_file(path: Path, setting: ChatSetting) -> list[tuple[str, Any]]:
    try:
        return [(where, row) for where, row, _ in read_rows(path)]
    except ValueError as exc:
        raise ValueError(f"`{setting.name}`: {exc}") from None


def _read_dataset(source: str, path: Path, setting: ChatSetting) -> list[tuple[str, Any]]:
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
            f"{setting.given(source)} is no file, no folder with chats, and no data set that can be loaded "
            f"({type(exc).__name__}: {str(exc).splitlines()[0] if str(exc) else ''}). Give the path of a JSONL of "
            f"chats{setting.also and ', or '}{setting.also}."
        ) from exc
    return [(f"{source}, row {i + 1}", row) for i, row in enumerate(found)]


def _check_chat(row: Any, where: str, setting: ChatSetting) -> Messages:
    try:
        messages = messages_of(row, where)
    except ValueError as exc:
        raise ValueError(f"`{setting.name}`: {exc}") from None
    if not any(m["role"] == "user" for m in messages):
        raise ValueError(f"`{setting.name}`: {where} has no user turn.")
    return messages


def tokenized(
    chats: Sequence[StoredChat],
    tokenizer: Any,
    tokens: Tokens,
    setting: ChatSetting,
    longest: int | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
) -> list[TokenizedChat]:
    """Render chats with the tokenizer's template.

    Args:
        chats: From `read_chats`.
        tokenizer: With a chat template.
        tokens: Positions to hold: `all`, or those that predict an `assistant` turn and what closes it.
        setting: What names them.
        longest: The model's context, where it matters.
        template_kwargs: Extra template variables.

    Returns:
        One row of tokens per chat, in their order.

    Raises:
        ValueError: for chats without a reply, longer than the context, or that the template cannot render.
    """
    import jinja2

    kwargs, found = template_kwargs or {}, []
    for where, messages in chats:
        if not any(m["role"] == "assistant" for m in messages):
            raise ValueError(f"`{setting.name}`: {where} has no assistant turn.{setting.if_prompts}")
        try:
            if tokens == "assistant":
                row = ct.known_row(tokenizer, messages, **kwargs)
                ids, held = row.ids, [t for a, b in row.replies for t in range(max(a, 1) - 1, b - 1)]
            else:
                ids = ct.tokenize(tokenizer, ct.render(tokenizer, messages, **kwargs))
                held = list(range(len(ids) - 1))
        except jinja2.TemplateError as exc:
            raise ValueError(f"`{setting.name}`: the chat template cannot render {where} ({exc}).") from exc
        if not held:
            raise ValueError(setting.if_unheld.format(where=where, tokens=tokens))
        if longest is not None and len(ids) > longest:
            raise ValueError(
                f"`{setting.name}`: {where} has {len(ids)} tokens, the model's context is {longest}. Shorten it or leave it out."
            )
        found.append(TokenizedChat(ids, tuple(held)))
    return found
