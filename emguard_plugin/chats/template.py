"""What a chat template writes around any conversation, for rows of which only the ids are there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from emguard_plugin.chats.dates import advice, before_date
from emguard_plugin.chats.rendering import THINKING, Rendered, locate, render, shared
from emguard_plugin.chats.tokens import Ids, decode, encode, inside, tokenize

_USER, _SYSTEM, _ASSISTANT, _AGAIN = "Quuxuser7", "Zorbsystem3", "Vexanswer9", "Wexuser8"


@dataclass(frozen=True)
class Marks:
    """The template's own text, as decoded tokens read.

    Attributes:
        before: Before the user's text, without a system message.
        opening: Before a system message's text; None where the template has no place for one.
        middle: Between a system message's text and the user's.
        header: What closes every prefix: the end that `before` has in common with a prefix under a system prompt.
        post: Between the user's text and the answer, short of an empty reasoning trace.
        trace: The empty reasoning trace that the template writes behind `post` where an answer has none of its own.
        reply: The part of `post` that opens the answer.
        again: Between an answer and the next user's text.
        close: The token with which `again` begins, where it is one that ordinary text never becomes.
        bos: The token that opens every text, where the tokenizer has one.
        certain: Which of `header`, `post` and `reply` hold a token that ordinary text never becomes.
    """

    before: str = ""
    opening: str | None = None
    middle: str = ""
    header: str = ""
    post: str = ""
    trace: str = ""
    reply: str = ""
    again: str = ""
    close: str = ""
    bos: str = ""
    certain: frozenset[str] = frozenset()

    @property
    def system_is_marked(self) -> bool:
        """Whether ids alone show that a conversation begins with a system prompt."""
        if self.opening is None or not self.opening.startswith(self.before):
            return True
        return bool(self.opening[len(self.before) :].strip()) and bool(self.middle.strip())


@dataclass(frozen=True)
class Template:
    """A chat template taken apart.

    Attributes:
        prefix: Ids wholly before the first user's own text, without a system message.
        user_header: Ids between system and user content, or empty when the template has no system turn.
        postfix: Ids wholly between the user's own text and what the model writes, an empty reasoning trace of the template's included.
        header: The same without that trace.
        dated_after: Ids that stand before today's date, when the prefix prints one; else None.
        system_open: Ids before a system message's content, short of the last; empty when there is no system turn.
        marks: The same as text.
        tools_unmarked: Whether tool definitions stand before the user's text so that ids alone do not show where they end.
        tokenizer: What reads it.
        advice: What to do about the date.
    """

    prefix: Ids
    user_header: Ids
    postfix: Ids
    dated_after: Ids | None = None
    header: Ids = ()
    system_open: Ids = ()
    marks: Marks = field(default_factory=Marks, repr=False)
    tokenizer: Any = field(default=None, repr=False, compare=False)
    advice: str = ""
    tools_unmarked: bool = False


def read_template(tokenizer: Any, **template_kwargs: Any) -> Template:
    """Take the tokenizer's chat template apart.

    Args:
        tokenizer: With a chat template.
        template_kwargs: Extra template variables, as the host passes them when it renders the data.

    Returns:
        Its prefix and postfix as token ids.

    Raises:
        ValueError: when there is no template, no user turn in it, or it refuses a question and an answer.
    """
    asked, parts = _first_rendering(tokenizer, template_kwargs)
    user, answer = _said("user", _USER, parts), _said("assistant", _ASSISTANT, parts)
    encoded = encode(tokenizer, asked.text)
    prefix = encoded.ids[: inside(encoded, 0, asked.prefix)[1]]
    post = asked.headers[0] if asked.headers else (asked.users[0][1],) * 2
    first, last = inside(encoded, *post)
    said = decode(tokenizer, encoded.ids)
    before, _, rest = said.partition(_USER)
    written = asked.text[post[0] : post[1]]
    written = written if rest.startswith(written) else rest.partition(_ASSISTANT)[0].rstrip()
    system_open, user_header, opening, middle = _system_turn(tokenizer, [_said("system", _SYSTEM, parts), user, answer], template_kwargs)
    marks = _marks(tokenizer, before, opening, middle, written, template_kwargs, parts)
    stable = before_date(tokenizer, [user], **template_kwargs)
    until = post[1] - len(marks.trace)
    return Template(
        prefix=prefix,
        user_header=user_header,
        postfix=encoded.ids[first:last],
        header=encoded.ids[first : inside(encoded, post[0], until)[1]],
        # The last token may merge with the date.
        dated_after=None if stable is None else tokenize(tokenizer, stable)[:-1],
        system_open=system_open,
        marks=marks,
        tokenizer=tokenizer,
        tools_unmarked=_tools_unmarked(tokenizer, user, marks, template_kwargs),
        advice="" if stable is None else advice(tokenizer, [user], **template_kwargs),
    )


def _said(role: str, text: str, parts: bool) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": text}] if parts else text}


def _first_rendering(tokenizer: Any, kwargs: Mapping[str, Any]) -> tuple[Rendered, bool]:
    """Render a question and an answer; templates of models that see images may want contents in parts."""
    problem: Exception | None = None
    for parts in (False, True):
        try:
            asked = locate(tokenizer, [_said("user", _USER, parts), _said("assistant", _ASSISTANT, parts)], **kwargs)
        except Exception as exc:
            if not _is_template_error(exc):
                raise
            problem = problem or exc
            continue
        if asked.has_user and _USER in asked.text:
            return asked, parts
    if problem is not None:
        raise ValueError(f"the chat template cannot render a question and an answer ({_line(problem)}).") from problem
    raise ValueError("the chat template does not print the user's content, so it has no prefix to hold.")


def _is_template_error(exc: Exception) -> bool:
    import jinja2

    return isinstance(exc, jinja2.TemplateError | TypeError | KeyError)


def _line(exc: Exception) -> str:
    return (str(exc).strip().splitlines() or [type(exc).__name__])[0]


def _system_turn(tokenizer: Any, messages: list[dict[str, Any]], kwargs: Mapping[str, Any]) -> tuple[Ids, Ids, str | None, str]:
    """Return the ids before a system message's text, short of the last, those from it to the user's, and both as text."""
    text = _rendered(tokenizer, messages, kwargs)
    start, end = text.find(_SYSTEM), text.find(_USER)
    if not 0 <= start < end:
        return (), (), None, ""
    encoded = encode(tokenizer, text)
    first, last = inside(encoded, start + len(_SYSTEM), end)
    opening, _, rest = decode(tokenizer, encoded.ids).partition(_SYSTEM)
    return tokenize(tokenizer, text[:start])[:-1], encoded.ids[first:last], opening, rest.partition(_USER)[0]


def _rendered(tokenizer: Any, messages: list[Any], kwargs: Mapping[str, Any]) -> str:
    try:
        return render(tokenizer, messages, **kwargs)
    except Exception as exc:  # templates refuse roles with raise_exception, or by an operation that a value does not have
        if not (_is_template_error(exc) or isinstance(exc, ValueError)):
            raise
        return ""


def _marks(tokenizer: Any, before: str, opening: str | None, middle: str, post: str, kwargs: Mapping[str, Any], parts: bool) -> Marks:
    user, answer = _said("user", _USER, parts), _said("assistant", _ASSISTANT, parts)

    def said(messages: list[Any], **more: Any) -> str:
        return decode(tokenizer, tokenize(tokenizer, _rendered(tokenizer, messages, {**kwargs, **more})))

    alone = said([user]).partition(_USER)[2]
    again = said([user, answer, _said("user", _AGAIN, parts)]).partition(_ASSISTANT)[2].partition(_AGAIN)[0]
    ids, bos = tokenize(tokenizer, before), getattr(tokenizer, "bos_token", None) or ""
    if middle.strip():
        n = _same(ids[::-1], tokenize(tokenizer, middle)[::-1])
        header = decode(tokenizer, ids[len(ids) - n :])
    else:
        header = before.removeprefix(bos)
    trace = ""
    if (mark := THINKING.search(post)) is not None:
        asking = said([user], add_generation_prompt=True).partition(_USER)[2]
        at = min(mark.start(), shared(post, asking) or mark.start())
        post, trace = post[:at], post[at:]
    ids = tokenize(tokenizer, post)
    reply = decode(tokenizer, ids[_same(ids, tokenize(tokenizer, alone)) :]) or post
    added = set(getattr(tokenizer, "added_tokens_decoder", {}))
    texts = {"header": header, "post": post, "reply": reply}
    certain = frozenset(n for n, text in texts.items() if added & set(tokenize(tokenizer, text)))
    closing = next((i for i in tokenize(tokenizer, again) if i in added), None)
    close = "" if closing is None else decode(tokenizer, [closing])
    return Marks(before, opening, middle, header, post, trace, reply, again, close, bos, certain)


def _tools_unmarked(tokenizer: Any, user: dict[str, Any], marks: Marks, kwargs: Mapping[str, Any]) -> bool:
    nothing = {"type": "object", "properties": {}}
    tool = {"type": "function", "function": {"name": "quuxtool", "description": "Zorb.", "parameters": nothing}}
    text = _rendered(tokenizer, [user], {**kwargs, "tools": [tool]})
    before = text.partition(_USER)[0]
    # A user's turn that opens before the tools do is all that ids show.
    return "quuxtool" in before and bool(marks.header.strip()) and marks.header in before.partition("quuxtool")[0]


def _same(a: Sequence[Any], b: Sequence[Any]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def system_prefix(tokenizer: Any, system: str, **template_kwargs: Any) -> Ids:
    """Return the prefix under the system prompt `system`.

    Raises:
        ValueError: when the template prints no system prompt.
    """
    messages = [{"role": "system", "content": system}, {"role": "user", "content": _USER}]
    text = _rendered(tokenizer, messages, template_kwargs)
    if _USER not in text:
        text = _rendered(tokenizer, [_said("system", system, True), _said("user", _USER, True)], template_kwargs)
    at = text.find(_USER)
    if at < 0 or system.strip() not in text[:at]:
        raise ValueError(f"`treft.extra_prefixes`: the chat template prints no system prompt ({system[:40]!r} is lost). Remove the key.")
    encoded = encode(tokenizer, text)
    return encoded.ids[: inside(encoded, 0, at)[1]]


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
