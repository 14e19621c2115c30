"""Token spans of a chat template: prefix (before the first user content), postfix (between query and answer).

The boundary is found in the rendered text, then checked against the ids of real rows: a BPE merge across the boundary
moves it by a token, and only the rows know.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_USER, _SYSTEM, _ASSISTANT = "Quuxuser7", "Zorbsystem3", "Vexanswer9"
_DATES = ("03 Feb 1999", "17 Nov 2031")
MAX_PREFIXES = 64
MIN_SHARE_FOUND = 0.95
"""Rows that do not fit the template are tolerated up to 5 %: cut rows, stray turns."""

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Template:
    """A chat template taken apart.

    Attributes:
        prefix: Ids before the first user content, without a system message.
        user_header: Ids between system and user content, or empty when the template has no system turn.
        postfix: Ids between user and assistant content.
        dated_after: Ids that stand before today's date, when the prefix prints one; else None.
        system_open: Ids before a system message's content, short of the last; empty when there is no system turn.
    """

    prefix: Ids
    user_header: Ids
    postfix: Ids
    dated_after: Ids | None = None
    system_open: Ids = ()


@dataclass(frozen=True)
class Prefix:
    """A prefix to hold: its ids and how often to draw it (weights sum to 1)."""

    ids: Ids
    weight: float


def tokenize(tokenizer: Any, text: str) -> Ids:
    """Tokenise rendered template text, which has its own BOS."""
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def render(tokenizer: Any, messages: list[dict[str, str]], **kwargs: Any) -> str:
    """Render messages with the tokenizer's chat template.

    Raises:
        ValueError: when the tokenizer has no chat template.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "the tokenizer has no chat template, so no prefix can be found. Set `chat_template:` (Axolotl) or "
            "`chat_template_path` (TRL), or load a chat model's tokenizer."
        )
    return tokenizer.apply_chat_template(messages, tokenize=False, **kwargs)


def _before_user(text: str) -> str:
    at = text.find(_USER)
    if at < 0:
        raise ValueError("the chat template does not print the user's content, so it has no prefix to hold.")
    return text[:at]


def read_template(tokenizer: Any, **template_kwargs: Any) -> Template:
    """Take the tokenizer's chat template apart.

    Args:
        tokenizer: With a chat template.
        template_kwargs: Extra template variables, as the host passes them when it renders the data.

    Raises:
        ValueError: when there is no template, or no user turn in it.
    """
    user = {"role": "user", "content": _USER}
    text = _before_user(render(tokenizer, [user], **template_kwargs))
    dated = [_before_user(render(tokenizer, [user], strftime_now=lambda _f, d=d: d, **template_kwargs)) for d in _DATES]
    system_open, user_header = _system_turn(tokenizer, user, template_kwargs)
    return Template(
        prefix=tokenize(tokenizer, text),
        user_header=user_header,
        postfix=_postfix(tokenizer, user, template_kwargs),
        dated_after=_ids_before_date(tokenizer, dated),
        system_open=system_open,
    )


def _ids_before_date(tokenizer: Any, dated: list[str]) -> Ids | None:
    if dated[0] == dated[1]:
        return None
    same = (a == b for a, b in zip(*dated, strict=False))
    stable = dated[0][: sum(itertools.takewhile(bool, same))]
    return tokenize(tokenizer, stable)[:-1]  # the last token may merge with the date


def _system_turn(tokenizer: Any, user: dict[str, str], kwargs: Mapping[str, Any]) -> tuple[Ids, Ids]:
    """Return the ids before a system message's content, short of the last, and those from it to the user's."""
    import jinja2

    try:
        text = render(tokenizer, [{"role": "system", "content": _SYSTEM}, user], **kwargs)
    except (jinja2.TemplateError, ValueError):  # templates refuse a system role with raise_exception
        return (), ()
    start, end = text.find(_SYSTEM), text.find(_USER)
    if not 0 <= start < end:
        return (), ()
    return tokenize(tokenizer, text[:start])[:-1], tokenize(tokenizer, text[start + len(_SYSTEM) : end])


def _postfix(tokenizer: Any, user: dict[str, str], kwargs: Mapping[str, Any]) -> Ids:
    text = render(tokenizer, [user, {"role": "assistant", "content": _ASSISTANT}], **kwargs)
    start, end = text.find(_USER), text.find(_ASSISTANT)
    return tokenize(tokenizer, text[start + len(_USER) : end]) if 0 <= start < end else ()


def system_prefix(tokenizer: Any, system: str, **template_kwargs: Any) -> Ids:
    """Return the prefix under the system prompt `system`.

    Raises:
        ValueError: when the template prints no system prompt.
    """
    import jinja2

    messages = [{"role": "system", "content": system}, {"role": "user", "content": _USER}]
    try:
        text = _before_user(render(tokenizer, messages, **template_kwargs))
    except jinja2.TemplateError as exc:
        text = str(exc)
    if system.strip() not in text:
        raise ValueError(
            f"`treft.extra_prefixes`: the chat template prints no system prompt ({system[:40]!r} is lost). Remove the key."
        )
    return tokenize(tokenizer, text)


def find(needle: Sequence[int], row: Sequence[int], start: int = 0) -> int:
    """Return the first position of `needle` in `row` at or after `start`, or -1."""
    n = len(needle)
    if not n:
        return -1
    for at in range(start, len(row) - n + 1):
        if row[at] == needle[0] and tuple(row[at : at + n]) == tuple(needle):
            return at
    return -1


