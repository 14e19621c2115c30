"""The parts of a row of which only the ids are there: read from its text, and nothing where that leaves a doubt."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from emguard_plugin.chats.rendering import Span, shared
from emguard_plugin.chats.template import Marks, Template
from emguard_plugin.chats.tokens import Encoded, Ids, inside, read


def prefix_of_row(row: Sequence[int], template: Template) -> Ids | None:
    """Return the ids wholly before the first user's own text, or None when the row shows no user turn of the template.

    A row that begins as the template does without a system message has the template's prefix, short of a last token that merged
    with the user's first characters. Any other row must begin as a system message does, and ends its prefix with the first user
    header. Where a template writes the system prompt into the user's turn without a mark of its own, ids alone cannot tell the
    two apart: the prefix then ends where that turn begins.
    """
    row = tuple(int(i) for i in row)
    known = template.prefix
    if template.tokenizer is None:
        return _by_ids(row, template)
    marks = template.marks
    plain = marks.opening is None or not marks.opening.startswith(marks.before) or not marks.system_is_marked
    if plain and known and row[: len(known)] == known:
        return known if len(row) > len(known) else None
    text, encoded = read(template.tokenizer, row)
    end = _prefix_end(text, marks)
    if end is None or end >= len(text):
        return None
    return row[: inside(encoded, 0, end)[1]]


def _by_ids(row: Ids, template: Template) -> Ids | None:
    """Return the prefix for a template of which only ids are known, whose marks are then tokens of their own."""
    known, header = template.prefix, template.user_header
    same = next((i for i, (a, b) in enumerate(zip(known, row, strict=False)) if a != b), min(len(known), len(row)))
    if len(row) > len(known) and same >= max(len(known) - 1, 1):
        return known[:same]
    for lead in (0, 1):  # the header's first token may have merged with the system prompt's last characters
        needle = header[lead:]
        found = _occurrences(row, needle) if needle and (lead == 0 or len(header) > 2) else []
        if found and found[0][1] < len(row):
            return row[: found[0][1]]
    return None


def _prefix_end(text: str, marks: Marks) -> int | None:
    """Return where the first user's own text begins; None where that is in doubt, or an answer stands before it."""
    opening, end = marks.opening, None
    with_system = opening is not None and marks.system_is_marked and text.startswith(opening)
    if with_system and opening is not None and opening.startswith(marks.before):  # the longer start first: both fit
        end = _behind(text, marks.middle, len(opening))
    elif marks.before and text.startswith(marks.before):
        return len(marks.before)
    elif "header" in marks.certain:
        begins = [b for b in (marks.before, opening) if b]
        if any(shared(text, b) > (len(marks.bos) if text.startswith(marks.bos) else 0) for b in begins):
            end = _behind(text, marks.header, 0)
    elif with_system and opening is not None and marks.middle.strip():
        end = _behind(text, marks.middle, len(opening))
    reply = marks.reply.strip()
    return None if end is not None and reply and reply in text[:end] else end


def _behind(text: str, part: str, start: int) -> int | None:
    at = text.find(part, start)
    return at + len(part) if at >= 0 else None


def headers_of_row(row: Sequence[int], template: Template, supervised: Sequence[bool] | None = None) -> list[tuple[int, int]]:
    """Return the half-open token ranges between queries and answers.

    Args:
        row: The ids of one conversation.
        template: From `read_template`.
        supervised: Per token whether the loss predicts it. Where only answers are, a header is followed by one; this decides
            where the template's marks are ordinary text, which a query or an answer may contain.
    """
    row, marks = tuple(int(i) for i in row), template.marks
    if template.tokenizer is None or not marks.post.strip():
        return _occurrences(row, template.postfix)
    text, encoded = read(template.tokenizer, row)
    begin = _prefix_end(text, marks) or 0
    places = _find_all(text, marks.post, begin)
    if marks.again == marks.post and "post" in marks.certain:  # one mark closes queries and answers alike: they take turns
        return _spans(encoded, [(at, _ends(text, at, marks)) for at in places[::2]])
    sure = _answered(text, places, marks) if "post" in marks.certain and marks.close else _alternating(text, places, marks)
    if sure != places:  # a query or an answer may hold the template's marks: where the loss tells, it decides
        told = _before_answers(encoded, [(at, _ends(text, at, marks)) for at in places], supervised)
        places = sure if told is None else told
    return _spans(encoded, [(at, _ends(text, at, marks)) for at in places])


def _ends(text: str, at: int, marks: Marks) -> int:
    """Return where the model begins to write: behind the mark at `at`, and the empty trace that the template writes, if it stands there."""
    end = at + len(marks.post)
    return end + len(marks.trace) if text.startswith(marks.trace, end) else end


def _spans(encoded: Encoded, places: list[Span]) -> list[Span]:
    return [span for place in places if (span := inside(encoded, *place))[1] > span[0]]


def _before_answers(encoded: Encoded, places: list[Span], supervised: Sequence[bool] | None) -> list[int] | None:
    if supervised is None or all(supervised) or not any(supervised):
        return None
    kept = []
    for at, end in places:
        behind = next((i for i, (_, b) in enumerate(encoded.spans) if b > end), None)
        if behind is not None and supervised[behind] and not supervised[inside(encoded, at, end)[0]]:
            kept.append(at)
    return kept


def _answered(text: str, places: list[int], marks: Marks) -> list[int]:
    """Return the places without those between which no answer is closed: one of them is a text's own."""
    near = [(a, b) for a, b in pairwise(places) if marks.close not in text[a + len(marks.post) : b]]
    return [at for at in places if not any(at in pair for pair in near)]


def _alternating(text: str, places: list[int], marks: Marks) -> list[int]:
    """Return the places when question and answer marks take turns as often as they must, else nothing."""
    if len(places) < 2:
        return places
    if not marks.again.strip():
        return []
    turns = _find_all(text, marks.again, places[0])
    order = sorted([(at, "post") for at in places] + [(at, "again") for at in turns])
    kinds = [kind for _, kind in order]
    expected = ["post", "again"] * len(places)
    return places if kinds == expected[: len(kinds)] and len(turns) in (len(places) - 1, len(places)) else []


def _find_all(text: str, part: str, start: int) -> list[int]:
    found, at = [], text.find(part, start)
    while at >= 0:
        found.append(at)
        at = text.find(part, at + len(part))
    return found


def _occurrences(row: Ids, needle: Ids) -> list[tuple[int, int]]:
    n = len(needle)
    return [(i, i + n) for i in range(len(row) - n + 1) if n and row[i : i + n] == needle]
