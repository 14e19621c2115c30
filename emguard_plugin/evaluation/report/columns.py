"""What a table or a report shows side by side: the base model, then each fine-tuned one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from emguard_plugin.evaluation.run_folder.records import Key, judge_id, read_answers, read_judgments
from emguard_plugin.evaluation.run_folder.summary import Summary
from emguard_plugin.evaluation.statistics.figures import Role, SuiteRates
from emguard_plugin.files.result_folder import PROTOCOL, claimed

Run = tuple[str, "Summary | str | Path"]


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


def judges_of(columns: Sequence[Column]) -> list[str]:
    """Return the names of all judges, in the order of the runs."""
    return list(dict.fromkeys(name for column in columns for name in column.judges))


def judged_by(columns: Sequence[Column], judge: str) -> list[Column]:
    """Return the columns that a judge judged."""
    return [column for column in columns if judge in column.judges]


def columns_of(runs: Sequence[Run], force: bool = False) -> tuple[list[Column], str | None]:
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


def percent(value: float | None) -> str:
    """Write a share as `12.3 %`, or a dash for none."""
    return "–" if value is None else f"{100 * value:.1f} %"


def bounds(interval: tuple[float, float] | None) -> str:
    """Write an interval in percent as `10.1 to 14.9`, or a dash for none."""
    return "–" if interval is None else f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}"