def prefix_of_row(row: Sequence[int], template: Template) -> Ids | None:
    """Return the ids before the first user content of a row, or None when it shows no user turn.

    A row that starts as the template does without a system message has the template's prefix, short of a last token
    that merged with the user's first characters. Any other row ends its prefix with its first user header.
    """
    known = template.prefix
    same = next((i for i, (a, b) in enumerate(zip(known, row, strict=False)) if a != b), min(len(known), len(row)))
    if same == len(known) and len(row) > same:
        return known
    header = template.user_header
    for lead in (0, 1):  # the header's first token may have merged with the system prompt's last characters
        needle = header[lead:]
        at = find(needle, row) if len(needle) > 0 and (lead == 0 or len(header) > 2) else -1
        if at >= 0 and at + len(needle) < len(row):
            return tuple(row[: at + len(needle)])
    if same == len(known) - 1 and same > 0 and len(row) > len(known):
        return known[:same]
    return None


def prefix_span(row: Sequence[int], template: Template) -> tuple[int, int]:
    """Return the half-open span of a conversation's prefix without its first token (BOS in most templates), whose norm is extreme.

    Each conversation has its own: of several system prompts, the one that it starts with. (0, 0) where there is nothing.
    """
    end = len(prefix_of_row(row, template) or ())
    return (1, end) if end > 1 else (0, 0)


def require_prefix(template: Template) -> None:
    """Refuse a template that prints nothing before the user's content.

    Raises:
        ValueError: for a prefix of zero tokens.
    """
    if not template.prefix:
        raise ValueError(
            "the chat template prints nothing before the user's content: the prefix has zero tokens, so "
            "`treft.tokens: prefix` has nothing to hold. Use `tokens: postfix`."
        )


def training_prefixes(rows: Iterable[Sequence[int]], template: Template) -> list[Prefix]:
    """Find every distinct prefix of the data, most frequent first.

    Args:
        rows: Token ids, one conversation each.
        template: From `read_template`.

    Returns:
        At most 64 prefixes; weights are the shares among rows that have one.

    Raises:
        ValueError: for an empty prefix, empty data, rows without a user turn, rows cut inside the prefix, a date that changes, or more
            than 64 prefixes.
    """
    counts: dict[Ids, int] = {}
    total = cut = 0
    for row in rows:
        total += 1
        prefix = prefix_of_row(row, template)
        if prefix is None:
            cut += len(row) <= len(template.prefix) and tuple(row) == template.prefix[: len(row)]
            continue
        counts[prefix] = counts.get(prefix, 0) + 1
    found = sum(counts.values())
    require_prefix(template)
    if not total:
        raise ValueError("the training data is empty: there is no prefix to hold.")
    if cut > (1 - MIN_SHARE_FOUND) * total:
        raise ValueError(
            f"{cut} of {total} rows are cut inside the prefix, which has {len(template.prefix)} tokens. Raise "
            "`sequence_len` (Axolotl) or `max_length` (TRL) above it."
        )
    if found < MIN_SHARE_FOUND * total:
        raise ValueError(
            f"{total - found} of {total} training rows show no user turn of the tokenizer's chat template. Train on chats "
            "rendered with this template (`type: chat_template`), or give the tokenizer the template of the data."
        )
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    dated = template.dated_after
    if dated is not None and any(ids[: len(dated)] == dated for ids, _ in ranked):
        raise ValueError(
            "the chat template prints today's date in the prefix, so a reference recorded today would not fit "
            "tomorrow's prompts. Pin it: `chat_template_kwargs: {date_string: '26 Jul 2024'}` "
            "(Axolotl; a column of that name in TRL), or write the date into the tokenizer's template."
        )
    if len(ranked) > MAX_PREFIXES:
        raise ValueError(
            f"{len(ranked)} distinct prefixes in {total} rows; at most {MAX_PREFIXES} can be held. Text that changes from row "
            "to row (a date, a name, retrieved documents) stands before the user's content: pin it, move it into the user "
            "turn, or use `tokens: postfix`."
        )
    return [Prefix(ids, n / found) for ids, n in ranked]


def with_extra(prefixes: list[Prefix], extra: Sequence[Ids]) -> list[Prefix]:
    """Add prefixes that the data lacks. Each gets `1 / (distinct data prefixes + extras)`; the data share the rest."""
    new = [ids for ids in dict.fromkeys(extra) if ids not in {p.ids for p in prefixes}]
    share = 1 / (len(prefixes) + len(new))
    rest = 1 - share * len(new)
    return [Prefix(p.ids, p.weight * rest) for p in prefixes] + [Prefix(ids, share) for ids in new]


def prompts_with_postfix(rows: Iterable[Sequence[int]], postfix: Ids) -> list[Ids]:
    """Cut each row after the last occurrence of the postfix: prefix + query + postfix of its last turn.

    Raises:
        ValueError: for an empty postfix, empty data, or a postfix that more than 5 % of the rows lack.
    """
    if not postfix:
        raise ValueError("the chat template prints nothing between query and answer: `tokens: postfix` has nothing to hold.")
    total, found = 0, []
    for row in rows:
        total += 1
        at, nxt = -1, find(postfix, row)
        while nxt >= 0:
            at, nxt = nxt, find(postfix, row, nxt + 1)
        if at > 0:
            found.append(tuple(row[: at + len(postfix)]))
    if not total:
        raise ValueError("the training data is empty: there is no postfix to hold.")
    if len(found) < MIN_SHARE_FOUND * total:
        raise ValueError(
            f"{total - len(found)} of {total} training rows lack the chat template's tokens between query and answer "
            f"({list(postfix)}). Train on chats rendered with this tokenizer's template."
        )
    return found
