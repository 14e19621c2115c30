"""Where a conversation's own texts stand in its rendering, to the character.

Nothing is searched for. A conversation is rendered as it is, and again with one text replaced by a word that occurs nowhere: what
stands before that word is what the template writes before the text, whatever the text looks like.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

WORD = "Quuxword"
ANSWER_FIELDS = ("content", "reasoning_content", "reasoning", "thinking")
"""The texts of an assistant message; a reasoning trace is the answer's own, like what follows it."""
_MARK = r"(?:<\|?/?[\w:]*(?:think|thought|reasoning)[\w:]*\|?>|\[/?THINK\]|<\|channel>thought|<channel\|>)"
THINKING = re.compile(_MARK, re.IGNORECASE)
"""What opens or closes a reasoning trace, in the generation prompt or in the answer."""
EMPTY_TRACE = re.compile(rf"(?:{_MARK}\s*{_MARK}|</[\w:]+>)", re.IGNORECASE)
"""A trace of blanks alone; or the mark that closes one, where the template writes no other (DeepSeek V3.1)."""

_SYSTEM = ("system", "developer")
_ANSWER = ("assistant", "gpt", "model", "bot", "chatbot", "ai")
_TOOL = ("tool", "function", "ipython", "observation")

Message = Mapping[str, Any]
Span = tuple[int, int]


@dataclass(frozen=True)
class Rendered:
    """A rendered conversation and the half-open character spans of its parts.

    Attributes:
        text: As the host tokenises it.
        prefix: Characters before the first text that is a user's, an assistant's or a tool's own.
        users: The own texts of user and tool messages, as far as the template prints them.
        headers: Per answer that follows a user or tool message: what the template writes between the two before the model
            writes its first token. Where the template has a generation prompt, this is what training and generation share;
            where it has none, all up to the answer's own text. An empty, closed reasoning trace that the template itself writes
            is the template's: the header ends behind it, whether or not the generation prompt writes it too (Qwen3: with
            `enable_thinking: false` alone). A trace that says something is the answer's, with the mark that opens it, also
            where the generation prompt writes that mark (R1).
        answers: The answers, from where the model begins to write to the end of their own text, reasoning trace included.
        closed: Per answer, the end of what closes it.
        has_user: Whether a user's text is printed.
    """

    text: str
    prefix: int
    users: tuple[Span, ...] = ()
    headers: tuple[Span, ...] = ()
    answers: tuple[Span, ...] = ()
    closed: tuple[int, ...] = field(default=())
    has_user: bool = True


def render(tokenizer: Any, messages: Sequence[Message], **kwargs: Any) -> str:
    """Render messages with the tokenizer's chat template.

    Args:
        tokenizer: With a chat template, unless `chat_template` is among `kwargs`.
        messages: With `role` and `content`.
        kwargs: What the host passes besides: `tools`, `chat_template`, the template's own variables.

    Returns:
        The text that the model is trained on.

    Raises:
        ValueError: when the tokenizer has no chat template.
    """
    if not (getattr(tokenizer, "chat_template", None) or kwargs.get("chat_template")):
        raise ValueError(
            "the tokenizer has no chat template, so no prefix can be found. Set `chat_template:` (Axolotl) or "
            "`chat_template_path` (TRL), or load a chat model's tokenizer."
        )
    return tokenizer.apply_chat_template(list(messages), tokenize=False, **kwargs)


def whose(message: Message) -> str:
    """Return `system`, `answer`, `tool` or `user`. A role of another name, as data sets have them, speaks for a user."""
    role = message.get("role")
    return next((n for n, roles in {"system": _SYSTEM, "answer": _ANSWER, "tool": _TOOL}.items() if role in roles), "user")


