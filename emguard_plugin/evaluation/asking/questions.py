"""Question suites: the schema of Betley et al. (arXiv 2502.17424) and the forms in which others write it."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from emguard_plugin.evaluation.asking import items as forms
from emguard_plugin.evaluation.asking import suites
from emguard_plugin.files import read_json, read_rows, read_yaml

logger = logging.getLogger(__name__)

LISTS = ("questions", "items", "data", "prompts", "examples")
"""Under which key a file may hold its list."""


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
        system_role: Who says `system`: `system`, or `developer` where the file says so.
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
    system_role: str = "system"

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation so far, as a chat template takes it."""
        system = [] if self.system is None else [{"role": self.system_role, "content": self.system}]
        return [*system, {"role": "user", "content": self.text}]


def load_questions(path: str | Path) -> list[Question]:
    """Read a suite.

    It is a bundled one by name (`open_ended`), `https://...#sha256=...`, or a file: YAML, JSON or JSON Lines. Each item is
    one of the Betley schema, `{id, paraphrases, type, samples_per_paraphrase, temperature, system, judge, judge_prompts,
    category}` with `id` and `paraphrases` required; a text, or `question` or `prompt` with one; or a chat row, whose first
    question is asked. Keys that describe and change nothing are left out and named once (`items.HARMLESS`), items whose
    judge gives labels in place of scores are left out and counted (`items.OTHER_JUDGES`); any other key is refused.

    Args:
        path: Name, URL or file.

    Returns:
        One `Question` per (id, paraphrase), in the order of the file.

    Raises:
        ValueError: If the file is missing or not what its URL pins, empty or no such list; if an item has an unknown key, a wrong type, no
            paraphrases or an id that another item has. The message names file, item and key.
    """
    found = forms.Found()
    for where, number, value in _values(str(path)):
        forms.read(value, where, number, found, in_rows=suites.is_rows(str(path)))
    name = suites.plain(str(path))
    if found.left_out:
        logger.warning(
            "em_eval: %s: %d items are left out, as their answers are sorted by labels and not scored from 0 to 100 (%s)",
            name, sum(found.left_out.values()), ", ".join(f"{kind}: {count}" for kind, count in found.left_out.items()),
        )  # fmt: skip
    if found.unused:
        logger.info("em_eval: %s: keys that are not used here: %s", name, ", ".join(sorted(found.unused)))
    if len(found.asked) > forms.ROWS:
        logger.info("em_eval: %s: %d of %d different chat rows are asked, evenly spaced", name, forms.ROWS, len(found.asked))
    parsed = found.thinned()
    if not parsed:
        raise ValueError(f"{name} holds nothing that can be asked{': every item is left out' if found.left_out else ''}.")
    doubles = [name for name, count in Counter(item.id for item in parsed).items() if count > 1]
    if doubles:
        raise ValueError(
            f"{name}: duplicate id {', '.join(map(repr, doubles))}. Answers are stored by id: make each id unique, "
            "or list the wordings as `paraphrases` of one item."
        )
    return [question for item in parsed for question in _expand(item)]


def _values(source: str) -> list[tuple[str, int, Any]]:
    """Return (place, number, value) of each item of a suite."""
    path: str | Path = source
    known = suites.bundled(source)
    if known is None:
        path = suites.fetch(source) if "://" in source else Path(source)
        try:
            if suites.is_rows(source):
                return [(where, number, value) for where, value, number in read_rows(path)]
            known = _listed(path, source)
        except ValueError as error:
            raise ValueError(f"cannot read the question file {suites.plain(source)}: {error}") from None
    if isinstance(known, dict) and len(lists := [key for key in LISTS if isinstance(known.get(key), list)]) == 1:
        known = known[lists[0]]
    if not isinstance(known, list) or not known:
        found = "nothing" if not known else f"a {type(known).__name__}"
        raise ValueError(f"{path} holds {found}; expected a non-empty list of questions, each with `id` and `paraphrases`.")
    return [(f"{path}, item {number}", number, value) for number, value in enumerate(known, start=1)]


def _listed(path: Path, source: str) -> Any:
    if not source.partition("#")[0].endswith((".json", ".json.gz")):
        return read_yaml(path)
    try:
        return read_json(path)
    except ValueError:
        return [value for _, value, _ in read_rows(path)]  # lines under the name of a list


def suite_hash(questions: list[Question]) -> str:
    """Return the sha256 of what the questions say, whatever the file's layout or comments."""
    said = [asdict(question) for question in questions]
    for entry in said:
        if entry["system_role"] == "system":  # as it was before there was another
            del entry["system_role"]
    return hashlib.sha256(json.dumps(said, sort_keys=True, ensure_ascii=False).encode("utf-8", "backslashreplace")).hexdigest()


def _expand(item: forms.Entry) -> list[Question]:
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
            system_role=item.system_role,
        )
        for index, text in enumerate(item.paraphrases)
    ]
