"""Questions as a model sees them: rendered, with where system part, content and header lie."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from emguard_plugin.chats import Template, known_row, read_template
from emguard_plugin.evaluation.asking.questions import Question

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Part = Literal["prompt", "header", "prefix", "answers"]


@dataclass(frozen=True)
class Prompt:
    """One question as the model sees it.

    Attributes:
        question: What is asked.
        ids: The rendered conversation, up to where the answer begins.
        start: First token behind the system part, and never the first of all, whose norm is extreme.
        content: First token of what the user says; the user header, which stands before it, is behind `start`.
        header: First token of the template's own behind the question.
    """

    question: Question
    ids: tuple[int, ...]
    start: int
    content: int
    header: int

    def span(self, part: Part) -> tuple[int, int]:
        """Return the half-open span of a part of the prompt; for `answers` it begins where the answer does.

        A `prefix` is all before the user's first content, short of the first token; its end, the user header, is also the
        beginning of `prompt`.

        Raises:
            ValueError: If the prompt has no such part.
        """
        end = len(self.ids)
        spans = {"prompt": (self.start, end), "header": (self.header, end), "prefix": (1, self.content), "answers": (end, end)}
        if part == "prefix" and self.content <= 1:
            raise ValueError(
                "the chat template prints nothing between its first token and the user's content, so `prefix` names no tokens. "
                "Choose `prompt`."
            )
        return spans[part]


def render_prompts(tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question]) -> list[Prompt]:
    """Render questions with the chat template.

    Returns:
        One prompt per question, in their order.

    Raises:
        ValueError: If there is no template, or it prints nothing behind the question.
    """
    template = read_template(tokenizer)
    found = []
    for question in questions:
        encoded = tokenizer.apply_chat_template(question.messages, add_generation_prompt=True, return_dict=True)
        ids = tuple(encoded["input_ids"])
        # A generation prompt may close the thinking, open it, or leave that to the model.
        header = next((at for post in (template.postfix, template.header) if (at := _last(ids, post)) is not None), None)
        if header is None:
            raise ValueError(
                "the chat template prints other tokens before an answer to come than before a given one, so the assistant "
                f"header cannot be found behind {question.text[:40]!r}. Give the tokenizer a template with a generation prompt."
            )
        known = known_row(tokenizer, question.messages)
        found.append(Prompt(question, ids, *_begin(ids[: known.prefix], template), header))
    return found


def _last(ids: Sequence[int], part: Sequence[int]) -> int | None:
    """Return where `part` stands last in `ids`, None where it does not."""
    n = len(part)
    return next((at for at in range(len(ids) - n, -1, -1) if n and ids[at : at + n] == part), None)


def _begin(prefix: Sequence[int], template: Template) -> tuple[int, int]:
    """Return the first positions behind the system part, the user header included, and of the user's content."""
    header, content = template.user_header, max(1, len(prefix))
    if header and len(prefix) > len(header) and tuple(prefix[-len(header) :]) == header:
        return max(1, content - len(header)), content
    return 1, content


def prompt_hash(question: Question) -> str:
    """Return the sha256 of a conversation up to its answer."""
    return hashlib.sha256(json.dumps(question.messages, ensure_ascii=False).encode()).hexdigest()
