"""`emguard discover` killed with SIGKILL at moments drawn from a seed, then run again: is the result the same?

Searches over two blocks of a tiny model; each is killed twice before it may end. `results/kills_discovery.json` is the output
of the defaults, which take about three minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from emguard_plugin.discovery.record import PACKAGES
from emguard_plugin.files.versions import versions
from tests.discovery import kills, parts
from tests.discovery.conftest import build_tiny


def main() -> None:
    """Print the counts as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    settings = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "models").mkdir()
        build_tiny(root / "models")
        (root / "bad.json").write_text(json.dumps(sorted(parts.BAD)))
        commands = kills.Commands(root / "log", root / "bad.json")
        found = kills.campaign(commands, root / "models", root, settings.points, settings.seed)
    print(json.dumps({"settings": vars(settings), "counts": found, "versions": versions(PACKAGES)}, indent=1))


if __name__ == "__main__":
    main()
