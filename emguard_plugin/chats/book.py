"""Conversations of the training set as they were before they were tokenised: the truth about whose text is whose."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from emguard_plugin.chats.dates import advice, before_date
from emguard_plugin.chats.ids_only import headers_of_row, prefix_of_row
from emguard_plugin.chats.rendering import locate
from emguard_plugin.chats.template import Template
from emguard_plugin.chats.tokens import Ids, encode, inside, touching

SLOW_ROWS = 100
"""Most rows to read with a tokenizer written in Python, which has no offsets."""
_DATED_LOOKS = 64

Range = tuple[int, int]


class Chat(NamedTuple):
    """A conversation, and what the host passes to the template besides (`tools`, `chat_template`, variables)."""

    messages: Sequence[Mapping[str, Any]]
    kwargs: Mapping[str, Any]


class Known(NamedTuple):
    """A tokenised conversation with the half-open token ranges of its parts.

    `prefix` tokens lie wholly before the first own text of a user or an assistant, `headers` wholly between a query and what the
    model writes in answer; `users` and `answers` are every token that has a character of theirs, and `replies` are answers with
    what closes them.
    """

    ids: Ids
    prefix: int
    headers: tuple[Range, ...] = ()
    users: tuple[Range, ...] = ()
    answers: tuple[Range, ...] = ()
    has_user: bool = True
    replies: tuple[Range, ...] = ()


def known_row(tokenizer: Any, messages: Sequence[Mapping[str, Any]], *, turns: bool = True, **kwargs: Any) -> Known:
    """Render and tokenise a conversation as hosts do, and find its parts.

    Args:
        tokenizer: With a chat template, unless `chat_template` is among `kwargs`.
        messages: The conversation.
        turns: Whether to look beyond the prefix, at some renderings per turn.
        kwargs: What the host passes to the template besides.

    Returns:
        Its token ids, and where its parts begin and end.

    Raises:
        ValueError: when the tokenizer has no chat template.
        jinja2.TemplateError: when the template refuses the conversation.
    """
    text = locate(tokenizer, messages, turns=turns, **kwargs)
    encoded = encode(tokenizer, text.text)
    headers = [r for span in text.headers if (r := inside(encoded, *span))[1] > r[0]]
    users, answers = (tuple(touching(encoded, *span) for span in spans if span[1] > span[0]) for spans in (text.users, text.answers))
    replies = []
    for (start, end), closed in zip(text.answers, text.closed, strict=True):
        first, last = touching(encoded, start, end)
        replies.append((first, max(last, inside(encoded, end, closed)[1])))
    return Known(encoded.ids, inside(encoded, 0, text.prefix)[1], tuple(headers), users, answers, text.has_user, tuple(replies))


@dataclass
class Book:
    """Training conversations whose parts are known, looked up by their ids.

    Attributes:
        rows: What was read, as far as the prefix; see `whole`.
        refused: How many conversations the template refuses.
        dated: What stands before today's date in a prefix, and what to do about it; None where no date stands.
        chats: The conversations by their ids.
        tokenizer: What tokenised them.
    """

    rows: list[Known]
    refused: int = 0
    dated: tuple[str, str] | None = None
    chats: dict[Ids, Chat] = field(default_factory=dict, repr=False)
    tokenizer: Any = field(default=None, repr=False)
    _turns: dict[Ids, Known] = field(default_factory=dict, repr=False)
    _whole: dict[Ids, Known] = field(default_factory=dict, repr=False)
    _cut: dict[int, dict[Ids, Known]] = field(default_factory=dict, repr=False)
    _starts: list[Ids] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        self._whole = _by_ids(self.rows, None)
        held = {row.ids[: row.prefix] for row in self.rows if row.prefix}
        doubtful = {
            long
            for long in held
            for row in self.rows
            if row.prefix < len(long) and row.ids[: len(long)] == long  # there, these ids are a user's own text
        }
        self._starts = sorted(held - doubtful, key=len, reverse=True)

    def find(self, row: Sequence[int]) -> Known | None:
        """Return the conversation that a row of ids is, or is the beginning of."""
        ids = tuple(row)
        if (known := self._whole.get(ids)) is not None:
            return known
        if len(ids) < 2 or (len(self._cut) > 8 and len(ids) not in self._cut):
            return None  # hosts cut at one length
        if len(ids) not in self._cut:
            self._cut[len(ids)] = _by_ids((r for r in self.rows if len(r.ids) > len(ids)), len(ids))
        return self._cut[len(ids)].get(ids)

    def whole(self, known: Known) -> Known:
        """Return a row with the parts of all its turns, worked out when first asked for."""
        if known.ids not in self._turns:
            chat = self.chats[known.ids]
            self._turns[known.ids] = known_row(self.tokenizer, chat.messages, **chat.kwargs)
        return self._turns[known.ids]

    def prefix_of(self, row: Sequence[int], template: Template | None) -> Ids | None:
        """Return the prefix of a row of ids; None when it shows none, or is cut inside it."""
        ids = tuple(row)
        known = self.find(ids)
        if known is not None:
            return ids[: known.prefix] if known.has_user and len(ids) > known.prefix else None
        for start in self._starts:
            if len(ids) > len(start) and ids[: len(start)] == start:
                return start
        return None if template is None else prefix_of_row(ids, template)

    def headers_of(self, row: Sequence[int], template: Template | None, supervised: Sequence[bool] | None = None) -> list[Range]:
        """Return the token ranges between queries and answers of a row of ids."""
        if (known := self.find(row)) is not None:
            return [(a, b) for a, b in self.whole(known).headers if b <= len(row)]
        return [] if template is None else headers_of_row(row, template, supervised)


def _by_ids(rows: Iterable[Known], length: int | None) -> dict[Ids, Known]:
    """Return rows by their first ids; of two that read the same, the one whose user says more."""
    found: dict[Ids, Known] = {}
    for row in rows:
        ids = row.ids[:length]
        if ids not in found or row.prefix < found[ids].prefix:
            found[ids] = row
    return found


def read_book(tokenizer: Any, chats: Iterable[Chat]) -> Book:
    """Read conversations. Those that the template refuses are counted."""
    import jinja2

    rows: list[Known] = []
    first: dict[Ids, Chat] = {}
    chat_of: dict[Ids, Chat] = {}
    refused = 0
    for chat in chats:
        try:
            row = known_row(tokenizer, chat.messages, turns=False, **chat.kwargs)
        except (jinja2.TemplateError, TypeError, KeyError, AttributeError):
            refused += 1
            continue
        rows.append(row)
        chat_of[row.ids] = chat
        first.setdefault(row.ids[: row.prefix], chat)
        if len(rows) >= SLOW_ROWS and not getattr(tokenizer, "is_fast", False):
            break
    ranked = Counter(row.ids[: row.prefix] for row in rows)
    for ids, _ in ranked.most_common(_DATED_LOOKS):
        chat = first[ids]
        if (stable := before_date(tokenizer, chat.messages, **chat.kwargs)) is not None:
            return Book(rows, refused, (stable, advice(tokenizer, chat.messages, **chat.kwargs)), chat_of, tokenizer)
    return Book(rows, refused, None, chat_of, tokenizer)
