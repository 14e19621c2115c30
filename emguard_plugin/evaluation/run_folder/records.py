"""What counts of a run folder: answers of this run, and judgments of these very answers by this very judge.

Every record carries the run that it was made in (`run`, drawn once per folder and kept in `protocol.json`) and a checksum of
itself (`seal`); a judgment also the hash of what was judged (`item_sha256`) and of the judge's identity (`by`). A record
that was copied from another folder, or changed since it was written, is left out and counted, and computed again.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from emguard_plugin.evaluation.asking.draws import AnswerKey
from emguard_plugin.evaluation.judges.base import FINAL, UNSCORED, Judgment, contradiction
from emguard_plugin.files import seal_of
from emguard_plugin.files.result_folder import JsonLines

T = TypeVar("T")
Key = tuple[str, AnswerKey]
RESPONSES, JUDGMENTS = "responses.jsonl", "judgments.jsonl"
OTHER_RUN = "of another run"
CHANGED = "changed since they were written"
OTHER_ANSWER = "of other answers than those that lie here"


def sealed(record: Mapping[str, Any], run: str | None) -> dict[str, Any]:
    """Return a record as it is stored: tied to its run, with its checksum.

    Args:
        record: The record.
        run: `run` of `protocol.json`; None in a folder that an earlier version began.
    """
    whole = {**record, **({} if run is None else {"run": run})}
    return {**whole, "seal": seal_of(whole)}


def judge_id(identity: Mapping[str, Any], found: Mapping[str, Any] | None) -> str:
    """Return the hash of what a judge's scores depend on: its identity, and what was found out when it was opened."""
    return hashlib.sha256(json.dumps([identity, found or {}], sort_keys=True, default=str).encode()).hexdigest()[:32]


def answer_key(row: Mapping[str, Any]) -> AnswerKey:
    """Return which answer a row of either file is about."""
    return AnswerKey(row["suite"], row["question"], row["paraphrase"], row["draw"])


def key_of(row: Mapping[str, Any]) -> Key:
    """Return whose answer a row is about, and which."""
    return row["role"], answer_key(row)


def read_answers(folder: Path, run: str | None) -> tuple[dict[Key, dict[str, Any]], Counter[str]]:
    """Return the answers that were drawn in this run, and how many records were left out, by reason.

    Raises:
        ValueError: If a line is no answer.
    """

    def read() -> tuple[dict[Key, dict[str, Any]], Counter[str]]:
        found: dict[Key, dict[str, Any]] = {}
        left: Counter[str] = Counter()
        for row in JsonLines(folder / RESPONSES).read(_answer_fault):
            reason = _foreign(row, run)
            if reason:
                left[reason] += 1
            else:
                found[key_of(row)] = row
        return found, left

    return _once(folder / RESPONSES, run, read)


_read: dict[tuple[Path, str | None], tuple[tuple[int, ...], Any]] = {}
KEPT_FILES = 4
"""Files whose rows stay in memory: both of a run, and of one beside it."""


def _once(path: Path, run: str | None, read: Callable[[], T]) -> T:
    """Return what `read` makes of a file, read again only when the file is another or has grown: every phase asks for it."""
    stamp: tuple[int, ...] = ()
    try:
        stat = path.stat()
        stamp = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
    except OSError:
        pass
    key = (path.absolute(), run)
    if key not in _read or _read[key][0] != stamp:
        _read.pop(key, None)
        _read[key] = (stamp, read())
        while len(_read) > KEPT_FILES:
            _read.pop(next(iter(_read)))
    return _read[key][1]


@dataclass
class Judgments:
    """What `judgments.jsonl` holds for one run.

    Attributes:
        by_judge: By (name, `by`) the last judgment of each answer.
        unused: Why an answer has a stored judgment that counts for nothing, by (name, answer).
        left_out: How many records were left out, by reason.
    """

    by_judge: dict[tuple[str, str | None], dict[Key, dict[str, Any]]] = field(default_factory=dict)
    unused: dict[tuple[str, Key], str] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)

    def of(self, name: str, by: str | None) -> dict[Key, dict[str, Any]]:
        """Return the judgments of one judge by answer; none where it is not known yet what the judge depends on."""
        return {} if by is None else self.by_judge.get((name, by), {})

    def others(self, current: Mapping[str, str | None]) -> dict[str, int]:
        """Return how many judgments are by other judges, or by the same in another edition, than the current ones."""
        found: Counter[str] = Counter()
        for (name, by), rows in self.by_judge.items():
            if rows and (name not in current or current[name] != by):
                found[f"{name} in another edition" if name in current else name] += len(rows)
        return dict(found)


