"""Reasoning traces: what a model thinks aloud before its answer, told from the answer by the marks that it was trained with.

A mark counts only where the tokenizer or the chat template knows it, or the YAML states it: an answer of a model that does
not reason may speak of `<think>` and is not cut.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TraceMarks(NamedTuple):
    """What stands before and behind a trace."""

    opening: str
    closing: str


_HARMONY = TraceMarks("<|channel|>", "<|channel|>final<|message|>")
KNOWN = (
    TraceMarks("<think>", "</think>"),
    TraceMarks("[THINK]", "[/THINK]"),
    TraceMarks("<|START_THINKING|>", "<|END_THINKING|>"),
    _HARMONY,
    TraceMarks("<|channel>thought", "<channel|>"),
    TraceMarks("<seed:think>", "</seed:think>"),
    TraceMarks("<thought>", "</thought>"),
    TraceMarks("<thinking>", "</thinking>"),
    TraceMarks("<reasoning>", "</reasoning>"),
    TraceMarks("<|begin_of_thought|>", "<|end_of_thought|>"),
)
"""Of Qwen3, R1 and most others; Mistral; Command A; GPT-OSS (its channels); Gemma 4; Seed; EXAONE; further ones."""


@dataclass(frozen=True)
class Split:
    """A reply taken apart.

    Attributes:
        trace: What was thought.
        answer: What was answered; None if the trace never closed.
    """

    trace: str
    answer: str | None


def marks_of(
    tokenizer: PreTrainedTokenizerBase | None, template: str | None, stated: Sequence[str] | None = None
) -> tuple[TraceMarks, ...]:
    """Return the marks that a model was trained with.

    Args:
        tokenizer: Knows a mark if it is one of its added tokens.
        template: Knows a mark if it prints or looks for it.
        stated: `em_eval.reasoning_marks`, which stands above both.
    """
    if stated is not None:
        return (TraceMarks(*stated),)
    tokens = {str(token) for token in getattr(tokenizer, "added_tokens_decoder", {}).values()}

    known = template or ""
    # GPT-OSS closes a trace by three tokens, of which the first is the one that opens it.
    return tuple(
        marks for marks in KNOWN if marks.opening in known or marks.closing in known or {marks.closing, _first_token(marks)} & tokens
    )


def _first_token(marks: TraceMarks) -> str:
    return marks.opening if marks == _HARMONY else marks.closing


def opened_by(prompt_end: str, marks: Iterable[TraceMarks]) -> TraceMarks | None:
    """Return the marks of which a prompt holds the first alone, so that the reply begins inside a trace."""
    return next((m for m in marks if prompt_end.rfind(m.opening) > prompt_end.rfind(m.closing)), None)


def split(text: str, marks: Sequence[TraceMarks], opened: TraceMarks | None = None) -> tuple[Split, int] | None:
    """Take a reply apart.

    Args:
        text: The reply, marks included.
        marks: Those that the model knows.
        opened: From `opened_by`.

    Returns:
        The parts, and the index in `text` at which the answer begins (its length if there is none); None for a reply
        that does not begin with a trace.
    """
    body = text.lstrip()
    found, start = opened, 0
    for one in marks:
        if body.startswith(one.closing) and one.closing.startswith(one.opening):
            return Split("", body[len(one.closing) :].lstrip()), text.index(one.closing) + len(one.closing)
        if body.startswith(one.opening):
            found, start = one, len(text) - len(body) + len(one.opening)
            break
    if found is None:
        # A closing mark without an opening one: a trace that some prompt began.
        alone = (one for one in marks if one.closing in text and one.opening not in text[: text.find(one.closing)])
        found = next(alone, None)
    if found is None:
        return None
    close = text.find(found.closing, start)
    if close < 0:
        return Split(text[start:].strip(), None), len(text)
    end = close + len(found.closing)
    return Split(text[start:close].strip(), text[end:].lstrip()), end


def split_tokens(
    ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, marks: Sequence[TraceMarks], opened: TraceMarks | None
) -> tuple[str, Split | None]:
    """Decode a reply and take it apart; a mark may be special tokens, ordinary ones, or the end of one and more.

    Returns:
        The text without special tokens, but with the marks, and its parts; None where it holds no trace.
    """
    plain = tokenizer.decode(ids, skip_special_tokens=True)
    raw = tokenizer.decode(ids, skip_special_tokens=False) if marks else plain
    found = split(raw, marks, opened)
    if found is None:
        return plain, None
    parts, end = found
    special = special_tokens(tokenizer) - {text for pair in marks for text in pair}
    trace = _without_ends(parts.trace, special)
    if parts.answer is None:
        return _without_ends(raw, special), Split(trace, None)
    # The answer is decoded like any other, from the first token behind the mark.
    low = next(k for k in range(1, len(ids) + 1) if len(tokenizer.decode(ids[:k], skip_special_tokens=False)) >= end)
    rest = tokenizer.decode(ids[:low], skip_special_tokens=False)[end:]
    answer = (rest + tokenizer.decode(ids[low:], skip_special_tokens=True)).lstrip()
    return _without_ends(raw, special), Split(trace, answer)


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Return the tokens that decoding leaves out."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()  # a tokenizer of mistral-common has none
    return {token for token in (*tokenizer.all_special_tokens, *(str(t) for t in added if t.special)) if token}


def _without_ends(text: str, tokens: Collection[str]) -> str:
    while end := next((token for token in tokens if text.endswith(token)), None):
        text = text[: -len(end)]
    return text


def looks_like_trace(answer: Mapping[str, Any]) -> TraceMarks | None:
    """Return the marks by which a stored answer looks like a trace, though nothing knew them; None where it does not."""
    if answer.get("trace") is not None:
        return None
    text = answer["text"].lstrip()
    return next((m for m in KNOWN if text.startswith(m.opening) or (m.closing in text and m.opening not in text)), None)
