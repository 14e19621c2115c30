"""Run the tests on every stack of hosts that is claimed, and write what passed where into README.md.

`make compat`; with names of stacks, those alone, and with tests, those alone: the table keeps the other stacks' columns, and the rows
whose tests were not all among them. A stack without its Python, or whose environment cannot be installed, is named and is no pass.

Ends with 0, with 1 where a test failed, with 3 where a stack could not be had and nothing failed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from datetime import date
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
RESULTS = REPO / "benchmarks" / "results" / "compat.json"
README = REPO / "README.md"
STACKS = {
    "compat-3.13": ("axolotl-0.21", "3.13"),
    "compat-3.12": ("axolotl-0.21", "3.12"),
    "compat-3.11": ("axolotl-0.19", "3.11"),
    "newest": ("newest", "3.13"),
    "lowest": ("lowest", "3.11"),
}
"""By the name of its environment the constraints of a stack and its Python."""
HOSTS = ("axolotl", "trl", "transformers", "peft", "torch")
FEATURES = {
    "penalties, gradients, references": ("tests/regularizers", "tests/models", "tests/latents", "tests/reference"),
    "chat templates": ("tests/chats",),
    "what is relied on of the hosts": ("tests/contract",),
    "SFT under TRL, resume, EM rate": ("tests/training",),
    "DPO, KTO, GRPO, RLOO under TRL": ("tests/training/test_other_trainers.py",),
    "several processes": ("tests/distributed",),
    "`axolotl train`, SFT": ("tests/e2e",),
    "`axolotl train`, `rl:`": ("tests/e2e/test_axolotl_rl.py",),
    "command line, example YAMLs": ("tests/cli", "tests/examples/test_yamls.py"),
}
"""What the table has a row for, and the tests that show it: the longest path counts."""
BEGIN, END = "<!-- written by `make compat` -->", "<!-- /compat -->"


def main() -> int:
    """Run; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stacks", nargs="*", default=list(STACKS), choices=[*STACKS, []], metavar="STACK")
    parser.add_argument("--tests", nargs="+", help="run these alone")
    given = parser.parse_args()
    failed, lacking = [], []
    for name in given.stacks:
        python = environment(name)
        if python is None:
            lacking.append(name)
            continue
        paths = given.tests or sorted(
            {path for paths in FEATURES.values() for path in paths if not path.endswith(("rl.py", "trainers.py"))}
        )
        report = REPO / "build" / f"{name}.xml"
        report.unlink(missing_ok=True)
        code = subprocess.run(
            [python, "-m", "pytest", "-n", os.environ.get("COMPAT_WORKERS", "2"), "--dist", "loadfile", "-p", "no:cacheprovider", "--disable-warnings",
             "--show-capture=no", "--tb=short", f"--junitxml={report}", *paths],
            cwd=REPO, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}, check=False,
        ).returncode  # fmt: skip
        if code:
            failed.append(name)
        ran = [f for f, of in FEATURES.items() if set(of) <= set(paths) or not given.tests]
        if ran and report.is_file():
            store(name, python, report, ran)
    for name in lacking:
        print(f"compat: {name} was NOT run: {' on Python '.join(STACKS[name])} cannot be had here")
    print(f"compat: ran {', '.join(n for n in given.stacks if n not in lacking) or 'nothing'}; failed: {', '.join(failed) or 'none'}")
    return 1 if failed else 3 if lacking else 0


def environment(name: str) -> str | None:
    """Return the Python of a stack's environment, made where it is not current; None where it cannot be had."""
    stack, number = STACKS[name]
    held = (Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions").glob(f"{number}.*/bin/python")
    for python in (f"python{number}", *map(str, sorted(held))):
        try:
            if subprocess.run([python, "-c", ""], capture_output=True, check=False).returncode == 0:
                break
        except OSError:
            continue
    else:
        return None
    folder = f"build/{name}"
    made = subprocess.run(
        ["make", f"VENV={folder}", f"STACK={stack}", f"PYTHON={python}", f"{folder}/.emguard-ready"], cwd=REPO, check=False
    )
    return str(REPO / folder / "bin" / "python") if made.returncode == 0 else None


def store(name: str, python: str, report: Path, ran: list[str]) -> None:
    """Store what a stack's tests came to in the rows whose tests all ran, and write the table anew."""
    listed = subprocess.run([python, "-m", "pip", "freeze"], capture_output=True, text=True, check=True).stdout
    versions = dict(re.findall(r"^(\S+)==(\S+)$", listed, re.MULTILINE))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=REPO, capture_output=True, text=True, check=True).stdout.strip()
    counts = {f: {"passed": 0, "failed": 0, "skipped": 0, "commit": commit, "date": str(date.today())} for f in ran}
    for path, outcome in outcomes(report):
        if (feature := feature_of(path)) in counts:
            counts[feature][outcome] += 1
    known = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    known[name] = {
        "stack": STACKS[name][0], "python": STACKS[name][1], "hosts": {host: versions.get(host) for host in HOSTS},
        "tests": {**known.get(name, {}).get("tests", {}), **counts},
    }  # fmt: skip
    RESULTS.write_text(json.dumps({n: known[n] for n in STACKS if n in known}, indent=2) + "\n")
    text = README.read_text()
    before, _, rest = text.partition(BEGIN)
    README.write_text(f"{before}{BEGIN}\n{table(known)}{END}{rest.partition(END)[2]}")


def outcomes(report: Path) -> Iterator[tuple[str, str]]:
    """Yield (path of the test's file, outcome) of a junit report."""
    for case in ET.parse(report).getroot().iter("testcase"):
        parts = (case.get("classname") or case.get("name", "")).split(".")  # a file that was not collected has no class
        path = next(("/".join(parts[:n]) for n in range(len(parts), 0, -1) if (REPO / ("/".join(parts[:n]) + ".py")).is_file()), "")
        failed = case.find("failure") is not None or case.find("error") is not None
        yield f"{path}.py", "failed" if failed else "skipped" if case.find("skipped") is not None else "passed"


def feature_of(path: str) -> str | None:
    """Return which row a test counts for."""
    fits = [(len(p), feature) for feature, paths in FEATURES.items() for p in paths if path == p or path.startswith(f"{p}/")]
    return max(fits)[1] if fits else None


def table(known: dict[str, dict]) -> str:
    """Return the table in Markdown."""
    stacks = [n for n in STACKS if n in known]
    rows = [["", *(f"{known[n]['stack'].replace('-', ' ')}, Python {known[n]['python']}" for n in stacks)]]
    for host in HOSTS:
        rows.append([host, *((known[n]["hosts"][host] or "none").partition("+")[0] for n in stacks)])
    for feature in FEATURES:
        cells = []
        for n in stacks:
            found = known[n]["tests"].get(feature, {})
            ran = found.get("passed", 0) + found.get("failed", 0)
            words = {"passed": "pass", "failed": "FAIL", "skipped": "skipped"}
            told = [f"{found[outcome]} {word}" for outcome, word in words.items() if ran and found[outcome]]
            cells.append(", ".join(told) or "not there")
        rows.append([feature, *cells])
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]) + "\n"


if __name__ == "__main__":
    sys.exit(main())
