"""An evaluation that is killed with SIGKILL at points drawn from a seed, and what the next run makes of what is left.

A point is a moment of a whole run (in the middle of generating, judging or reporting), the n-th write to a JSONL file, with a part of
the lines on the disk, or the n-th JSON or text file, before it is written, in its middle, or before it takes the place of the old one.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from emguard_plugin.evaluation.judges.base import FINAL
from emguard_plugin.evaluation.run_folder.records import key_of
from emguard_plugin.files.result_folder import JsonLines

PRELOAD = [
    "emguard_plugin.evaluation.run", "emguard_plugin.evaluation.report.page", "emguard_plugin.evaluation.report.exports", "emguard_plugin.evaluation.judges.exact",
    "peft", "torch", "statsmodels.stats.inter_rater", "scipy.stats", "huggingface_hub", "tests.evaluation.parts",
]  # fmt: skip
KEPT = ("judges", "agreement", "fingerprint", "protocol", "models", "example_prompt")
"""What of the summary must be that of a run that nobody killed: all but the time at which it began."""


class Point(NamedTuple):
    """Where to kill: `after` a share of the whole run's time, or at the n-th `append` or `write`, `part` of the way through it."""

    kind: str
    number: int
    part: float


def points(seed: int, count: int) -> list[Point]:
    """Return kill points; a third of each kind."""
    rng = random.Random(seed)
    found = [Point(("after", "append", "write")[n % 3], rng.randrange(12), rng.random()) for n in range(count)]
    rng.shuffle(found)
    return found


class Killer:
    """Runs evaluations in processes forked from one that has imported everything.

    Args:
        config: The `em_eval` block, as a mapping.
        model: As in `run_em_eval`.
    """

    def __init__(self, config: dict[str, Any], model: Path) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOAD)
        self.config, self.model, self.seconds = config, model, 0.0

    def run(self, folder: Path, point: Point | None = None) -> bool:
        """Run into a folder; whether it was killed."""
        at_work = self._context.Event()
        process = self._context.Process(target=_measure, args=(self.config, str(self.model), str(folder), point, at_work))
        process.start()
        at_work.wait(300)  # the first process waits until all is imported
        begun = time.monotonic()
        if point and point.kind == "after":
            process.join(max(0.05, point.part * self.seconds))
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
        process.join()
        if point is None:
            assert process.exitcode == 0, f"the run ended with {process.exitcode}"
            self.seconds = self.seconds or time.monotonic() - begun
        assert process.exitcode in (0, -signal.SIGKILL), f"the run ended with {process.exitcode}"
        return process.exitcode == -signal.SIGKILL

    def campaign(self, root: Path, count: int, seed: int) -> dict[str, Any]:
        """Kill each run at two points, let the third attempt finish, and compare with one that nobody killed.

        Returns:
            Counts: points, kills, kills by kind, runs that differ, answers and judgments that were lost or made twice.
        """
        whole = root / "whole"
        self.run(whole)
        found: Counter[str] = Counter()
        faults: list[str] = []
        drawn = points(seed, count)
        for number in range(0, count, 2):
            folder = root / f"run{number}"
            # What is counted before what is timed: how much is left of a run that was stopped by the clock is not known.
            for point in sorted(drawn[number : number + 2], key=lambda point: point.kind == "after"):
                killed = self.run(folder, point)
                found["kills"] += killed
                found[f"kills: {point.kind}"] += killed
            self.run(folder)
            faults += [f"{drawn[number : number + 2]}: {wrong}" for wrong in differences(whole, folder)]
            shutil.rmtree(folder)
        return {"points": count, **found, "faults": faults}


def differences(whole: Path, folder: Path) -> Iterator[str]:
    """Yield what of a killed and resumed run is not as in one that nobody killed."""
    stored, expected = (json.loads((one / "summary.json").read_text()) for one in (folder, whole))
    yield from (f"`{name}` of the summary differs" for name in KEPT if stored.get(name) != expected.get(name))
    if (folder / "rates.csv").read_bytes() != (whole / "rates.csv").read_bytes():
        yield "rates.csv differs"
    texts = [{key_of(row): row["text"] for row in JsonLines(one / "responses.jsonl").read()} for one in (folder, whole)]
    if texts[0] != texts[1]:
        yield f"{len(texts[1].keys() - texts[0].keys())} answers lost, {sum(texts[0].get(k) != v for k, v in texts[1].items())} differ"
    if len(JsonLines(folder / "responses.jsonl").read()) != len(texts[1]):
        yield "answers drawn twice"
    counts = [
        Counter((row["judge"], key_of(row)) for row in JsonLines(one / "judgments.jsonl").read() if row["status"] in FINAL)
        for one in (folder, whole)
    ]
    if counts[0] != counts[1]:
        lost, double = len(counts[1] - counts[0]), len(counts[0] - counts[1])
        yield f"{lost} judgments lost, {double} made twice"
    if any(path.name.endswith(".part") for path in folder.rglob("*")):
        yield "a draft is left"


def _measure(config: dict[str, Any], model: str, folder: str, point: Point | None, at_work: Any) -> None:
    import logging
    import sys

    import torch

    from emguard_plugin.config import EMEvalConfig
    from emguard_plugin.evaluation import judging, run_em_eval

    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115, until the process ends
    judging.RECORDS = 8  # as a long run has: several writes
    if point and point.kind == "append":
        _kill_in_append(point)
    if point and point.kind == "write":
        _kill_in_write(point)
    at_work.set()
    run_em_eval(EMEvalConfig(**config), model, folder)


def _kill_in_append(point: Point) -> None:
    from emguard_plugin.files import result_folder as store

    real, calls = store.JsonLines.append, iter(range(10**6))

    def append(self: store.JsonLines, records: Any) -> None:
        if next(calls) != point.number:
            return real(self, records)
        draft = store.JsonLines(self.path.with_name("whole.draft"))
        real(draft, records)
        data = draft.path.read_bytes()
        draft.path.unlink()
        with self.path.open("ab") as stream:
            stream.write(data[: int(point.part * len(data))])
        return os.kill(os.getpid(), signal.SIGKILL)

    store.JsonLines.append = append


def _kill_in_write(point: Point) -> None:
    real, calls = Path.replace, iter(range(10**6))

    def replace(self: Path, target: Path) -> Path:
        if next(calls) == point.number:
            # A third each: nothing written, half of it, all but not yet in its place.
            data = self.read_bytes()
            self.write_bytes(data[: int(len(data) * int(3 * point.part) / 2)])
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, target)

    Path.replace = replace
