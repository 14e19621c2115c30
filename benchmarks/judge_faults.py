"""A hundred faulty judges, behind real sockets and as functions: what `emguard eval` makes of each.

    python benchmarks/judge_faults.py            # writes results/judge_faults.json

Each judges eight answers whose true scores are known. Counted are tracebacks, wrong numbers (a score that is neither the truth nor
missing with a reason, a summary that does not count the judgments, an exit code that does not fit), and leaked keys. The faults
are those of tests/evaluation/judge_faults.py, drawn from a seed; the tests run a slice of them.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from emguard_plugin.files.versions import versions

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
RESULTS = Path(__file__).parent / "results" / "judge_faults.json"


def main(
    count: Annotated[int, typer.Option(help="Faults.")] = 100,
    seed: Annotated[int, typer.Option(help="They are drawn from it.")] = 0,
    output: Annotated[Path, typer.Option(help="Where results go.")] = RESULTS,
) -> None:
    """Strike, count, write."""
    from tests.evaluation.judge_faults import ANSWERS, faults, prepare, strike

    kinds: Counter[str] = Counter()
    wrong: dict[str, list[str]] = {}
    begun = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "prepared").mkdir()
        prepared = prepare(root / "prepared")
        for fault in faults(seed, count):
            place = root / str(fault.number)
            place.mkdir()
            found = strike(fault, prepared, place)
            kinds[fault.mode] += 1
            if found:
                wrong[fault.label] = found
                typer.echo(f"{fault.label}: {found}", err=True)
    said = [sentence for found in wrong.values() for sentence in found]
    leaked = sum("the key" in sentence for sentence in said)
    tracebacks = sum("traceback" in sentence or "ended with" in sentence for sentence in said)
    result = {
        "faults": count,
        "seed": seed,
        "answers_each": ANSWERS,
        "by_kind": dict(kinds),
        "tracebacks": tracebacks,
        "leaked_keys": leaked,
        "wrong_numbers": len(said) - leaked - tracebacks,
        "wrong": wrong,
        "cpu_seconds": round(time.process_time() - begun, 1),
        "versions": {"python": platform.python_version(), **versions(("openai", "emguard-plugin"))},
    }
    output.parent.mkdir(exist_ok=True)
    output.write_text(json.dumps(result, indent=2) + "\n")
    typer.echo(json.dumps({key: value for key, value in result.items() if key != "wrong"}, indent=2))
    raise typer.Exit(bool(wrong))


if __name__ == "__main__":
    typer.run(main)
