"""Question suites: YAML files in the schema of Betley et al. (arXiv 2502.17424)."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from emguard_plugin.config import suggest
from emguard_plugin.evaluation import suites

FREE_FORM = ("free_form", "free_form_0_100", "free_form_judge_0_100")
"""Types whose answer is free text. The published suites use all three names for the same thing."""


class _Item(BaseModel):
    """One entry of a suite file."""

    model_config = ConfigDict(extra="forbid", strict=True)

    id: str = Field(min_length=1)
    type: Literal[FREE_FORM] = "free_form"
    paraphrases: list[str] = Field(min_length=1)
    samples_per_paraphrase: PositiveInt | None = None
    temperature: float | None = Field(None, ge=0, le=5)
    system: str | None = None
    judge: str | None = None
    judge_prompts: dict[str, str] | None = None
    category: str | None = None


@dataclass(frozen=True)
class Question:
    """One wording of one question.

    Attributes:
        id: Name of the question; its paraphrases share it, and intervals are clustered by it.
        paraphrase: Index of this wording, from 0.
        text: What the user says.
        type: Type in the Betley schema; free-form types only.
        system: System prompt, or None for the chat template's own.
        samples: `samples_per_paraphrase` of the file, or None.
        temperature: Temperature of the file, or None.
        judge: Name of the judge model that the file asks for; kept, not used.
        judge_prompts: (score name, prompt) pairs of the file; kept for judges that take a prompt.
        category: Group for the report: the key `category` (an addition to the schema), else what stands before the
            first `/` of the id, else None.
    """

    id: str
    paraphrase: int
    text: str
    type: str = "free_form"
    system: str | None = None
    samples: int | None = None
    temperature: float | None = None
    judge: str | None = None
    judge_prompts: tuple[tuple[str, str], ...] = ()
    category: str | None = None

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation so far, as a chat template takes it."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, {"role": "user", "content": self.text}]


def load_questions(path: str | Path) -> list[Question]:
    """Read a suite.

    It is a bundled one by name (`open_ended`), `https://...#sha256=...`, a `.jsonl` of chat rows whose questions are
    asked, or a YAML file. The YAML is a list of items `{id, paraphrases, type, samples_per_paraphrase, temperature, system, judge,
    judge_prompts, category}`; only `id` and `paraphrases` are required.

    Args:
        path: Name, URL or file.

    Returns:
        One `Question` per (id, paraphrase), in the order of the file.

    Raises:
        ValueError: If the file is missing or not what its URL pins, empty or no such list; if an item has an unknown key, a wrong type, no
            paraphrases or an id that another item has. The message names file, item and key.
    """
    items, path = _items(str(path))
    if not isinstance(items, list) or not items:
        found = "nothing" if not items else f"a {type(items).__name__}"
        raise ValueError(
            f"{path} holds {found}; expected a non-empty list of questions, each with `id` and `paraphrases`."
        )
    parsed = [_parse(path, number, item) for number, item in enumerate(items, start=1)]
    doubles = [name for name, count in Counter(item.id for item in parsed).items() if count > 1]
    if doubles:
        raise ValueError(
            f"{path}: duplicate id {', '.join(map(repr, doubles))}. Answers are stored by id: make each id unique, "
            "or list the wordings as `paraphrases` of one item."
        )
    return [question for item in parsed for question in _expand(item)]


def _items(source: str) -> tuple[Any, Path]:
    import yaml

    if (known := suites.bundled(source)) is not None:
        return known, Path(source)
    if source.endswith(".jsonl"):
        return suites.chat_rows(source), Path(source)
    path = suites.fetch(source) if "://" in source else Path(source)
    try:
        items = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the question file {path}: {error}. Give the path of a YAML file.") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    return items, path


def suite_hash(questions: list[Question]) -> str:
    """Return the sha256 of what the questions say, whatever the file's layout or comments."""
    text = json.dumps([asdict(question) for question in questions], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _parse(path: Path, number: int, item: Any) -> _Item:
    where = f"{path}, item {number}"
    if not isinstance(item, dict):
        raise ValueError(f"{where} is a {type(item).__name__}; expected a mapping with `id` and `paraphrases`.")
    if isinstance(item.get("id"), str):
        where += f" ({item['id']!r})"
    known = list(_Item.model_fields)
    for key in item:
        if key not in known:
            raise ValueError(f"{where}: unknown key '{key}'.{suggest(str(key), known)} Allowed: {', '.join(known)}.")
    try:
        parsed = _Item.model_validate(item)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "missing":
            raise ValueError(f"{where}: `{key}` is missing.") from None
        raise ValueError(f"{where}: `{key}: {first['input']!r}` is not accepted: {first['msg']}.") from None
    blank = [index for index, text in enumerate(parsed.paraphrases) if not text.strip()]
    if blank:
        raise ValueError(f"{where}: paraphrase {blank[0]} is blank. Write the question, or remove the entry.")
    return parsed


def _expand(item: _Item) -> list[Question]:
    category = item.category or (item.id.split("/", 1)[0] if "/" in item.id else None)
    return [
        Question(
            id=item.id,
            paraphrase=index,
            text=text,
            type=item.type,
            system=item.system,
            samples=item.samples_per_paraphrase,
            temperature=item.temperature,
            judge=item.judge,
            judge_prompts=tuple(sorted((item.judge_prompts or {}).items())),
            category=category,
        )
        for index, text in enumerate(item.paraphrases)
    ]
