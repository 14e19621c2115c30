"""What differs between the protocol of stored answers and that of a block, in the words of the YAML."""

from __future__ import annotations

import json
from typing import Any

_SUITES = {"questions": "em_eval.questions", "in_domain": "em_eval.in_domain"}
_OF_QUESTIONS = {"samples_per_wording": "em_eval.samples_per_question", "temperature": "em_eval.temperature"}
_ROLES = {"base": "base model", "tuned": "fine-tuned model"}


def in_words(where: str, old: Any, new: Any) -> str | None:
    """Say what one difference is; "" for one that follows from another, None for one without words of its own.

    Args:
        where: Keys of `protocol.json`, joined by dots.
        old: What is stored.
        new: What the block says.

    Returns:
        The sentence.
    """
    part, _, rest = where.partition(".")
    if part == "models":
        return _model(rest, old, new)
    kind, _, rest = rest.partition(".")
    if kind == "suites":
        return _suite(rest, old, new)
    if kind == "decoding" and rest == "sampler":
        return f"`em_eval.sampler`: {_both(old, new)}"
    if kind in ("decoding", "rendering") and rest:
        return f"`em_eval.{rest}`: {_both(old, new)}"
    if kind == "chat_template_sha256":
        return "`em_eval.chat_template`: the questions were rendered by another chat template"
    if kind == "reasoning_marks":
        return f"`em_eval.reasoning_marks`: {_both(old, new)}"
    return "" if kind == "not_asked" else None


def _both(old: Any, new: Any) -> str:
    return f"stored {json.dumps(old, ensure_ascii=False)}, now {json.dumps(new, ensure_ascii=False)}"


def _model(rest: str, old: Any, new: Any) -> str:
    role, _, field = rest.partition(".")
    who = f"the {_ROLES.get(role, role)}"
    if not field:
        return f"{who} was {'not measured' if old is None else 'measured'} then (`em_eval.evaluate_base`)"
    if field == "adapter":
        return f"{who} was {'a whole model' if old is None else 'an adapter'} then"
    if field in ("on", "name") and None in (old, new):
        return ""
    if "weights_sha256" in field:
        return f"{who} has other weights{' in its base' if field.startswith('on.') else ''}"
    return f"{who}{' stands on another base' if field.startswith('on') else ''}: {_both(old, new)}"


def _suite(rest: str, old: Any, new: Any) -> str | None:
    # The name may hold dots itself.
    name, _, field = rest.rpartition(".")
    if field not in ("sha256", "questions", "wordings", "answers", *_OF_QUESTIONS) or not name:
        return f"`{_SUITES.get(rest, 'em_eval.also')}`: {rest} was {'not asked' if old is None else 'asked'} then"
    if field == "sha256":
        return f"`{_SUITES.get(name, 'em_eval.also')}`: these are not the questions that were asked; a text, their order or their number differs"
    return f"`{_OF_QUESTIONS[field]}`: {_both(old, new)} for {name}" if field in _OF_QUESTIONS else ""
