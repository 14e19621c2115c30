"""SIGKILL at random points of real training runs; each is started again by the same command and must end as if nothing had been.

    python benchmarks/kill_training.py                 # 28 points of TRL, 12 of Axolotl; writes results/kill_training.json
    python benchmarks/kill_training.py --trl 4 --axolotl 0 --out FILE

Every point draws a case (method, adapter or full fine-tuning, where the reference is kept) and a moment: any time of the run, while a
checkpoint is being written (a few milliseconds after its folder appears), or while a reference is being recorded to a folder. The run
that was killed is started again until it ends; then its weights and its log (loss and penalties of every step) are compared bit for bit
with those of a run of the same case that nobody interrupted. A point is lost when the run cannot be resumed, or ends elsewhere.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # and not this folder, whose names are others' too

from benchmarks.kill_training_runs import AXOLOTL_CASES, RUNS, SAVED_EVERY, SLICE, STEPS, TRL_CASES  # noqa: E402
from emguard_plugin.files.versions import versions  # noqa: E402

LONGEST_S = 120


def fork(host: str, folder: Path, case: tuple, log: str) -> int:
    """Start a run in a process of its own that has everything imported."""
    folder.mkdir(parents=True, exist_ok=True)
    child = os.fork()
    if child:
        return child
    try:
        os.setpgid(0, 0)
        out = os.open(folder / log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(out, 1)
        os.dup2(out, 2)
        RUNS[host](str(folder), case)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


def wait(child: int) -> int:
    """Return the exit status of a child; kill it when it takes too long."""
    deadline = time.monotonic() + LONGEST_S
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return status
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.005)


def kill_when(child: int, ready, delay: float) -> bool:
    """Kill a child `delay` seconds after `ready()`; False when it ended before."""
    deadline = time.monotonic() + LONGEST_S
    while not ready():
        if os.waitpid(child, os.WNOHANG)[0]:
            return False
        if time.monotonic() > deadline:
            break
        time.sleep(0.0002)
    until = time.monotonic() + delay
    while time.monotonic() < until:
        if os.waitpid(child, os.WNOHANG)[0]:
            return False
        time.sleep(0.0002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def found_at_kill(folder: Path) -> dict:
    from emguard_plugin.reference.checkpoints import step_of, trainer_state

    out = folder / "out"
    steps = {n: trainer_state(p) is not None for p in (out.iterdir() if out.is_dir() else ()) if (n := step_of(p)) is not None}
    return {"whole": sorted(n for n, whole in steps.items() if whole), "torn": sorted(n for n, whole in steps.items() if not whole)}


def same(a: Path, b: Path) -> str | None:
    """Return what differs between two finished runs, or None."""
    import torch

    first, second = (torch.load(p / "final.pt", weights_only=True) for p in (a, b))
    for name, w in first["weights"].items():
        if not torch.equal(w, second["weights"][name]):
            return f"weights: {name} by up to {(w - second['weights'][name]).abs().max().item():.3g}"
    if len(first["log"]) != len(second["log"]):
        return f"{len(second['log'])} logged steps instead of {len(first['log'])}"
    for x, y in zip(first["log"], second["log"], strict=True):
        for key in x:
            if x[key] != y.get(key) and not key.endswith("outside_shift"):
                return f"{key} at step {x['step']}: {y.get(key)} instead of {x[key]}"
    return None


def same_checkpoint(a: Path, b: Path) -> str | None:
    """Return what differs between the last checkpoints of two runs: weights, log, what the regularizers store."""
    from safetensors.torch import load_file

    first, second = (p / f"checkpoint-{STEPS}" for p in (a, b))
    for path in first.glob("*.safetensors"):
        stored, other = load_file(path), load_file(second / path.name) if (second / path.name).is_file() else {}
        if stored.keys() != other.keys() or any((stored[n] != other[n]).any() for n in stored):
            return f"{path.name} of the last checkpoint differs"
    if missing := {p.name for p in first.glob("emguard_*")} - {p.name for p in second.glob("emguard_*")}:
        return f"the last checkpoint lacks {sorted(missing)}"
    logs = [json.loads((p / "trainer_state.json").read_text())["log_history"] for p in (first, second)]
    logged = [[row.get("loss") for row in log] for log in logs]
    return None if logged[0] == logged[1] else "the last checkpoint's log differs"


def point(host: str, case: tuple, whole: Path, duration: float, saving: float, folder: Path, rng: random.Random) -> dict:
    """Kill one run at one moment, resume it, compare."""
    kinds = ["any", "saving", "saving"] + (["recording", "recording"] if case[2] == "folder" else [])
    kind = rng.choice(kinds)
    step = rng.choice([SAVED_EVERY * n for n in range(1, STEPS // SAVED_EVERY + 1)])
    delay = {"any": rng.uniform(0, 0.7 * duration), "saving": rng.uniform(0, saving), "recording": rng.uniform(0, 0.02)}[kind]
    caches = [folder / "cache_kl", folder / "cache_block_em"]

    def ready() -> bool:
        if kind == "saving":
            return (folder / "out" / f"checkpoint-{step}").is_dir()
        return kind == "any" or any(c.is_dir() and any(c.iterdir()) for c in caches)

    killed = kill_when(fork(host, folder, case, "killed.log"), ready, delay)
    state = found_at_kill(folder)
    made = {"host": host, "case": list(case), "kind": kind, "step": step if kind == "saving" else None, "delay_s": round(delay, 4)}
    if STEPS in state["whole"]:
        # The run was over: its last checkpoint is what counts. Asked to resume from it, transformers trains one step too many.
        return {**made, "killed": killed, **state, "lost": same_checkpoint(whole / "out", folder / "out")}
    status = 0 if not killed else wait(fork(host, folder, case, "resumed.log"))
    why = None
    if status or not (folder / "final.pt").is_file():
        log = folder / ("resumed.log" if killed else "killed.log")
        lines = log.read_text(errors="replace").strip().splitlines()
        why = "not resumed: " + next((x for x in reversed(lines) if "Error" in x), lines[-1] if lines else "no output")[:600]
    else:
        why = same(whole, folder)
    return {**made, "killed": killed, **state, "lost": why}


def measure(host: str, cases: list, points: int, seed: int, work: Path, report) -> list[dict]:
    """Run all points of one host."""
    names = (
        "trl",
        "tests.trl_runs",
        "tests.regularizers.block_em_parts",
        "tests.regularizers.kl_parts",
        "emguard_plugin.training.trl_trainer",
    )
    if host == "axolotl":
        from tests.e2e.axolotl_runs import IMPORTS

        names = (
            *IMPORTS,
            *names[2:4],
            "tests.e2e.tiny_run",
            "emguard_plugin.regularizers.kl.callback",
            "emguard_plugin.regularizers.block_em.callback",
        )
        os.environ["EMGUARD_KILL_MODEL"] = str(work / "model")
        os.environ.update(CUDA_VISIBLE_DEVICES="", WANDB_DISABLED="true", AXOLOTL_DO_NOT_TRACK="1")
    for name in names:
        importlib.import_module(name)
    import gc

    import torch

    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    rng, found, known = random.Random(f"{seed} {host}"), [], {}
    order = [cases[i % len(cases)] for i in range(points)]
    rng.shuffle(order)
    for n, case in enumerate(order):
        if case not in known:
            whole = work / host / f"whole-{len(known)}"
            if host == "axolotl" and not known and wait(fork(host, work / host / "first", case, "log")):
                raise RuntimeError((work / host / "first" / "log").read_text()[-2000:])  # this one prepares model and rows
            started = time.monotonic()
            if wait(fork(host, whole, case, "log")):
                raise RuntimeError((whole / "log").read_text()[-2000:])
            duration = time.monotonic() - started
            times = [(f.stat().st_mtime_ns, f.parent) for f in (whole / "out").glob("checkpoint-*/*")]
            last = max(p for _, p in times)
            stamps = sorted(t for t, p in times if p == last)
            known[case] = whole, duration, (stamps[-1] - stamps[0]) / 1e9 + 0.005
        folder = work / host / f"point-{n}"
        row = point(host, case, *known[case], folder, rng)
        found.append(row)
        report(row)
        if row["lost"] is None:
            shutil.rmtree(folder)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trl", type=int, default=28)
    parser.add_argument("--axolotl", type=int, default=12)
    parser.add_argument("--seed", type=int, default=20261126)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "kill_training.json")
    parser.add_argument("--cases", type=int, default=None, help="draw from so many cases alone")
    parser.add_argument("--work", type=Path, default=None)
    given = parser.parse_args()
    work = given.work or Path(tempfile.mkdtemp(prefix="emguard_kill_"))
    found = []
    # Axolotl patches transformers when it is imported: TRL's share goes first.
    for host, cases, points in (("trl", TRL_CASES, given.trl), ("axolotl", AXOLOTL_CASES, given.axolotl)):
        if points:
            found += measure(
                host,
                SLICE[: given.cases] if given.cases else cases,
                points,
                given.seed,
                work,
                lambda row: print(json.dumps(row), flush=True),
            )
    lost = [row for row in found if row["lost"] is not None]
    packages = ["torch", "transformers", "trl", "peft"] + (["axolotl"] if given.axolotl else [])
    result = {
        "points": len(found), "killed": sum(r["killed"] for r in found), "lost": len(lost),
        "by_kind": {k: sum(r["kind"] == k for r in found) for k in ("any", "saving", "recording")},
        "torn_checkpoints_met": sum(bool(r["torn"]) for r in found), "seed": given.seed, "steps": STEPS, "saved_every": SAVED_EVERY,
        "versions": {"python": platform.python_version(), **versions(packages)}, "runs": found,
    }  # fmt: skip
    given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if not lost and given.work is None:
        shutil.rmtree(work)
    print(f"{len(found)} points, {result['killed']} killed, {len(lost)} lost" + (f"; see {work}" if lost else ""))
    return bool(lost)


if __name__ == "__main__":
    sys.exit(main())
