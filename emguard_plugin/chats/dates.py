"""Templates that print today's date: found by rendering under two clocks, with what pins the date."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from emguard_plugin.chats.rendering import WORD, Message, render, whose

_DAYS = ("03 Feb 1999", "17 Nov 2031")
_PINNED = "26 Jul 2024"


def before_date(tokenizer: Any, messages: Sequence[Message], **kwargs: Any) -> str | None:
    """Return what stands before today's date in front of the first user's text, or None where no date stands there.

    Transformers hands templates a clock of its own, and from 5.24 on takes none from outside; a macro of that name inside the
    template stands before it under every version.

    Raises:
        jinja2.TemplateError: when the template refuses the conversation.
    """
    template = tokenizer.get_chat_template(kwargs.get("chat_template"), kwargs.get("tools"))
    if "strftime_now" not in template:
        return None
    first = next((i for i, m in enumerate(messages) if whose(m) == "user"), None)
    asked = [{**m, "content": WORD} if i == first else m for i, m in enumerate(messages)]
    texts = []
    for day in _DAYS:
        clock = f"{{% macro strftime_now(format) %}}{day}{{% endmacro %}}"
        texts.append(render(tokenizer, asked, **{**kwargs, "chat_template": clock + template}).partition(WORD)[0])
    if texts[0] == texts[1]:
        return None
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(*texts, strict=False))
    return "".join(a for a, _ in same)


def advice(tokenizer: Any, messages: Sequence[Message], **kwargs: Any) -> str:
    """Return what to do about the date, having tried it."""
    template = tokenizer.get_chat_template(kwargs.get("chat_template"), kwargs.get("tools"))
    for name in _variables(template):
        if before_date(tokenizer, messages, **{**kwargs, name: _PINNED}) is None:
            return (
                f"Pin it: `chat_template_kwargs: {{{name}: '{_PINNED}'}}` (Axolotl; a column of that name in TRL), or write the date "
                "into the tokenizer's template."
            )
    return (
        "No variable of the template pins it: write the date into the template, in the place of `strftime_now(...)`, and give that "
        "file as `chat_template_jinja:` (Axolotl) or `chat_template_path` (TRL)."
    )


def _variables(template: str) -> list[str]:
    """Return the template's variables that are named like a date, `date_string` first."""
    import jinja2.ext
    from jinja2 import Environment, meta

    env = Environment(extensions=[jinja2.ext.loopcontrols, _generation()])
    try:
        names = meta.find_undeclared_variables(env.parse(template))
    except jinja2.TemplateError:
        names = {"date_string"}
    found = [n for n in sorted(names) if ("date" in n or "today" in n) and n != "strftime_now"]
    return sorted(found, key=lambda n: n != "date_string")


def _generation() -> Any:
    from jinja2.ext import Extension

    class Generation(Extension):
        """Reads `{% generation %}` blocks, which transformers adds to jinja."""

        tags: set[str] = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    return Generation
