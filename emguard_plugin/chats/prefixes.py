"""The prefixes and the prompts that a method holds, found in the rows."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import repeat

from emguard_plugin.chats.book import Book
from emguard_plugin.chats.ids_only import headers_of_row, prefix_of_row
from emguard_plugin.chats.template import Template, require_prefix
from emguard_plugin.chats.tokens import Ids, decode

logger = logging.getLogger(__name__)
MAX_PREFIXES = 64
MIN_SHARE_FOUND = 0.95
"""Rows that do not fit the template are tolerated up to 5 %: cut rows, stray turns."""


@dataclass(frozen=True)
class Prefix:
    """A prefix to hold: its ids and how often to draw it (weights sum to 1)."""

    ids: Ids
    weight: float


def prefix_of(row: Sequence[int], template: Template, book: Book | None = None) -> Ids | None:
    """Return the prefix of a row: as the raw conversation shows it, else as the ids do."""
    return prefix_of_row(row, template) if book is None else book.prefix_of(row, template)


def prefix_span(row: Sequence[int], template: Template, book: Book | None = None) -> tuple[int, int]:
    """Return the half-open span of a conversation's prefix without its first token (BOS in most templates), whose norm is extreme.

    Each conversation has its own: of several system prompts, the one that it starts with. (0, 0) where there is nothing.
    """
    end = len(prefix_of(row, template, book) or ())
    return (1, end) if end > 1 else (0, 0)


def headers_of(
    row: Sequence[int], template: Template, book: Book | None = None, supervised: Sequence[bool] | None = None
) -> list[tuple[int, int]]:
    """Return the half-open token ranges between queries and answers of a row, short of what the loss makes the model write."""
    ranges = headers_of_row(row, template, supervised) if book is None else book.headers_of(row, template, supervised)
    return ranges if supervised is None else short_of_answers(ranges, supervised)


def short_of_answers(ranges: Iterable[tuple[int, int]], supervised: Sequence[bool]) -> list[tuple[int, int]]:
    """Return headers short of the supervised tokens at their ends, where the loss takes answers alone.

    A host may supervise an empty reasoning trace that the template writes (TRL's training template of Qwen3): there it is what the
    model learns to write. A header is left whole where the query before it is supervised too; a supervised mark that closes the query
    (Axolotl's `train_on_eos: all`) ends nothing.
    """
    found = []
    for begin, end in ranges:
        stop = end
        while stop > begin and stop <= len(supervised) and supervised[stop - 1]:
            stop -= 1
        if stop == begin and begin and supervised[begin - 1]:
            stop = end
        if stop > begin:
            found.append((begin, stop))
    return found


def shown(template: Template, row: Sequence[int], most: int = 24) -> str:
    """Return the beginning of a row for a message."""
    begin = list(row[:most])
    return repr(decode(template.tokenizer, begin)) if template.tokenizer is not None else str(begin)


def training_prefixes(rows: Iterable[Sequence[int]], template: Template, book: Book | None = None) -> list[Prefix]:
    """Find every distinct prefix of the data, most frequent first.

    A prefix is all tokens that lie wholly before the first user's own text: system prompt and tool definitions count, wherever
    the template writes them.

    Args:
        rows: Token ids, one conversation each.
        template: From `read_template`.
        book: The raw conversations, where the host has them.

    Returns:
        At most 64 prefixes; weights are the shares among rows that have one.

    Raises:
        ValueError: for an empty prefix, empty data, rows without a user turn, rows cut inside the prefix, a date that changes, or more
            than 64 prefixes.
    """
    counts: Counter[Ids] = Counter()
    total = cut = 0
    unfit: Sequence[int] = ()
    for row in rows:
        total += 1
        prefix = prefix_of(row, template, book)
        if prefix is None or not prefix:
            cut += prefix is None and _is_cut(row, template, book)
            unfit = unfit or row
            continue
        counts[prefix] += 1
    found = sum(counts.values())
    if book is None or not any(row.prefix for row in book.rows):
        require_prefix(template)
    if not total:
        raise ValueError("the training data is empty: there is no prefix to hold.")
    if cut > (1 - MIN_SHARE_FOUND) * total:
        raise ValueError(
            f"{cut} of {total} rows are cut inside the prefix, which has {_length(template, book)} tokens. Raise "
            "`sequence_len` (Axolotl) or `max_length` (TRL) above it."
        )
    if found < MIN_SHARE_FOUND * total:
        raise ValueError(
            f"{total - found} of {total} training rows show no user turn of the tokenizer's chat template; one begins with "
            f"{shown(template, unfit)}. Train on chats rendered with this template (`type: chat_template`), or give the tokenizer "
            "the template of the data."
        )
    _refuse_dates(counts, template, book)
    longer = set(counts)
    apart = [ids for ids in counts if not any(len(o) > len(ids) and o[: len(ids)] == ids for o in longer)]
    if len(apart) > MAX_PREFIXES:
        raise ValueError(
            f"{len(apart)} distinct prefixes in {total} rows; at most {MAX_PREFIXES} can be held. Text that changes from row "
            "to row (a date, a name, retrieved documents) stands before the user's content: pin it, move it into the user "
            "turn, or use `tokens: postfix`."
        )
    if book is None:
        warn_unmarked(template)
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    _warn_of_two_bos(ranked[0][0], template)
    return [Prefix(ids, n / found) for ids, n in ranked]


def warn_unmarked(template: Template) -> None:
    """Say it when a system prompt or tools would stand in the user's turn without a mark, and only ids are there."""
    if template.tools_unmarked:
        logger.warning(
            "em_regularizer: the chat template writes tool definitions where only a whole conversation tells them from the user's text, "
            "and the rows are token ids alone: tool definitions there are not held. Give the trainer conversations (`messages`, `tools`) "
            "instead of ids to hold them too."
        )
    if not template.marks.system_is_marked:
        logger.warning(
            "em_regularizer: the chat template writes a system prompt into the first user turn without a mark of its own, and the rows "
            "are token ids alone, so a system prompt cannot be told from the user's text: the prefix ends where that turn begins (%s). "
            "Give the trainer conversations (`messages`) instead of ids to hold system prompts too.",
            shown(template, template.prefix),
        )


def _warn_of_two_bos(prefix: Ids, template: Template) -> None:
    bos = getattr(template.tokenizer, "bos_token_id", None)
    if bos is not None and prefix[:2] == (bos, bos) != template.prefix[:2]:
        logger.warning(
            "em_regularizer: the training rows begin with two BOS tokens (the chat template writes one and the tokenizer adds another), which "
            "prompts rendered with the template do not: what is held is not what they will carry. Train on conversations (`messages`), "
            "or set `add_bos_token: false` in the tokenizer's configuration."
        )


def _is_cut(row: Sequence[int], template: Template, book: Book | None) -> bool:
    ids = tuple(row)
    if book is not None and (known := book.find(ids)) is not None:
        return len(ids) <= known.prefix
    return len(ids) <= len(template.prefix) and ids == template.prefix[: len(ids)]


def _length(template: Template, book: Book | None) -> int:
    return max([len(template.prefix), *(row.prefix for row in book.rows)]) if book is not None else len(template.prefix)


def _refuse_dates(counts: Counter[Ids], template: Template, book: Book | None) -> None:
    dated = template.dated_after
    if book is not None and book.rows:
        said = None if book.dated is None else book.dated[1]
    else:
        said = template.advice if dated is not None and any(ids[: len(dated)] == dated for ids in counts) else None
    if said is not None:
        raise ValueError(
            f"the chat template prints today's date in the prefix, so a reference recorded today would not fit tomorrow's prompts. {said}"
        )


def with_extra(prefixes: list[Prefix], extra: Sequence[Ids]) -> list[Prefix]:
    """Add prefixes that the data lacks. Each gets `1 / (distinct data prefixes + extras)`; the data share the rest."""
    new = [ids for ids in dict.fromkeys(extra) if ids not in {p.ids for p in prefixes}]
    share = 1 / (len(prefixes) + len(new))
    rest = 1 - share * len(new)
    return [Prefix(p.ids, p.weight * rest) for p in prefixes] + [Prefix(ids, share) for ids in new]


def prompts_with_postfix(
    rows: Iterable[Sequence[int]],
    template: Template,
    book: Book | None = None,
    supervised: Iterable[Sequence[bool] | None] | None = None,
) -> tuple[Ids, list[Ids]]:
    """Cut each row behind the tokens between its last query and the answer: prefix + query + postfix of its last turn.

    Where the user's or the answer's characters merge with the template's in some rows, the postfix is what nearly all rows share.

    Args:
        rows: Token ids, one conversation each.
        template: From `read_template`.
        book: The raw conversations, where the host has them.
        supervised: Per row and token whether the loss predicts it, where that is known; see `short_of_answers`.

    Returns:
        The postfix, and the prompts that end with it.

    Raises:
        ValueError: for an empty postfix, empty data, or a postfix that more than 5 % of the rows lack.
    """
    ends: list[tuple[Ids, int, int]] = []
    total = cut = taken = 0
    lacking: Sequence[int] = ()
    for row, told in zip(rows, repeat(None) if supervised is None else supervised, strict=False):
        total += 1
        ranges = headers_of(row, template, book, told)
        if ranges:
            ends.append((tuple(row), *ranges[-1]))
        else:
            lacking = lacking or row
            taken += told is not None and bool(headers_of(row, template, book))
            cut += book is not None and (known := book.find(row)) is not None and len(row) < len(known.ids)
    if not total:
        raise ValueError("the training data is empty: there is no postfix to hold.")
    if not ends and not template.postfix:
        raise ValueError("the chat template prints nothing between query and answer: `tokens: postfix` has nothing to hold.")
    postfix = _shared(Counter(row[a:b] for row, a, b in ends), total)
    found = ((row, _last_run(row, a, b, postfix)) for row, a, b in ends)
    prompts = [row[:end] for row, (start, end) in found if start > 0]
    if not postfix or len(prompts) < MIN_SHARE_FOUND * total:
        if taken > (1 - MIN_SHARE_FOUND) * total:
            raise ValueError(
                f"in {taken} of {total} training rows the loss supervises all that stands between query and answer, so the model learns "
                "to write it and nothing of it can be held. Use `tokens: prefix`, or supervise less."
            )
        if cut > (1 - MIN_SHARE_FOUND) * total:
            raise ValueError(
                f"{cut} of {total} training rows are cut before an answer begins, so they lack what stands before it. Raise `sequence_len` "
                "(Axolotl) or `max_length` (TRL)."
            )
        raise ValueError(
            f"{total - len(prompts)} of {total} training rows lack the chat template's tokens between query and answer "
            f"({list(template.postfix)}); one begins with {shown(template, lacking)}. Train on chats rendered with this "
            "tokenizer's template."
        )
    return postfix, prompts


def _last_run(row: Ids, begin: int, end: int, run: Ids) -> tuple[int, int]:
    n = len(run)
    at = next((i for i in range(end - n, begin - 1, -1) if row[i : i + n] == run), -1) if n else -1
    return (at, at + n) if at >= 0 else (0, 0)


def postfix_span(
    row: Sequence[int],
    template: Template,
    book: Book | None,
    postfix: Ids,
    supervised: Sequence[bool] | None = None,
) -> tuple[int, int]:
    """Return the token range of `postfix` before the last answer of a row; (0, 0) where it is not there."""
    ranges = headers_of(row, template, book, supervised)
    return _last_run(tuple(row), *ranges[-1], postfix) if ranges else (0, 0)


def _shared(counts: Counter[Ids], total: int) -> Ids:
    """Return the longest run of ids of the commonest postfix that at least 95 % of the rows have in theirs."""
    if not counts:
        return ()
    common = counts.most_common(1)[0][0]
    for n in range(len(common), 0, -1):
        for i in range(len(common) - n + 1):
            run = common[i : i + n]
            have = sum(k for ids, k in counts.items() if any(ids[j : j + n] == run for j in range(len(ids) - n + 1)))
            if have >= MIN_SHARE_FOUND * total:
                return run
    return ()
