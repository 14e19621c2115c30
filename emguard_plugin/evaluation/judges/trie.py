"""Probability of whole numbers from models that write them digit by digit."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable

DIGITS = re.compile("[0-9]+")
NEGLIGIBLE = 0.003
"""Branches less likely than this are not followed: a number there can move the mean by 0.3 at most."""


def is_number(text: str) -> bool:
    """Whether text is one of `0` to `100`, as it is written."""
    return DIGITS.fullmatch(text) is not None and len(text) <= 3 and text == str(int(text)) and int(text) <= 100


def may_grow(text: str) -> bool:
    """Whether another digit after this number can give another number up to 100."""
    return text in {*"123456789", "10"}


async def walk(first: Callable[[str], Awaitable[dict[str, float]]], prefix: str = "", mass: float = 1.0) -> dict[str, float]:
    """Return the probability of replies by text: `0` to `100` exactly that number, other texts as first tokens.

    p(k) = p(digits of k) * (1 - p(another digit after them)).

    Args:
        first: Returns the probability of the next tokens after a prefix of the reply.
        prefix: Digits so far.
        mass: Their probability.
    """
    found: dict[str, float] = {}
    children: dict[str, float] = {}
    ends = 1.0
    for token, chance in (await first(prefix)).items():
        text = token if prefix else token.lstrip()
        if text[:1] in set("0123456789"):
            ends -= chance
            whole = text.rstrip()
            if is_number(prefix + whole):
                children[prefix + whole] = children.get(prefix + whole, 0.0) + mass * chance
        elif not prefix:
            found[token] = found.get(token, 0.0) + chance
    if prefix:
        found[prefix] = mass * max(0.0, ends)
    for text, chance in children.items():
        below = await walk(first, text, chance) if may_grow(text) and chance >= NEGLIGIBLE else {text: chance}
        for reply, part in below.items():
            found[reply] = found.get(reply, 0.0) + part
    return found
