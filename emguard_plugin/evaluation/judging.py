"""The phase that judges: responses.jsonl -> judgments.jsonl, with what was found out about each judge in judges.json.

Answers are kept and judged again: what a judgment depends on (the judge's identity, the mode it was read in) stands in each
record as `by`, so another judge, one more, or an edited one adds its judgments beside the old, and only what is missing is
computed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from emguard_plugin.evaluation.calls.faults import Stopped
from emguard_plugin.evaluation.judges.base import FINAL, Item, Judge, Judgment
from emguard_plugin.evaluation.judges.session import Session
from emguard_plugin.evaluation.judges.traces import judged_text, reads_of
from emguard_plugin.evaluation.plan import Plan
from emguard_plugin.evaluation.run_folder import records
from emguard_plugin.files import result_folder as store
from emguard_plugin.files import seal_of
from emguard_plugin.files.secrets import redact

logger = logging.getLogger(__name__)

JUDGES = "judges.json"
# A write waits for the disk; a crash loses what was not written. Both bounds keep the loss small and the wait rare.
RECORDS, SECONDS = 256, 2.0


REPLACED = "judgments.replaced.jsonl"


def preflight(plan: Plan) -> None:
    """Open and test the judges that are quick to open, before answers are drawn for them.

    Raises:
        RuntimeError: If every judge stops.
    """
    stopped = {}
    for entry in plan.judges:
        if not entry.quick_to_open:
            continue
        known = known_of(plan, entry)
        try:
            with Session(entry, known) as session:
                _note(plan, entry, {**known, **session.open().record()})
        except Stopped as error:
            stopped[entry.name] = redact(error)
    if len(stopped) == len(plan.judges):
        reasons = "; ".join(f"{name}: {reason}" for name, reason in stopped.items())
        raise RuntimeError(f"no judge of `em_eval.judges` can judge, so no answer was drawn. {reasons}")
    for name, reason in stopped.items():
        logger.error("em_eval: the judge %s does not work and is tried again after the answers: %s", name, reason)


def judge(plan: Plan, stored: Mapping[str, Any], rejudge: Collection[str] = ()) -> None:
    """Judge the answers that `judgments.jsonl` has no judgment of by these very judges.

    Final judgments are kept; an answer that a judge could not be reached for is judged again. A judge that stops leaves
    the rest of its answers unjudged, and the others go on; `judges.json` tells why.

    Args:
        plan: What is measured.
        stored: What `protocol.json` holds.
        rejudge: Names of the judges whose judgments are made anew. The old ones are moved to `judgments.replaced.jsonl`,
            once the judge has been opened.
    """
    present = Present(plan, stored)
    for sentence in present.left_out():
        logger.warning("em_eval: %s", sentence)
    for entry in plan.judges:
        anew = entry.name in rejudge
        known = {} if anew else known_of(plan, entry)
        if "found" in known and not present.missing(entry, known["found"]):
            continue
        try:
            with Session(entry, known) as session:
                record = session.open().record()
                if anew:
                    _set_aside(plan, entry, record["found"])
                    present = Present(plan, stored)
                _note(plan, entry, record)
                _judge(plan, session, present)
                _note(plan, entry, {**record, **_served(entry), "stopped": None})
        except Stopped as error:
            reason = redact(error)
            _note(plan, entry, {**known_of(plan, entry), **_served(entry), "stopped": reason})
            logger.error(
                "em_eval: judging by %s stopped: %s\nWhat was judged is kept in %s. Run the same command again to judge the rest.",
                entry.name,
                reason,
                plan.folder,
            )


@dataclass(frozen=True)
class Present:
    """What a run folder holds that counts: its answers, and the judgments made of them.

    Attributes:
        plan: What is measured.
        stored: What `protocol.json` holds.
    """

    plan: Plan
    stored: Mapping[str, Any]

    @cached_property
    def _answers(self) -> tuple[dict[records.Key, dict[str, Any]], Mapping[str, int]]:
        return records.read_answers(self.plan.folder, self.stored.get("run"))

    @property
    def answers(self) -> dict[records.Key, dict[str, Any]]:
        """The answers of this run, by key."""
        return self._answers[0]

    @cached_property
    def _items(self) -> dict[str, dict[records.Key, Item]]:
        questions = self.plan.questions()
        return {
            reads: {
                key: Item(questions[where], text)
                for key, row in self.answers.items()
                # A trace that never closed holds no answer, and is judged by nobody.
                if (text := judged_text(row, reads)) is not None
                and (where := (row["suite"], row["question"], row["paraphrase"])) in questions
            }
            for reads in {reads_of(entry) for entry in self.plan.judges}
        }

    def items(self, entry: Judge) -> dict[records.Key, Item]:
        """Return what a judge is given, by key."""
        return self._items[reads_of(entry)]

    @cached_property
    def judgments(self) -> records.Judgments:
        """The judgments of these answers."""
        hashes: dict[records.Key, set[str]] = {}
        for items in self._items.values():
            for key, item in items.items():
                hashes.setdefault(key, set()).add(item.sha256)
        return records.read_judgments(self.plan.folder, self.stored.get("run"), hashes, self._earlier())

    def missing(self, entry: Judge, found: Mapping[str, Any]) -> list[records.Key]:
        """Return the answers without a final judgment by a judge."""
        rows = self.judgments.of(entry.name, records.judge_id(entry.identity(), found))
        return [key for key in self.items(entry) if key not in rows or rows[key]["status"] not in FINAL]

    def left_out(self) -> list[str]:
        """Return the sentences about what lies in the folder and does not count."""
        found = (
            records.told(self._answers[1], records.RESPONSES, "answers"),
            records.told(self.judgments.left_out, records.JUDGMENTS, "judgments"),
        )
        return [sentence for sentence in found if sentence]

    def _earlier(self) -> dict[str, str]:
        """In a folder of an earlier version, the judges that it was tied to judged it."""
        then = self.stored.get("protocol", {}).get("judges")
        if self.stored.get("run") is not None or not then:
            return {}
        identities = [store.plain(entry.identity()) for entry in self.plan.judges]
        pairs = zip(self.plan.judges, identities, strict=True)
        return {e.name: records.judge_id(i, known_of(self.plan, e).get("found")) for e, i in pairs if i in then}


def found_out(plan: Plan) -> dict[str, dict[str, Any]]:
    """Return what is known about each judge: identity, mode, models that answered, self-test, and why it stopped if it did.

    Raises:
        ValueError: If `judges.json` is damaged.
    """
    path = plan.folder / JUDGES
    if not path.is_file():
        return {}
    found = store.read_json(path)
    for name, record in found.items():
        if not isinstance(record, dict) or not isinstance(record.get("found", {}), dict):
            raise ValueError(f"{path} is damaged: {name!r} is no record of a judge. Delete the file; judges are tested anew then.")
        if record.pop("seal", None) not in (None, seal_of(record)):
            raise ValueError(
                f"{path}: the record of {name!r} was changed since it was written. Delete the file; judges are tested anew then."
            )
    return found


def known_of(plan: Plan, entry: Judge) -> dict[str, Any]:
    """Return what is known about a judge; nothing where the record is of another one under the same name."""
    record = found_out(plan).get(entry.name, {})
    # An earlier version tied the whole folder to its judges, and did not repeat their identity here.
    then = record.get("identity") or _tied_to(plan, entry)
    return record if then == store.plain(entry.identity()) else {}


def _tied_to(plan: Plan, entry: Judge) -> dict[str, Any] | None:
    if not (plan.folder / store.PROTOCOL).is_file():
        return None
    own = store.plain(entry.identity())
    return own if own in store.claimed(plan.folder)["protocol"].get("judges", ()) else None


def _judge(plan: Plan, session: Session, present: Present) -> None:
    from tqdm.auto import tqdm

    entry, found = session.judge, session.found or {}
    keys = present.missing(entry, found)
    if not keys:
        return
    given = present.items(entry)
    items, by = [given[key] for key in keys], records.judge_id(entry.identity(), found)
    lines: list[dict[str, Any]] = []
    written = time.monotonic()
    bar = tqdm(total=len(items), desc=f"em_eval: judging by {entry.name}", unit="answer", disable=None)
    try:
        with bar:
            for index, verdict in session.ask(items):
                row = _record(entry, by, keys[index], items[index], verdict)
                lines.append(records.sealed(row, present.stored.get("run")))
                bar.update()
                if len(lines) >= RECORDS or time.monotonic() - written > SECONDS:
                    written, full = time.monotonic(), lines
                    lines = []
                    plan.judgments.append(full)
    finally:
        # Also when the judge stopped, or the user did.
        if lines:
            plan.judgments.append(lines)


def _record(entry: Judge, by: str, key: records.Key, item: Item, verdict: Judgment) -> dict[str, Any]:
    content = asdict(verdict)
    role, answer = key
    return {"judge": entry.name, "by": by, "role": role, **answer._asdict(), "item_sha256": item.sha256, **content}


def _set_aside(plan: Plan, entry: Judge, found: Mapping[str, Any]) -> None:
    """Move a judge's judgments to the file of the replaced ones."""
    by = records.judge_id(entry.identity(), found)
    old: list[dict[str, Any]] = []
    kept: list[dict[str, Any]] = []
    for row in plan.judgments.read():
        (old if row.get("judge") == entry.name and row.get("by", by) == by else kept).append(row)
    if old:
        store.JsonLines(plan.folder / REPLACED).append(old)
        plan.judgments.replace(kept)


def _served(entry: Judge) -> dict[str, Any]:
    served = getattr(entry, "served", None)
    if served is None:
        return {}
    found = served()
    if len(found["models"]) > 1:
        logger.warning("em_eval: more than one model answered as %s: %s", entry.name, ", ".join(found["models"]))
    return {"served": found}


def _note(plan: Plan, entry: Judge, record: dict[str, Any]) -> None:
    found = {**found_out(plan), entry.name: store.plain({**record, "identity": entry.identity()})}
    store.write_json(plan.folder / JUDGES, {name: {**known, "seal": seal_of(known)} for name, known in found.items()})
