"""How a question becomes the prompt that the model sees: by the template, variables and system prompt of the training.

A prompt that begins otherwise than the rows of the training did carries neither the prefix nor the postfix that was held,
so its rate would belong to another run.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date, datetime
from typing import TYPE_CHECKING, Any

from emguard_plugin.evaluation.asking.questions import Question

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CLOCK = "strftime_now"
_DATES = (date(1999, 2, 3), date(2031, 11, 17))
_REPLY, _SAID = "Vexanswer9", "Quuxsaid{}x"
_ANSWERER = re.compile(r"assistant|model|\bbot\b|\bai\b|###? ?response", re.IGNORECASE)
_DIRECTIVES = ("-d", "-m", "-H", "-I", "-M", "-S", "-j", "-y", *"aAwdbBmyYHIpMSfzZjUWcxXGuVeDFTRhCk")
"""What follows the per cent sign in a format of `strftime`; the two-letter ones first."""


class NotRendered(ValueError):
    """The template refuses a conversation; the message is its reason."""


@dataclass(frozen=True)
class NotAsked:
    """A wording that cannot be put to the model.

    Attributes:
        suite: Its suite.
        question: Its id.
        paraphrase: Index of the wording.
        reason: What the template says.
    """

    suite: str
    question: str
    paraphrase: int
    reason: str


@dataclass(frozen=True)
class Rendering:
    """What besides the question decides over the prompt.

    Attributes:
        template: The Jinja template; None for the tokenizer's own.
        kwargs: `chat_template_kwargs`, further variables of the template, such as `date_string` or `enable_thinking`.
        system_prompt: System prompt of questions that name none; None leaves them to the template's own.
        today: The date (ISO) that a template prints where it would print today's; None leaves it to the clock.
    """

    template: str | None = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    system_prompt: str | None = None
    today: str | None = None

    def messages(self, question: Question) -> list[dict[str, str]]:
        """Return the conversation up to the answer."""
        if self.system_prompt is None or question.messages[0]["role"] != "user":
            return question.messages
        return [{"role": "system", "content": self.system_prompt}, *question.messages]

    def text(self, tokenizer: PreTrainedTokenizerBase, question: Question) -> str:
        """Return the prompt as text.

        Raises:
            NotRendered: If the template cannot take the conversation.
        """
        return self._render(tokenizer, self.messages(question), add_generation_prompt=True, tokenize=False)

    def ids(self, tokenizer: PreTrainedTokenizerBase, question: Question) -> list[int]:
        """Return the prompt as token ids.

        Raises:
            NotRendered: If the template cannot take the conversation, or prints nothing.
        """
        encoded = self._render(tokenizer, self.messages(question), add_generation_prompt=True, return_dict=True)
        ids = list(encoded["input_ids"])
        if not ids:
            raise NotRendered("the chat template prints nothing")
        return ids

    def generation_part(self, tokenizer: PreTrainedTokenizerBase, question: Question) -> str:
        """Return what stands in the prompt behind the question's text; all of it where the template alters the text."""
        return self.text(tokenizer, question).rpartition(question.text.strip())[2]

    def template_of(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """Return the template that is used.

        Raises:
            NotRendered: If there is none.
        """
        if self.template is not None:
            return self.template
        try:
            return tokenizer.get_chat_template()
        except Exception as error:  # none, or several without a default
            raise NotRendered(_reason(error)) from error

    def dated_template(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """Return the template that is used, its clock set to `today`."""
        template = self.template_of(tokenizer)
        if self.today is None or CLOCK not in template:
            return template
        return _with_date(template, date.fromisoformat(self.today))

    def with_system(self, questions: Iterable[Question]) -> list[Question]:
        """Return the questions with the system prompt in those that name none."""
        return [q if q.system is not None else replace(q, system=self.system_prompt) for q in questions]

    def baked(self, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
        """Return a copy of the tokenizer whose own template holds the variables, for code that renders by itself.

        It is the tokenizer itself where there is nothing to say.

        Raises:
            NotRendered: If there is no template.
        """
        if self.template is None and not self.kwargs and self.today is None:
            return tokenizer
        found = copy.copy(tokenizer)
        said = "".join("{%- set " + name + " = " + _literal(value) + " +%}" for name, value in self.kwargs.items())
        found.chat_template = said + self.dated_template(tokenizer)
        return found

    def sha256(self, tokenizer: PreTrainedTokenizerBase | None) -> str:
        """Return the hash of the template that is used; without one of its own the chat needs the tokenizer."""
        template = self.template if self.template is not None or tokenizer is None else tokenizer.chat_template
        return hashlib.sha256(str(template).encode()).hexdigest()

    def protocol(self) -> dict[str, Any]:
        """Return what a fingerprint needs besides the template's hash; only what is set."""
        found = {"chat_template_kwargs": json.loads(json.dumps(dict(self.kwargs), default=str)), "today": self.today}
        return {key: value for key, value in found.items() if value} | (
            {} if self.system_prompt is None else {"system_prompt": self.system_prompt}
        )

    def check(self, tokenizer: PreTrainedTokenizerBase, question: Question) -> None:
        """Refuse a question that cannot be asked.

        Raises:
            NotRendered: If the template cannot take the conversation, or has no generation prompt where it prints one
                before an answer.
        """
        messages, prompt = self.messages(question), self.text(tokenizer, question)
        if not prompt.strip():
            raise NotRendered("the chat template prints nothing")
        probes = [{**message, "content": _SAID.format(n)} for n, message in enumerate(messages)]
        shown = self._render(tokenizer, probes, add_generation_prompt=True, tokenize=False)
        for probe in probes:
            if probe["content"] not in shown:
                raise NotRendered(f"the chat template leaves out what the {probe['role']} role says")
        if prompt != self._render(tokenizer, messages, add_generation_prompt=False, tokenize=False):
            return
        try:
            reply = {"role": "assistant", "content": _REPLY}
            whole = self._render(tokenizer, [*messages, reply], tokenize=False)
        except NotRendered:
            return
        before, found, _ = whole.partition(_REPLY)
        # What a turn of the answer opens with, such as a mark of the response alone, may be left to the model.
        if found and before.startswith(prompt) and _ANSWERER.search(before[len(prompt) :]):
            raise NotRendered(
                f"the chat template has no generation prompt: before an answer it prints {before[len(prompt) :]!r}, and "
                "nothing behind a question"
            )

    def is_dated(self, tokenizer: PreTrainedTokenizerBase, question: Question) -> bool:
        """Whether the prompt holds today's date."""
        if CLOCK not in self.template_of(tokenizer):
            return False
        first, second = (
            Rendering(self.template, self.kwargs, self.system_prompt, day.isoformat()).text(tokenizer, question) for day in _DATES
        )
        return first != second

    def _render(self, tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]], **how: Any) -> Any:
        template = self.dated_template(tokenizer)
        try:
            return tokenizer.apply_chat_template(list(messages), chat_template=template, **how, **self.kwargs)
        except Exception as error:  # a template can raise anything: its own refusal, a missing key, a wrong type
            raise NotRendered(_reason(error)) from error


def not_asked(chat: Rendering, tokenizer: PreTrainedTokenizerBase, suites: Mapping[str, Iterable[Question]]) -> list[NotAsked]:
    """Return the wordings that the template refuses, each with its reason."""
    found = []
    for suite, questions in suites.items():
        for question in questions:
            try:
                chat.check(tokenizer, question)
            except NotRendered as error:
                found.append(NotAsked(suite, question.id, question.paraphrase, str(error)))
    return found


def _literal(value: Any) -> str:
    """Write a value of a YAML in Jinja, which has JSON's literals but for `null`."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(str(k))}: {_literal(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return "none" if value is None else json.dumps(value, default=str)


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    # What a template raises by itself is a sentence; of other errors the kind is half the message.
    return text if type(error).__name__ == "TemplateError" else f"{type(error).__name__}: {text}"


def _with_date(template: str, day: date) -> str:
    """Shadow the template's clock by a macro that knows one day.

    Passing another `strftime_now` as a variable ends with transformers 5.24, which turns variables into plain data.

    Returns:
        The template with the macro before it.
    """
    moment, shown = datetime(day.year, day.month, day.day), []
    for directive in _DIRECTIVES:
        try:
            value = moment.strftime(f"%{directive}")
        except ValueError:
            continue
        shown.append(f"|replace({json.dumps('%' + directive)}, {json.dumps(value)})")
    macro = "{%- macro " + CLOCK + "(format) -%}{{- format" + "".join(shown) + "|replace('%%', '%') -}}{%- endmacro +%}"
    return macro + template
