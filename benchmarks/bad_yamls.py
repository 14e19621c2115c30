"""500 generated YAMLs that ask for what cannot be (and some that look odd and are right), through every entry point.

`python benchmarks/bad_yamls.py` runs them with the plugin's own `register`, as Axolotl calls it, and stores the counts.
"""

import argparse
import collections
import contextlib
import io
import json
import logging
import os
import sys
import tempfile
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from emguard_plugin.files.versions import versions  # noqa: E402
from tests.faults import bad_yamls  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "bad_yamls.json"


def register():
    from axolotl.utils.dict import DictDefault

    from emguard_plugin import EMGuardPlugin

    plugin = EMGuardPlugin()

    def call(raw):
        try:
            settings = DictDefault(raw)
        except RecursionError:  # Axolotl's own mapping of a value that holds itself, before any plugin is asked
            raise ValueError("Axolotl itself cannot read it") from None
        plugin.register(settings)

    return call


def main(number, seeds, result):
    warnings.simplefilter("ignore")
    logging.disable(logging.NOTSET)
    hook = register()
    folder = Path(tempfile.mkdtemp()).resolve()
    bad_yamls.write(folder)
    os.chdir(folder)
    found, kinds, wrong, secrets, faults = 0, collections.Counter(), [], 0, 0
    for seed in seeds:
        for case in bad_yamls.generate(folder, seed, number):
            out = io.StringIO()
            handler = logging.StreamHandler(out)
            logging.getLogger().addHandler(handler)
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
                said = bad_yamls.run(case, folder, hook)
            logging.getLogger().removeHandler(handler)
            if case.secret and bad_yamls.leaked(case.secret, out.getvalue()):
                said.append(f"{case.name}: a log repeated the secret")
            found, faults, secrets = found + 1, faults + case.fault, secrets + bool(case.secret)
            kinds[case.name.split(" ", 1)[1].split(":")[0].split(" ")[0].split(".")[0]] += 1
            wrong += said
            if said:
                print(*said, sep="\n", file=sys.stderr)
    counts = {
        "cases": found,
        "faults": faults,
        "with a secret": secrets,
        "entry points": 5,
        "crashed": sum(" crashed: " in w or "traceback" in w for w in wrong),
        "accepted": sum("accepted it" in w for w in wrong),
        "refused though right": sum("refused it" in w for w in wrong),
        "repeated a secret": sum("repeated the secret" in w for w in wrong),
    }
    stored = {
        "seeds": seeds,
        "per seed": number,
        "counts": counts,
        "wrong": wrong,
        "versions": versions(("axolotl", "trl", "transformers", "pydantic", "PyYAML", "typer")),
    }
    result.parent.mkdir(exist_ok=True)
    result.write_text(json.dumps(stored, indent=2) + "\n")
    print(json.dumps(counts, indent=2))
    return 1 if wrong else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--number", type=int, default=100, help="cases per seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--result", type=Path, default=RESULT)
    options = parser.parse_args()
    sys.exit(main(options.number, options.seeds, options.result))
