"""How the questions of a run are put to its models, and which of them cannot be: known before anything is drawn."""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emguard_plugin.config import EMEvalConfig, suggest
from emguard_plugin.evaluation.asking import sources as models
from emguard_plugin.evaluation.asking.questions import Question
from emguard_plugin.evaluation.asking.reasoning import marks_of
from emguard_plugin.evaluation.asking.rendering import NotAsked, NotRendered, Rendering, not_asked
from emguard_plugin.evaluation.asking.served import ServedSource, refused
from emguard_plugin.files import result_folder as store

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Suites = Mapping[str, list[Question]]
STATED = ("chat_template_sha256", "rendering", "reasoning_marks", "not_asked")
"""What of a protocol is said here."""


@dataclass(frozen=True)
class Asking:
    """How questions are put.

    Attributes:
        chat: Template, variables, system prompt and date.
        tokenizer: Renders them; None where a server does.
        not_asked: What the template refuses.
        marks: `em_eval.reasoning_marks`; None for those that tokenizer and template know.
    """

    chat: Rendering = field(default_factory=Rendering)
    tokenizer: PreTrainedTokenizerBase | None = None
    not_asked: tuple[NotAsked, ...] = ()
    marks: tuple[str, ...] | None = None

    def protocol(self) -> dict[str, Any]:
        """Return what a fingerprint needs."""
        known = self.tokenizer is not None
        template = self.chat.template_of(self.tokenizer) if known else None
        return {
            "chat_template_sha256": self.chat.sha256(self.tokenizer) if known else None,
            "rendering": self.chat.protocol(),
            "reasoning_marks": [list(marks) for marks in marks_of(self.tokenizer, template, self.marks)],
            "not_asked": [asdict(one) for one in self.not_asked],
        }

    def example(self, question: Question) -> str:
        """Return a prompt as the model sees it, or what a server makes it of."""
        if self.tokenizer is not None:
            return self.chat.text(self.tokenizer, question)
        messages = json.dumps(self.chat.messages(question), indent=1, ensure_ascii=False)
        variables = f", given {json.dumps(dict(self.chat.kwargs))}," if self.chat.kwargs else ""
        return f"The server applies its own chat template{variables} to:\n{messages}"


def stated(protocol: Mapping[str, Any], config: EMEvalConfig) -> dict[str, Any]:
    """Return what `Asking.protocol` would say where no model is at hand.

    Args:
        protocol: A stored one, for what only the model tells: its template, the marks it knows, what was refused.
        config: The block; what it says about rendering must have been so when the answers were drawn.
    """
    found = {key: protocol[key] for key in STATED if key in protocol}
    try:
        chat = chat_of(config)
    except ValueError:
        # The template's file is where the answers were drawn.
        chat = chat_of(config.model_copy(update={"chat_template": None}))
    found["rendering"] = replace(chat, today=found.get("rendering", {}).get("today")).protocol()
    if chat.template is not None:
        found["chat_template_sha256"] = chat.sha256(None)
    if config.reasoning_marks:
        found["reasoning_marks"] = [list(config.reasoning_marks)]
    return found


def stored(protocol: Mapping[str, Any]) -> Asking:
    """Return what an earlier run stored, as far as judging and reporting need it."""
    return Asking(not_asked=tuple(NotAsked(**one) for one in protocol.get("not_asked", ())))


def chat_of(config: EMEvalConfig) -> Rendering:
    """Return what a block says about rendering.

    Raises:
        ValueError: If its template is neither a file nor a known name.
    """
    return Rendering(read_template(config.chat_template), dict(config.chat_template_kwargs), config.system_prompt)


def read_template(name: str | None, key: str = "em_eval.chat_template") -> str | None:
    """Return a Jinja template.

    Args:
        name: Its file, its name among those that an installed Axolotl ships, or the template itself; None for none.
        key: What the user calls it.

    Raises:
        ValueError: If it is none of these.
    """
    if name is None or "{%" in name or "{{" in name:
        return name
    path = Path(name).expanduser()
    shipped = shipped_templates()
    try:
        if path.is_file() or name in shipped:
            return (path if path.is_file() else shipped[name]).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"`{key}: {name}` cannot be read: {error}.") from error
    known = f" Known names: {', '.join(shipped)}." if shipped else " Axolotl, which ships named ones, is not installed."
    raise ValueError(f"`{key}: {name}` is neither a Jinja file nor a known name.{suggest(name, list(shipped))}{known}")


def shipped_templates() -> dict[str, Path]:
    """Return the files of Axolotl's templates by name, without importing it; empty where it is not installed."""
    spec = importlib.util.find_spec("axolotl")
    places = list(spec.submodule_search_locations or ()) if spec else []
    files = (file for place in places for file in Path(place, "utils", "chat_templates", "templates").glob("*.jinja"))
    return {file.stem: file for file in sorted(files)}


