"""Chat rows as they are written elsewhere, read as one kind: a list of `role` and `content`.

| row | read as |
|---|---|
| `messages`, `conversations`, `conversation`: turns of `role` and `content`, or `from` and `value` (ShareGPT) | those turns |
| `prompt` with `completion` or `response`, each a text or turns (TRL) | user and assistant, or those turns |
| `instruction`, `input`, `output` (Alpaca), `question` with `answer` | user (instruction, blank line, input) and assistant |

A `system` beside them is a system turn, as Axolotl reads it. What is a reply may be missing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from emguard_plugin.files.text import shown

Messages = list[dict[str, str]]

ROLES = {
    **{role: role for role in ("system", "developer", "user", "assistant", "tool")},
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "bot", "chatgpt", "model", "ai"), "assistant"),
    **dict.fromkeys(("function", "function_response", "observation", "tool_response", "ipython"), "tool"),
}
"""What each name of a speaker is in a chat template's words."""
TURNS = ("messages", "conversations", "conversation")
PAIRS = (("prompt", ("completion", "response")), ("instruction", ("output", "response")), ("question", ("answer", "response")))
WANTED = "want `messages`, a list of `role` and `content`"
_SURROGATE = re.compile("[\ud800-\udfff]")


def messages_of(row: Any, where: str) -> Messages:
    """Return the turns of a row.

    Raises:
        ValueError: If it is no chat, or a turn has no text: an image, a call of a tool, nothing.
    """
    return [_message(turn, where) for turn in _turns(row, where)]


def first_question(row: Any, where: str) -> tuple[dict[str, str] | None, str]:
    """Return the system or developer turn of a row, None if it has none, and what its user says first.

    Raises:
        ValueError: If it is no chat, or the user says nothing in text.
    """
    start = None
    for turn in _turns(row, where):
        role = _role(turn, where)
        if role in ("system", "developer") and start is None:
            start = _message(turn, where)
        if role == "user":
            text = _message(turn, where)["content"]
            if text.strip():
                return start, text
            break
    raise ValueError(f"{where} has no text of the user; {WANTED}, with a turn of the user.")


def has_reply(row: Mapping[str, Any]) -> bool:
    """Return whether a row answers its question, as a training row does."""
    if any(row.get(reply) is not None for _, replies in PAIRS for reply in replies):
        return True
    turns: Any = next((row[key] for key in TURNS if isinstance(row.get(key), list)), [])
    return any(ROLES.get(str(t.get("role", t.get("from"))).lower()) == "assistant" for t in turns if isinstance(t, Mapping))


def _turns(row: Any, where: str) -> list[Any]:
    if not isinstance(row, Mapping):
        raise ValueError(f"{where} is not a chat: it holds {shown(row)} ({type(row).__name__}); {WANTED}.")
    turns: Any = next((row[key] for key in TURNS if row.get(key) is not None), None)
    if turns is None:
        turns = _pair(row, where)
    if isinstance(turns, tuple):
        turns = list(turns)
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"{where} is not a chat: its turns are {shown(turns)}; {WANTED}.")
    above = row.get("system")
    if isinstance(above, str) and above.strip() and _role(turns[0], where) not in ("system", "developer"):
        return [{"role": "system", "content": above}, *turns]
    return turns


def _pair(row: Mapping[str, Any], where: str) -> list[Any]:
    for key, replies in PAIRS:
        if row.get(key) is None:
            continue
        asked, more = row[key], row.get("input") if key == "instruction" else None
        if isinstance(more, str) and more.strip() and isinstance(asked, str):
            asked = f"{asked}\n\n{more}"
        reply = next((row[name] for name in replies if row.get(name) is not None), None)
        return _said("user", asked) + ([] if reply is None else _said("assistant", reply))
    raise ValueError(f"{where} is not a chat: it has {sorted(map(str, row))}; {WANTED}.")


def _said(role: str, said: Any) -> list[Any]:
    return said if isinstance(said, list) else [{"role": role, "content": said}]


def _role(turn: Any, where: str) -> str:
    if not isinstance(turn, Mapping):
        raise ValueError(f"{where} is not a chat: a message is {shown(turn)}; want `role` and `content`, both text.")
    name = turn.get("role", turn.get("from"))
    role = ROLES.get(name.lower()) if isinstance(name, str) else None
    if role is None:
        raise ValueError(f"{where} is not a chat: the role of a message is {shown(name)}; known are {', '.join(sorted(ROLES))}.")
    return role


def _message(turn: Any, where: str) -> dict[str, str]:
    role = _role(turn, where)
    content = turn.get("content", turn.get("value"))
    if isinstance(content, list) and content and all(_is_text(part) for part in content):
        content = "".join(part["text"] for part in content)
    if turn.get("tool_calls") or turn.get("function_call"):
        raise ValueError(f"{where}: a turn of the {role} calls a tool, which is not read here; leave the row out.")
    if not isinstance(content, str):
        raise ValueError(f"{where} is not a chat: a message is {shown(dict(turn))}; want `role` and `content`, both text.")
    if _SURROGATE.search(content):
        raise ValueError(f"{where}: a text holds half of a surrogate pair, which is no character; repair the file.")
    return {"role": role, "content": content}


def _is_text(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type", "text") == "text" and isinstance(part.get("text"), str)
