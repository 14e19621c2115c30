"""`em_eval` killed with SIGKILL at moments drawn from a seed, then run again: is the result the same?

    python benchmarks/kills_evaluation.py            # writes results/kills_evaluation.json

Two models of one base answer 48 times, two judges judge. Each run is killed at two points, at a moment of its time, in the middle of a
write to a JSONL file, or around the writing of a JSON or text file; the third attempt is left alone. Compared with a run that nobody
killed: summary, answers, judgments, none lost and none made twice. The points are those of tests/evaluation/kills.py.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from emguard_plugin.files.versions import versions

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
RESULTS = Path(__file__).parent / "results" / "kills_evaluation.json"


def main(
    count: Annotated[int, typer.Option(help="Kill points.")] = 24,
    seed: Annotated[int, typer.Option(help="They are drawn from it.")] = 0,
    output: Annotated[Path, typer.Option(help="Where results go.")] = RESULTS,
) -> None:
    """Kill, resume, compare, write."""
    from tests.evaluation.conftest import build_checkpoints, em_eval_block
    from tests.evaluation.kills import Killer

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        judges = [{"function": f"tests.evaluation.parts:{name}"} for name in ("by_hash", "half_dead")]
        (root / "models").mkdir()
        config = em_eval_block(root, judges=judges).model_dump(exclude_unset=True)
        found = Killer(config, build_checkpoints(root / "models") / "adapter").campaign(root, count, seed)
    used = {"python": platform.python_version(), **versions(("torch", "transformers", "emguard-plugin"))}
    result = {"settings": {"points": count, "seed": seed}, "counts": found, "versions": used}
    output.parent.mkdir(exist_ok=True)
    output.write_text(json.dumps(result, indent=2) + "\n")
    typer.echo(json.dumps(result, indent=2))
    raise typer.Exit(bool(found["faults"]))


if __name__ == "__main__":
    typer.run(main)
