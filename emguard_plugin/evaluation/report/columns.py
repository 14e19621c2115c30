"""What a table or a report shows side by side: the base model, then each fine-tuned one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from emguard_plugin.evaluation.run_folder.records import Key, judge_id, read_answers, read_judgments
from emguard_plugin.evaluation.run_folder.summary import JudgeResult, Summary
from emguard_plugin.evaluation.statistics.figures import Rate, Role, SuiteRates
from emguard_plugin.files.result_folder import PROTOCOL, claimed

NamedSummary = tuple[str, "Summary | str | Path"]
"""What a fine-tuned model is called in a comparison, and its result or where that lies."""
Extra = Mapping[str, Mapping[str, str]]
"""Further columns, as {row name: {heading: text}}; for example seconds per step."""
COLOURS = 6


@dataclass(frozen=True)
class Column:
    """One model of a comparison.

    Attributes:
        name: How it is called.
        summary: The result it stands in.
        role: Which model of that result it is.
    """

    name: str
    summary: Summary
    role: Role

    def rates(self, suite: str, judge: str) -> SuiteRates | None:
        """Return its rates on one suite by one judge, or None if they were not measured."""
        return self.summary.rates(self.role, suite, judge) if judge in self.judges else None

    @property
    def judges(self) -> list[str]:
        """Names of the judges that judged it."""
        return [result.name for result in self.summary.judges]


@dataclass(frozen=True)
class Judged:
    """A column as one judge sees it.

    Attributes:
        column: The model.
        colour: Number of its colour.
        result: All that the judge says of the result that the model stands in.
        open_ended: Its rates on the open-ended questions.
        in_domain: Its rates on those of the trained domain, or None if they were not measured.
    """

    column: Column
    colour: int
    result: JudgeResult
    open_ended: SuiteRates
    in_domain: SuiteRates | None

    @property
    def name(self) -> str:
        """How the model is called."""
        return self.column.name

    @property
    def adherence(self) -> Rate | None:
        """Share of its answers in the trained domain that show the trained behaviour."""
        return self.in_domain.em_all if self.in_domain else None

    @property
    def tuned(self) -> bool:
        """Whether it is a fine-tuned model."""
        return self.column.role == "tuned"


def judges_of(columns: Sequence[Column]) -> list[str]:
    """Return the names of all judges, in the order of the runs."""
    return list(dict.fromkeys(name for column in columns for name in column.judges))


def judged_by(columns: Sequence[Column], judge: str) -> list[Judged]:
    """Return the columns that a judge judged, with what it says of them."""
    chosen = [column for column in columns if judge in column.judges]
    found = []
    for index, column in enumerate(chosen):
        result = next(result for result in column.summary.judges if result.name == judge)
        suites = result.rates.get(column.role, {})
        if "questions" in suites:
            found.append(Judged(column, colour_of(index, chosen), result, suites["questions"], suites.get("in_domain")))
    return found


def colour_of(index: int, columns: Sequence[Column]) -> int:
    """Return the number of a column's colour. Grey is the base's; a page without a base starts at the first colour."""
    shift = 0 if columns[0].role == "base" else 1
    return (index + shift) % COLOURS


def columns_of(runs: Sequence[NamedSummary], force: bool = False) -> tuple[list[Column], str | None]:
    """Lay runs side by side, their common base first.

    Args:
        runs: (name, summary or the path of one) per fine-tuned model.
        force: Also lay side by side what was measured by different protocols.

    Returns:
        The columns, and the reason why they do not compare, or None.

    Raises:
        ValueError: If there is no run, if two have the same name, or if the protocols differ and `force` is off.
    """
    loaded = [(name, run if isinstance(run, Summary) else Summary.load(run)) for name, run in runs]
    names = [name for name, _ in loaded]
    if not loaded or len(set(names)) < len(names):
        raise ValueError(f"a comparison needs at least one run, and a name of its own for each; found {names}.")
    first_name, first = loaded[0]
    doubt = None
    for name, summary in loaded[1:]:
        if summary.fingerprint != first.fingerprint:
            parts = [key for key in first.protocol if first.protocol[key] != summary.protocol.get(key)]
            doubt = f"{name!r} was measured by another protocol than {first_name!r}; they differ in {', '.join(parts)}"
            if not force:
                raise ValueError(f"{doubt}. Measure both in the same way, or force the comparison; it is marked then.")
    columns: list[Column] = []
    for name, summary in loaded:
        base = summary.models.get("base")
        known = [column.summary.models["base"] for column in columns if column.role == "base"]
        if base is not None and base not in known:
            label = "base" if not known else f"base of {name}"
            columns.append(Column(f"{label} model" if label in names else label, summary, "base"))
    return columns + [Column(name, summary, "tuned") for name, summary in loaded], doubt


@dataclass
class Sample:
    """One question with the answer of each column to the same draw; None where a column has none.

    An answer is its row with `said`: by judge, the row of its judgment.
    """

    suite: str
    question: str
    category: str | None
    asked: str
    answers: list[dict[str, Any] | None] = field(default_factory=list)


def samples(columns: Sequence[Column], suite: str, limit: int) -> list[Sample]:
    """Return draw 0 of up to `limit` questions, evenly spread over the suite; empty if the files are not there.

    The choice looks at no answer, so it shows neither the best nor the worst.
    """
    by_column = [_answers(column, suite) for column in columns]
    first = next((answers for answers in by_column if answers), {})
    rates = columns[-1].rates(suite, columns[-1].judges[0])
    category = {group.name: group.category for group in rates.by_question} if rates else {}
    keys = list(first)
    chosen = [keys[index * len(keys) // limit] for index in range(limit)] if len(keys) > limit else keys
    return [Sample(suite, key, category.get(key), first[key]["asked"], [answers.get(key) for answers in by_column]) for key in chosen]


def _answers(column: Column, suite: str) -> dict[str, dict[str, Any]]:
    answers, judgments = stored_rows(column.summary)

    def wanted(key: Key) -> bool:
        role, answer = key
        return (role, answer.suite, answer.paraphrase, answer.draw) == (column.role, suite, 0, 0)

    found = {key[1].question: {**row, "said": {}} for key, row in answers.items() if wanted(key)}
    for judge, rows in judgments.items():
        for key, row in rows.items():
            if wanted(key) and key[1].question in found:
                found[key[1].question]["said"][judge] = row
    rates = column.rates(suite, column.judges[0])
    order = [group.name for group in rates.by_question] if rates else list(found)
    return {name: found[name] for name in order if name in found}


def stored_rows(summary: Summary) -> tuple[dict[Key, dict[str, Any]], dict[str, dict[Key, dict[str, Any]]]]:
    """Return the answers beside a summary and each judge's judgments of them; nothing where they are not there.

    Only what this very run drew, and what its judges said of it: both are empty where the files are another run's.
    """
    folder = summary.folder
    if folder is None or not (folder / PROTOCOL).is_file():
        return {}, {}
    stored = claimed(folder)
    if stored.get("created") != summary.created:
        return {}, {}
    run = stored.get("run")
    answers, _ = read_answers(folder, run)
    ids = {}
    for result, said in zip(summary.judges, summary.protocol.get("judges", ()), strict=False):
        identity = {key: value for key, value in said.items() if key != "found"}
        ids[result.name] = judge_id(identity, said.get("found"))
    judgments = read_judgments(folder, run, None, ids)
    return answers, {name: judgments.of(name, by) for name, by in ids.items()}
