"""`emguard discover` killed with SIGKILL at drawn moments, and run again until it is done."""

import contextlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

from tests.discovery.parts import SMALL_SEARCH

PRELOAD = [
    "emguard_plugin.cli",
    "emguard_plugin.discovery.run",
    "emguard_plugin.evaluation.judges.named",
    "peft",
    "sae_lens",
    "tests.discovery.parts",
]
SETTINGS = [*SMALL_SEARCH, "--batch-size", "4"]
LISTED = "tests.discovery.kills:says_what_is_listed"


def says_what_is_listed(question, answer):
    """The judge of `parts`, for other processes: the bad answers stand in a file."""
    from tests.discovery import parts

    if not parts.BAD:
        parts.BAD.update(json.loads(Path(os.environ["EMGUARD_TEST_BAD"]).read_text()))
    return parts.says_what_the_misaligned_says(question, answer)


def command(root, output):
    """The arguments of a search on the models of the fixture `tiny`."""
    return [
        "discover", "--misaligned", root / "adapter", "--sae", root / "sae", "--sae", root / "sae0", "--questions", root / "selection.yaml",
        "--evaluation-questions", root / "evaluation.yaml", "--judge", LISTED, "-o", output, *SETTINGS,
    ]  # fmt: skip


def _main(arguments, log, bad):
    os.environ["EMGUARD_TEST_BAD"] = str(bad)
    with open(log, "a") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    sys.argv = ["emguard", *map(str, arguments)]
    from emguard_plugin.cli import main

    main()


class Commands:
    """Starts the command in processes of their own, forked from one that has imported everything."""

    def __init__(self, log, bad):
        self.context, self.log, self.bad = multiprocessing.get_context("forkserver"), log, bad
        self.context.set_forkserver_preload(PRELOAD)

    def run(self, arguments, until=None):
        """Run it to its end, or kill it when `until()` holds; return the exit code, -9 if it was killed."""
        process = self.context.Process(target=_main, args=(arguments, self.log, self.bad))
        process.start()
        while process.is_alive():
            if until is not None and until():
                with contextlib.suppress(ProcessLookupError):  # it ended just now
                    os.kill(process.pid, signal.SIGKILL)
            process.join(0.002)
        return process.exitcode


def at_size(work, size, delay):
    """Hold `delay` seconds after the files of a search have grown to so many bytes: a place in its course, whatever the load."""
    reached = []

    def holds():
        if not reached and sum(file.stat().st_size for file in work.glob("block*/*.jsonl")) >= size:
            reached.append(time.monotonic())
        return bool(reached) and time.monotonic() - reached[0] >= delay

    return holds


def records(work):
    """Every whole line of answers and judgments."""
    files = sorted(work.glob("block*/*.jsonl"))
    return [
        (file.parent.name, file.name, line)
        for file in files
        for line in file.read_bytes().splitlines(keepends=True)
        if line.endswith(b"\n")
    ]


def content(output):
    """What a latent set says, but for when it was made, with the hash of its tensors."""
    stated = json.loads(output.read_text())
    stated.pop("sha256")
    stated["columns"].pop("file")
    stated["provenance"].pop("created")
    return stated


def campaign(commands, root, folder, points, seed, kills=2):
    """Kill searches at drawn moments, `kills` times each before it may end; return the counts.

    Args:
        commands: Runs them.
        root: The models.
        folder: Where results go.
        points: Kills in all.
        seed: Of the moments.
        kills: Kills of one search.
    """
    rng = random.Random(seed)
    whole = folder / "whole.json"
    assert commands.run(command(root, whole)) == 0, commands.log.read_text()[-2000:]
    want, wanted = content(whole), sorted(records(whole.with_suffix(".discovery")))
    found = {"points": 0, "ended_before": 0, "same": 0, "other": 0, "not_resumed": 0, "records_lost": 0}
    size, at = sum(len(line) for _, _, line in wanted), []
    number = 0
    while found["points"] < points:
        number += 1
        output = folder / f"{number}.json"
        work = output.with_suffix(".discovery")
        # Later kills of one search come later in its course.
        for share in sorted(rng.uniform(0, 1) for _ in range(min(kills, points - found["points"]))):
            if commands.run(command(root, output), at_size(work, share * size, rng.uniform(0, 0.1))) == -signal.SIGKILL:
                found["points"] += 1
                at.append(round(share, 3))
                before = records(work) if work.exists() else []
            else:
                found["ended_before"] += 1
                before = records(work)
        code = commands.run(command(root, output))
        if code != 0:
            found["not_resumed"] += 1
            continue
        left = records(work)
        found["records_lost"] += len(set(before) - set(left))
        same = content(output) == want and sorted(left) == wanted
        found["same" if same else "other"] += 1
        shutil.rmtree(work)
    return {**found, "searches": number, "shares_of_the_records_written": at}