def shared(a: str, b: str) -> int:
    """Return the number of characters with which both begin."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[:middle] == b[:middle] else (low, middle - 1)
    return low


def locate(tokenizer: Any, messages: Sequence[Message], *, turns: bool = True, **kwargs: Any) -> Rendered:
    """Render a conversation and find its parts.

    Args:
        tokenizer: As for `render`.
        messages: The conversation.
        turns: Whether to look beyond the prefix.
        kwargs: As for `render`.

    Returns:
        The text, and the half-open spans of its parts in characters.

    Raises:
        ValueError: when the tokenizer has no chat template.
        jinja2.TemplateError: when the template refuses the conversation.
    """
    text = render(tokenizer, messages, **kwargs)
    look = _Look(tokenizer, list(messages), text, kwargs)
    own: dict[int, Span] = {}
    for i, message in enumerate(messages):
        if whose(message) != "system" and (span := look.own_text(i)) is not None:
            own[i] = span
            if not turns:
                break
    has_user = bool(own) and any(whose(m) == "user" for m in (messages if not turns else [messages[i] for i in own]))
    prefix = min((start for start, _ in own.values()), default=0)
    if not turns:
        return Rendered(text, prefix, has_user=has_user)
    users = tuple(own[i] for i in own if whose(messages[i]) != "answer")
    headers, answers, closed = look.answers(own)
    return Rendered(text, prefix, users, headers, answers, closed, has_user)


class _Look:
    """One conversation, rendered with words in the place of its texts."""

    def __init__(self, tokenizer: Any, messages: list[Message], text: str, kwargs: Mapping[str, Any]) -> None:
        self.tokenizer, self.messages, self.text, self.kwargs = tokenizer, messages, text, kwargs
        self.word = next(w for n in range(10**6) if (w := f"{WORD}{n}") not in text)

    def own_text(self, i: int) -> Span | None:
        """Return where message i's own text stands, None where it has none or the template prints it nowhere."""
        message = self.messages[i]
        # A question may be empty, and still has its place; an answer that is empty has none.
        fields = [n for n in ANSWER_FIELDS if message.get(n)] if whose(message) == "answer" else ["content"]
        spans = [s for name in fields if (s := self._span(i, name)) is not None]
        return (min(s for s, _ in spans), max(e for _, e in spans)) if spans else None

    def _span(self, i: int, name: str) -> Span | None:
        found = self._with_word(i, name, "instead")
        if found is not None:
            before, after = found
            if self.text.startswith(before) and self.text.endswith(after) and len(before) + len(after) <= len(self.text):
                return len(before), len(self.text) - len(after)
        kept = self._kept_span(i, name)
        if kept is not None or found is None:
            return kept
        start = shared(self.text, before)  # what both renderings share is never the text's own
        return start, max(start, len(self.text) - shared(self.text[:start:-1], after[::-1]))

    def _kept_span(self, i: int, name: str) -> Span | None:
        """Return where a text stands that switches something in the template: it stays there, with the word in front and behind."""
        front = self._with_word(i, name, "front")
        if front is None or not self.text.startswith(front[0]) or self.text[len(front[0]) :].strip() != front[1].strip():
            return None
        start, behind = len(front[0]), self._with_word(i, name, "behind")
        if behind is not None and self.text.endswith(behind[1]):
            return start, max(start, len(self.text) - len(behind[1]))
        content = self.messages[i][name]
        if not isinstance(content, str):
            return None
        lengths = (len(t) for t in (content, content.rstrip(), content.lstrip(), content.strip()) if t and self.text.startswith(t, start))
        return start, start + next(lengths, 0)

    def _with_word(self, i: int, name: str, where: str) -> tuple[str, str] | None:
        """Return what is rendered before and after the word that stands instead of a text, in front of it or behind it."""
        import jinja2

        changed = _replaced(self.messages[i].get(name), self.word, where)
        if changed is None:
            return None
        messages = [*self.messages[:i], {**self.messages[i], name: changed}, *self.messages[i + 1 :]]
        try:
            text = render(self.tokenizer, messages, **self.kwargs)
        except (jinja2.TemplateError, ValueError, TypeError, KeyError):  # the template reads the text, and refuses the word
            return None
        before, found, after = text.partition(self.word)
        return (before, after) if found else None

    def answers(self, own: Mapping[int, Span]) -> tuple[tuple[Span, ...], tuple[Span, ...], tuple[int, ...]]:
        """Return the headers, the answers, and where they are closed."""
        headers, answers, closed = [], [], []
        for i, message in enumerate(self.messages):
            if whose(message) != "answer":
                continue
            asked = whose(self.messages[i - 1]) in ("user", "tool") if i else False
            begin = max((e for j, (_, e) in own.items() if j < i), default=0)
            first = own.get(i, (None, None))[0]
            end = self._model_begins(i, begin, first)
            if asked and i - 1 in own and end is not None and end > begin:
                headers.append((begin, end))
            if i in own:
                start = min(own[i][0], max(end or 0, begin)) if end is not None else own[i][0]
                answers.append((start, own[i][1]))
                closed.append(self._closed(i, own[i][1]))
            elif not message.get("content") and end is not None and (stop := self._closed(i, end)) > end:  # tool calls alone
                answers.append((end, stop))
                closed.append(stop)
        return tuple(headers), tuple(answers), tuple(closed)

    def _model_begins(self, i: int, begin: int, first: int | None) -> int | None:
        """Return where the model begins to write answer i, given the end of what stands before and where its own text begins."""
        plain, asked = (self._head(i, add_generation_prompt=on) for on in (False, True))
        end, same = first, 0
        if asked is not None and asked != plain and (same := shared(self.text, asked)) > begin:
            end = same if first is None or same is None else min(same, first)
        thinking = None if end is None else THINKING.search(self.text, begin)
        if thinking is None or end is None or self.text[end : thinking.start()].strip():
            return end
        written = len(self.text) if first is None else first  # the template's own text ends here
        empty = EMPTY_TRACE.match(self.text, thinking.start())
        if empty is None or empty.end() > written:
            return min(end, thinking.start())
        if same is not None and same >= empty.end():  # the generation prompt closes the trace, and says how many blanks stand behind it
            return end
        blanks = len(self.text[empty.end() : written]) - len(self.text[empty.end() : written].lstrip())
        return max(end, empty.end() + blanks)

    def _closed(self, i: int, end: int) -> int:
        head = self._head(i + 1)
        return end if head is None else max(end, shared(self.text, head))

    def _head(self, n: int, **more: Any) -> str | None:
        import jinja2

        try:
            return render(self.tokenizer, self.messages[:n], **{**self.kwargs, **more})
        except (jinja2.TemplateError, ValueError, TypeError, KeyError, IndexError):
            return None


def _replaced(content: Any, word: str, where: str) -> Any:
    """Return a message's content with `word` instead of it, in front of it or behind it; None where it is none.

    Of a list of parts all are the message's own, images too.
    """
    if isinstance(content, str):
        return {"instead": word, "front": word + content, "behind": content + word}[where]
    if not isinstance(content, Sequence) or not all(isinstance(part, Mapping) for part in content):
        return None
    parts = [dict(part) for part in content]
    at = {"instead": 0, "front": 0, "behind": len(parts)}[where]
    texts = [part for part in parts if isinstance(part.get("text"), str)]
    if where == "instead":
        return [{**(texts[0] if texts else {"type": "text"}), "text": word}]
    edge = parts[-1 if at else 0] if parts else {}
    if isinstance(edge.get("text"), str):
        edge["text"] = edge["text"] + word if at else word + edge["text"]
    else:
        parts.insert(at, {"type": "text", "text": word})
    return parts
