"""What a chat completion says, read without trust: a type, a number or a choice that is not what was asked for is a failure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from emguard_plugin.evaluation.calls.faults import Failed

ABOVE_ZERO = 1e-5
"""A logprob above 0 by no more than this is rounding, and read as 0."""
ABOVE_ONE = 0.01
"""Probabilities that sum to more than 1 by no more than this were computed in half precision."""


@dataclass(frozen=True)
class Reply:
    """What the server answered.

    Attributes:
        text: The message.
        finish: `stop` or `length`.
        model: The model that answered, by its own account.
        fingerprint: `system_fingerprint`, or empty.
        first: Probability of the likeliest first tokens, by text; None if the server sent none.
        tokens: Length of the message in tokens, or 0 if the server did not say.
        refusal: The model's own refusal, or empty.
        trace: The reasoning trace, where the server takes it apart from the message.
    """

    text: str
    finish: str
    model: str
    fingerprint: str
    first: dict[str, float] | None
    tokens: int
    refusal: str = ""
    trace: str | None = None


def read_reply(raw: Any, need_logprobs: bool) -> Reply:
    """Return what a decoded body says.

    Args:
        raw: The body.
        need_logprobs: Whether a reply without usable logprobs is a failure; otherwise they are left out.

    Raises:
        Failed: If it is no chat completion, or not the choice that was asked for; says what is wrong with it.
    """
    body = _object(raw, "the reply")
    choice = _first_choice(body)
    message = _object(choice.get("message"), "`message`")
    text, refusal = _text(message, "content"), message.get("refusal")
    first = None
    try:
        first = first_tokens(choice.get("logprobs"))
    except Failed:
        if need_logprobs:
            raise
    return Reply(
        text=text,
        finish=_text(choice, "finish_reason") or "stop",
        model=_text(body, "model", needed=True),
        fingerprint=_text(body, "system_fingerprint"),
        first=first,
        tokens=_count(body.get("usage")),
        refusal=refusal if isinstance(refusal, str) else "it declined" if refusal else "",
        trace=_text(message, "reasoning_content") or _text(message, "reasoning") or None,
    )


def first_tokens(logprobs: Any) -> dict[str, float] | None:
    """Return the probability of the likeliest first tokens, by text; None if the server sent none.

    p = exp(logprob), of every entry of `content[0].top_logprobs`; tokens of one spelling are added up.

    Raises:
        Failed: If a logprob is no finite number of at most 0, or if the probabilities sum to more than 1.
    """
    if logprobs is None:
        return None
    content = _object(logprobs, "`logprobs`").get("content")
    if content is None or content == []:
        return None
    entries = _object(_list(content, "`logprobs.content`")[0], "`logprobs.content`").get("top_logprobs")
    if entries is None or entries == []:
        return None
    found: dict[str, float] = {}
    for entry in _list(entries, "`top_logprobs`"):
        token, value = _object(entry, "`top_logprobs`").get("token"), entry.get("logprob")
        if not isinstance(token, str):
            raise Failed("a token of `top_logprobs` is no text")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise Failed(f"the logprob of {_short(token)} is {_short(value)}, not a number")
        if not -math.inf < value <= ABOVE_ZERO:  # NaN is neither
            raise Failed(f"the logprob of {_short(token)} is {_short(value)}, which is no logarithm of a probability")
        found[token] = found.get(token, 0.0) + (math.exp(min(0.0, float(value))) if value > -1e6 else 0.0)
    total = sum(found.values())
    if total > 1 + ABOVE_ONE:
        raise Failed(f"the probabilities of the first token sum to {total:.3f}")
    return found


def _first_choice(body: dict[str, Any]) -> dict[str, Any]:
    choices = [_object(choice, "a choice") for choice in _list(body.get("choices"), "`choices`")]
    marked = [choice for choice in choices if type(choice.get("index")) is int and choice["index"] == 0]
    if not marked and len(choices) == 1 and choices[0].get("index") is None:
        marked = choices
    if len(marked) != 1:
        raise Failed(f"the server sent no chat completion: {len(marked)} of {len(choices)} choices have the index 0")
    return marked[0]


def _object(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Failed(f"the server sent no chat completion: {what} is {_short(value)}")
    return value


def _list(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise Failed(f"the server sent no chat completion: {what} is {_short(value)}")
    return value


def _text(holder: dict[str, Any], key: str, needed: bool = False) -> str:
    value = holder.get(key)
    if value is None and not needed:
        return ""
    if not isinstance(value, str) or (needed and not value):
        raise Failed(f"the server sent no chat completion: `{key}` is {_short(value)}")
    return value


def _count(usage: Any) -> int:
    found = usage.get("completion_tokens") if isinstance(usage, dict) else None
    return found if type(found) is int and 0 <= found < 2**40 else 0


def _short(value: Any) -> str:
    """Return a value for a message; of what is large, its kind alone."""
    if isinstance(value, dict | list):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    if isinstance(value, int) and abs(value) >= 10**30:
        return "a huge number"
    return "missing" if value is None else repr(value[:60] if isinstance(value, str) else value)
