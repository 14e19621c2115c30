"""Files of results and of the user, spoilt by a seeded generator, through `emguard eval`, `report` and `discover`: what comes of it?

Counts per file: `refused` (one sentence that names the file, exit code 2 or 4), `same` (the numbers of the whole file), `bare`
(an exception without words of its own) and `wrong` (other numbers). `results/faulty_files.json` is the output of the defaults,
which take about three minutes on two cores.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

from emguard_plugin.discovery.record import PACKAGES
from emguard_plugin.files.versions import versions
from tests.faults import world as faulty_world


def main() -> None:
    """Print the counts as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    settings = parser.parse_args()
    counts: dict[str, Counter[str]] = {}
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        world = faulty_world.build(Path(folder))
        for name in faulty_world.targets(world):
            counts[name] = Counter()
            for seed in settings.seeds:
                for label, content in faulty_world.faults(world, name, seed):
                    place = Path(folder) / "spoilt"
                    shutil.rmtree(place, ignore_errors=True)
                    place.mkdir()
                    outcome = faulty_world.check(world, name, content, place)
                    counts[name][outcome.kind] += 1
                    if outcome.kind in ("bare", "wrong"):
                        print(f"{name}, seed {seed}, {label}: {outcome.kind}, exit code {outcome.exit_code}: {outcome.said[-500:]}")
    total = sum(counts.values(), Counter())
    found = {"files": sum(total.values()), **{kind: total[kind] for kind in ("refused", "same", "bare", "wrong")}}
    print(json.dumps({"settings": vars(settings), "counts": found, "by_file": counts, "versions": versions(PACKAGES)}, indent=1))


if __name__ == "__main__":
    main()