def prepare(config: EMEvalConfig, source: models.ModelSource | ServedSource, suites: Suites, folder: Path) -> Asking:
    """Find out how the questions are asked, and which cannot be.

    Args:
        config: The block.
        source: The models.
        suites: The questions.
        folder: The run folder; what an earlier run in it decided is kept: its date, and what a server refused.

    Returns:
        How questions are put to the models, and which cannot be.

    Raises:
        ValueError: If no question of `em_eval.questions` can be asked.
        RuntimeError: If a server that has to be asked which questions it takes does not answer.
    """
    chat, marks = chat_of(config), tuple(config.reasoning_marks) if config.reasoning_marks else None
    known = store.claimed(folder)["protocol"] if (folder / store.PROTOCOL).is_file() else None
    if isinstance(source, ServedSource):
        refusals = stored(known).not_asked if known else refused(config, source, chat, suites)
        return _told(Asking(chat, None, tuple(refusals), marks), config, suites)
    tokenizer = models.load_tokenizer(source)
    if chat.template is None and not tokenizer.chat_template:
        raise ValueError(
            f"{source.path} has no chat template, so the questions cannot be put to the model. Save the tokenizer "
            "with the template it was trained with (Axolotl: `chat_template:`; TRL: `chat_template_path`), or name it: "
            "`em_eval.chat_template`."
        )
    if chat.template is not None and tokenizer.chat_template and chat.template != tokenizer.chat_template:
        logger.warning(
            "em_eval: %s was saved with another chat template than `em_eval.chat_template`; questions are asked by the latter",
            source.path,
        )
    chat = on_one_day(chat, tokenizer, suites, (known or {}).get("rendering", {}).get("today"))
    return _told(Asking(chat, tokenizer, tuple(not_asked(chat, tokenizer, suites)), marks), config, suites)


def prepare_live(config: EMEvalConfig, tokenizer: Any, suites: Suites) -> Asking:
    """Do the same for a model in memory with its tokenizer.

    Returns:
        As for `prepare`.

    Raises:
        ValueError: As for `prepare`, and if there is no chat template.
    """
    chat = chat_of(config)
    if chat.template is None and not tokenizer.chat_template:
        raise ValueError(
            "the tokenizer has no chat template, so the questions cannot be put to the model. Set `chat_template:` (Axolotl) "
            "or `chat_template_path` (TRL)."
        )
    chat = on_one_day(chat, tokenizer, suites)
    marks = tuple(config.reasoning_marks) if config.reasoning_marks else None
    return _told(Asking(chat, tokenizer, tuple(not_asked(chat, tokenizer, suites)), marks), config, suites)


def on_one_day(chat: Rendering, tokenizer: Any, suites: Suites, today: str | None = None) -> Rendering:
    """Return the chat with a date for a template that prints today's, so that all prompts of a run have the same.

    Args:
        chat: Without a date.
        tokenizer: Renders.
        suites: The questions.
        today: The date of an earlier sitting, if there was one.
    """
    by_roles = {tuple(m["role"] for m in chat.messages(q)): q for suite in suites.values() for q in suite}
    if not any(_dated(chat, tokenizer, question) for question in by_roles.values()):
        return chat
    today = today or datetime.now(UTC).astimezone().date().isoformat()
    logger.warning(
        "em_eval: the chat template prints today's date, so prompts change with the calendar and rates of other days do "
        "not compare. All questions of this run are asked as on %s. Pin the date in the training and here, such as "
        "`chat_template_kwargs: {date_string: 26 Jul 2024}` where the template takes it, or write it into the template.",
        today,
    )
    return replace(chat, today=today)


def _dated(chat: Rendering, tokenizer: Any, question: Question) -> bool:
    try:
        return chat.is_dated(tokenizer, question)
    except NotRendered:
        return False


def _told(asking: Asking, config: EMEvalConfig, suites: Suites) -> Asking:
    """Say what is not asked, and stop where nothing is left of the questions that the EM rate is measured on."""
    refuse_empty(asking.not_asked, suites, config)
    by_reason: dict[tuple[str, str], list[str]] = {}
    for one in asking.not_asked:
        names = by_reason.setdefault((one.suite, one.reason), [])
        names.extend({one.question} - set(names))
    for (suite, reason), names in by_reason.items():
        shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        logger.warning("em_eval: not asked, as the chat template refuses it: %s of %s: %s", shown, suite, reason)
    return asking


def refuse_empty(refusals: tuple[NotAsked, ...], suites: Suites, config: EMEvalConfig) -> None:
    """Refuse to measure an EM rate on no question.

    Raises:
        ValueError: with the template's reason.
    """
    lost = [one for one in refusals if one.suite == "questions"]
    if len(lost) == len(suites["questions"]):
        raise ValueError(
            f"no question of `em_eval.questions: {config.questions}` can be put to the model: {lost[0].reason}. Set "
            "`em_eval.chat_template`, `chat_template_kwargs` or `system_prompt` to what the training used, or ask other questions."
        )