def read_judgments(
    folder: Path, run: str | None, items: Mapping[Key, Collection[str]] | None, earlier: Mapping[str, str] | None = None
) -> Judgments:
    """Return the judgments that were made in this run of the answers that lie here.

    Args:
        folder: The run folder.
        run: `run` of `protocol.json`.
        items: `item_sha256` of each answer, for each way to read it; None where the answers are not at hand, for a reader that shows stored judgments.
        earlier: In a folder that an earlier version began, whose records do not say it: `by` of each judge.

    Raises:
        ValueError: If a line is no judgment.
    """
    found = Judgments()

    def read() -> list[tuple[Key, dict[str, Any], str | None]]:
        return [(key_of(row), row, _foreign(row, run)) for row in JsonLines(folder / JUDGMENTS).read(_judgment_fault)]

    for key, row, foreign in _once(folder / JUDGMENTS, run, read):
        other = items is not None and row["item_sha256"] not in items.get(key, ())
        reason = foreign or (OTHER_ANSWER if other else None)
        if reason:
            found.left_out[reason] += 1
            found.unused[row["judge"], key] = f"the stored judgment is left out as {reason}"
            continue
        by = row.get("by") or (earlier or {}).get(row["judge"])
        # A later record replaces an earlier one: an unscored answer may have been judged again.
        found.by_judge.setdefault((row["judge"], by), {})[key] = _checked(row)
    return found


def _foreign(row: Mapping[str, Any], run: str | None) -> str | None:
    if row.get("run") != run:
        return OTHER_RUN
    unsealed = run is None and "seal" not in row  # an earlier version's
    return None if unsealed or row.get("seal") == seal_of(row) else CHANGED


def _checked(row: dict[str, Any]) -> dict[str, Any]:
    """Return a judgment whose scores are scores; else an unscored one, which is judged again."""
    wrong = contradiction(Judgment(row["aligned"], row["coherent"], row["status"], row["detail"]))
    if not wrong:
        return row
    return {**row, "aligned": None, "coherent": None, "status": UNSCORED, "detail": f"the stored judgment is none: {wrong}"}


_KEY = {"role": str, "suite": str, "question": str, "paraphrase": int, "draw": int}
_ANSWER = {**_KEY, "asked": str, "text": str, "finish": str}
_JUDGMENT = {"judge": str, **_KEY, "item_sha256": str, "status": str, "detail": str}


def _answer_fault(row: Mapping[str, Any]) -> str | None:
    odd = next((name for name in ("trace", "answer") if not isinstance(row.get(name), str | None)), None)
    return _fault(row, _ANSWER) or (f"`{odd}` is no text" if odd else None)


def _judgment_fault(row: Mapping[str, Any]) -> str | None:
    missing = next((f"`{name}` is missing" for name in ("aligned", "coherent") if name not in row), None)
    wrong = _fault(row, _JUDGMENT) or missing
    if wrong or row["status"] in (*FINAL, UNSCORED):
        return wrong
    return f"`status` is {row['status']!r}; expected one of {', '.join((*FINAL, UNSCORED))}"


def _fault(row: Mapping[str, Any], kinds: Mapping[str, type]) -> str | None:
    for name, kind in kinds.items():
        if name not in row:
            return f"`{name}` is missing"
        if not isinstance(row[name], kind) or isinstance(row[name], bool):
            return f"`{name}` is no {'text' if kind is str else 'whole number'}"
    return None if row["role"] in ("base", "tuned") else f"`role` is {row['role']!r}; expected base or tuned"


def told(left: Mapping[str, int], file: str, what: str) -> str | None:
    """Return the sentence about the records that were left out, or None if there are none."""
    if not left:
        return None
    parts = ", ".join(f"{count} {reason}" for reason, count in left.items())
    return f"{file}: {sum(left.values())} {what} are left out: {parts}. They are never used, and what is missing is computed again."
