"""The phase that judges: responses.jsonl -> judgments.jsonl, with what was found out about each judge in judges.json."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import asdict
from typing import Any

from emguard_plugin.evaluation import store
from emguard_plugin.evaluation.calls.faults import Stopped
from emguard_plugin.evaluation.judges import self_test
from emguard_plugin.evaluation.judges.base import FINAL, Item, Judge, Judgment
from emguard_plugin.evaluation.plan import Plan
from emguard_plugin.evaluation.reasoning import judged_text, reads_of
from emguard_plugin.keys import redact

logger = logging.getLogger(__name__)

JUDGES = "judges.json"
# A write waits for the disk; a crash loses what was not written. Both bounds keep the loss small and the wait rare.
RECORDS, SECONDS = 256, 2.0


def preflight(plan: Plan) -> None:
    """Open and test the judges that are quick to open, before answers are drawn for them.

    Raises:
        RuntimeError: If every judge stops.
    """
    stopped = {}
    for entry in plan.judges:
        if not entry.quick_to_open:
            continue
        try:
            known = found_out(plan).get(entry.name, {})
            _note(plan, entry.name, {**known, **_ready(entry, known)})
        except Stopped as error:
            stopped[entry.name] = redact(error)
        finally:
            entry.close()
    if len(stopped) == len(plan.judges):
        reasons = "; ".join(f"{name}: {reason}" for name, reason in stopped.items())
        raise RuntimeError(f"no judge of `em_eval.judges` can judge, so no answer was drawn. {reasons}")
    for name, reason in stopped.items():
        logger.error("em_eval: the judge %s does not work and is tried again after the answers: %s", name, reason)


def judge(plan: Plan) -> None:
    """Judge the answers that `judgments.jsonl` lacks.

    Final judgments are kept; an answer that a judge could not be reached for is judged again. A judge that stops leaves
    the rest of its answers unjudged, and the others go on; `judges.json` tells why.
    """
    responses, questions = plan.responses.read(), plan.questions()
    done = {(row["judge"], _key(row)) for row in plan.judgments.read() if row["status"] in FINAL}
    for entry in plan.judges:
        # A trace that never closed holds no answer, and is judged by nobody.
        rows = [
            row
            for row in responses
            if (entry.name, _key(row)) not in done and judged_text(row, reads_of(entry)) is not None
        ]
        if not rows:
            continue
        items = [Item(questions[row["suite"], row["question"], row["paraphrase"]], judged_text(row, reads_of(entry))) for row in rows]
        known = found_out(plan)
        try:
            record = _ready(entry, known.get(entry.name, {}))
            _note(plan, entry.name, record)
            _judge(plan, entry, rows, items)
            _note(plan, entry.name, {**record, **_served(entry), "stopped": None})
        except Stopped as error:
            reason = redact(error)
            _note(plan, entry.name, {**found_out(plan).get(entry.name, {}), **_served(entry), "stopped": reason})
            logger.error(
                "em_eval: judging by %s stopped: %s\nWhat was judged is kept in %s. Run the same command again to judge "
                "the rest.",
                entry.name,
                reason,
                plan.folder,
            )
        finally:
            entry.close()


def found_out(plan: Plan) -> dict[str, dict[str, Any]]:
    """Return what is known about each judge: mode, models that answered, self-test, and why it stopped if it did."""
    path = plan.folder / JUDGES
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _ready(entry: Judge, known: dict[str, Any]) -> dict[str, Any]:
    found = entry.open(known.get("found"))
    tested = known.get("self_test")
    if entry.self_tested and (tested is None or tested["items_sha256"] != self_test.sha256()):
        logger.info("em_eval: %s judges the fixed items of the self-test", entry.name)
        tested = self_test.run(entry)
    return {"found": found, "self_test": tested}


def _judge(plan: Plan, entry: Judge, rows: list[dict[str, Any]], items: list[Item]) -> None:
    from tqdm.auto import tqdm

    records: list[dict[str, Any]] = []
    written = time.monotonic()
    bar = tqdm(total=len(items), desc=f"em_eval: judging by {entry.name}", unit="answer", disable=None)
    try:
        with bar:
            for index, verdict in entry.judge(items):
                records.append(_record(entry, rows[index], items[index], verdict))
                bar.update()
                if len(records) >= RECORDS or time.monotonic() - written > SECONDS:
                    written, full = time.monotonic(), records
                    records = []
                    plan.judgments.append(full)
    finally:
        # Also when the judge stopped, or the user did.
        if records:
            plan.judgments.append(records)


def _record(entry: Judge, row: dict[str, Any], item: Item, verdict: Judgment) -> dict[str, Any]:
    content = asdict(verdict) | {"detail": redact(verdict.detail)}
    key = {name: row[name] for name in ("role", "suite", "question", "paraphrase", "draw")}
    return {"judge": entry.name, **key, "item_sha256": item.sha256, **content}


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("role", "suite", "question", "paraphrase", "draw"))


def _served(entry: Judge) -> dict[str, Any]:
    served = getattr(entry, "served", None)
    if served is None:
        return {}
    found = served()
    if len(found["models"]) > 1:
        logger.warning("em_eval: more than one model answered as %s: %s", entry.name, ", ".join(found["models"]))
    return {"served": found}


def _note(plan: Plan, name: str, record: dict[str, Any]) -> None:
    store.write_json(plan.folder / JUDGES, {**found_out(plan), name: record})
