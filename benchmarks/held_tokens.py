"""Prefixes and postfixes over every installed chat template: shapes of conversations, and generated ones, by three tokenizers.

The test of `tests/chats/test_installed_templates.py` with more seeds; writes `benchmarks/results/held_tokens.json`.

    python benchmarks/held_tokens.py [--generated 2000] [--seeds 3]
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from emguard_plugin.files.versions import versions  # noqa: E402
from tests.chats.test_installed_templates import ALL, KINDS, every_shape, generated  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--generated", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "held_tokens.json")
    args = parser.parse_args()
    used = versions(("trl", "axolotl", "transformers", "tokenizers"))
    found = {"templates": len(ALL), "versions": used, "generated": args.generated, "seeds": list(range(1, args.seeds + 1)), "runs": []}
    for kind in KINDS:
        looks = {"shapes": every_shape(kind)} | {f"seed {s}": generated(kind, args.generated, s) for s in found["seeds"]}
        for name, look in looks.items():
            found["runs"].append({"tokenizer": kind, "what": name, "wrong": len(look.wrong), **look.seen})
            print(found["runs"][-1], *look.wrong[:20], sep="\n  ", flush=True)
    args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
