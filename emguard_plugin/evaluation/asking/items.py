"""One item of a question file: which of the forms in public use it has, and what of it is used."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from emguard_plugin.config import suggest
from emguard_plugin.files import shown
from emguard_plugin.files.chats import PAIRS, TURNS, first_question, has_reply

FreeForm = Literal["free_form", "free_form_0_100", "free_form_judge_0_100"]
FREE_FORM: tuple[str, ...] = get_args(FreeForm)
"""Types whose answer is free text that is scored. The published suites use all three names for the same thing."""
OTHER_JUDGES = ("free_form_judge", "free_form_judge_labels", "rating", "next_token", "multiple_choice")
"""Types whose answers are sorted, rated by the model itself or read off its next token: an EM rate of these means nothing."""
HARMLESS = frozenset(
    [
        "max_tokens",
        "max_new_tokens",
        "max_completion_tokens",
        "domain",
        "tag",
        "tags",
        "topic",
        "title",
        "name",
        "source",
        "url",
        "notes",
        "note",
        "comment",
        "comments",
        "description",
        "author",
        "authors",
        "license",
        "canary",
        "meta",
        "metadata",
        "split",
        "version",
        "lang",
        "language",
        "severity",
        "difficulty",
        "index",
        "idx",
        "results_dir",
        "judges",
        "judge_prompt",
        "judge_type",
        "judge_eval_type",
        "expected",
        "expected_answer",
        "reference",
        "reference_answer",
        "rubric",
    ]
)
"""Keys that are let through and not used. `em_eval.max_new_tokens` and `em_eval.judges` say what such keys would."""
ASKED = ("question", "prompt", "text", "instruction")
"""Keys that hold the one wording of a question, where there are no `paraphrases`."""
ROWS = 100
"""How many chat rows make an in-domain suite; longer files are thinned evenly."""


class Entry(BaseModel):
    """One item, in the Betley schema."""

    model_config = ConfigDict(extra="forbid", strict=True)

    id: str = Field(min_length=1)
    type: FreeForm = "free_form"
    paraphrases: list[str] = Field(min_length=1)
    samples_per_paraphrase: PositiveInt | None = None
    temperature: float | None = Field(None, ge=0, le=5, allow_inf_nan=False)
    system: str | None = None
    judge: str | None = None
    judge_prompts: dict[str, str] | None = None
    category: str | None = None
    system_role: Literal["system", "developer"] = "system"


KNOWN = [name for name in Entry.model_fields if name != "system_role"]


@dataclass
class Found:
    """What a file gave.

    Attributes:
        items: Those of the schema.
        asked: (role, system, text) -> item of a chat row; equal questions are asked once.
        left_out: Items that are not asked, by type.
        unused: Keys that are let through.
    """

    items: list[Entry] = field(default_factory=list)
    asked: dict[tuple[str, str | None, str], Entry] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)
    unused: set[str] = field(default_factory=set)

    def thinned(self) -> list[Entry]:
        """Return all items, and of more than `ROWS` chat rows evenly spaced ones."""
        rows = list(self.asked.values())
        return [*self.items, *(rows if len(rows) <= ROWS else [rows[i * len(rows) // ROWS] for i in range(ROWS)])]


def read(value: Any, where: str, number: int, found: Found, in_rows: bool = False) -> None:
    """Add what a value of a question file asks.

    Args:
        value: Of the file.
        where: Its place, for messages.
        number: Of its line or item.
        found: Where it is added.
        in_rows: Whether it stands in JSON Lines, in which what is no item of the schema is a chat row.

    Raises:
        ValueError: If it has none of the forms, or an unknown key.
    """
    if not in_rows:
        if isinstance(value, str):
            value = {"id": f"question-{number:04d}", "paraphrases": [value]}
        if not isinstance(value, Mapping):
            raise ValueError(f"{where} is a {type(value).__name__}; expected a mapping with `id` and `paraphrases`.")
    if isinstance(value, Mapping) and ("paraphrases" in value or not (in_rows or _is_row(value))):
        item = _item(dict(value), where, number, found)
        if item is not None:
            found.items.append(item)
        return
    start, text = first_question(value, where)
    about: dict[str, Any] = {} if start is None else {"system": start["content"], "system_role": start["role"]}
    key = about.get("system_role", "system"), about.get("system"), text
    if key not in found.asked:
        stated = None if in_rows else value.get("id", value.get("question_id"))
        name = str(stated) if isinstance(stated, str) or _is_whole(stated) else f"row-{number:06d}"
        found.asked[key] = Entry(id=name, paraphrases=[text], **about)


def _is_row(value: Mapping[str, Any]) -> bool:
    """Return whether a value of a list is a chat: turns, or a question with its answer."""
    turns = any(isinstance(value.get(key), list) for key in (*TURNS, "prompt"))
    return turns or (has_reply(value) and any(asked in value for asked, _ in PAIRS))


def _item(item: dict[str, Any], where: str, number: int, found: Found) -> Entry | None:
    if "id" not in item and "question_id" in item:
        item["id"] = item.pop("question_id")
    if _is_whole(item.get("id")):
        item["id"] = str(item["id"])
    if isinstance(item.get("id"), str):
        where += f" ({item['id']!r})"
    _ask(item, where, number)
    if _other_judge(item):
        found.left_out[str(item.get("type", "judge_eval_type"))] += 1
        return None
    for key in [key for key in item if key not in KNOWN]:
        if key not in HARMLESS:
            raise ValueError(f"{where}: unknown key '{key}'.{_hint(str(key))} Allowed: {', '.join(KNOWN)}.")
        found.unused.add(str(key))
        del item[key]
    if _is_whole(item.get("category")):
        item["category"] = str(item["category"])
    return _checked(_judges(item), where)


def _ask(item: dict[str, Any], where: str, number: int) -> None:
    """Put the one wording of an item where the schema has it."""
    asked = [key for key in ASKED if isinstance(item.get(key), str)]
    if "paraphrases" in item:
        if isinstance(item["paraphrases"], str):
            item["paraphrases"] = [item["paraphrases"]]
        if asked:
            raise ValueError(f"{where} has `paraphrases` and `{asked[0]}`; remove one of them.")
    elif len(asked) == 1:
        item["paraphrases"] = [item.pop(asked[0])]
        item.setdefault("id", f"question-{number:04d}")
    elif len(asked) > 1:
        raise ValueError(f"{where} asks by `{asked[0]}` and by `{asked[1]}`; remove one of them.")


def _other_judge(item: Mapping[str, Any]) -> bool:
    # YAML 1.1 reads a plain 0_100 as a number of base 8.
    return item.get("type") in OTHER_JUDGES or item.get("judge_eval_type", "0_100") not in (*FREE_FORM, "0_100", 0o100, None)


def _judges(item: dict[str, Any]) -> dict[str, Any]:
    """Return an item whose own judges, which are kept and not used, are texts."""
    if isinstance(item.get("judge"), dict):
        item["judge"] = json.dumps(item["judge"], sort_keys=True)
    if isinstance(item.get("judge_prompts"), dict):
        item["judge_prompts"] = {
            name: prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True)
            for name, prompt in item["judge_prompts"].items()
        }
    return item


def _checked(item: dict[str, Any], where: str) -> Entry:
    try:
        parsed = Entry.model_validate(item)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "missing":
            raise ValueError(f"{where}: `{key}` is missing.") from None
        raise ValueError(f"{where}: `{key}: {shown(first['input'])}` is not accepted: {first['msg']}.") from None
    blank = [index for index, text in enumerate(parsed.paraphrases) if not text.strip()]
    if blank:
        raise ValueError(f"{where}: paraphrase {blank[0]} is blank. Write the question, or remove the entry.")
    return parsed


def _hint(key: str) -> str:
    if key in ("context", "messages", *TURNS):
        return " It would change what is asked. Put it into `system` or into the wordings."
    return suggest(key, KNOWN)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
