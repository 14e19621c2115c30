"""`emguard demo`: the main job on the lab, through the real `axolotl train`."""

from __future__ import annotations

import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

RUNS = {"naive": "lab_naive.yaml", "treft": "lab_treft.yaml"}
FOLDER = Path("demo")
_TRAINED = re.compile(rb"(\d+)/(\d+) \[")
_ANSWERS = re.compile(rb"em_eval: (base|tuned) answers: [^\r\n]*? (\d+)/(\d+) \[")
_RATE = re.compile(r"\d+/\d+ \[[^\]]*?([\d.]+)(it/s|s/it)\]")


def examples() -> Path:
    """Return the folder of the example YAMLs: inside an installed wheel, or beside the package in a clone.

    Raises:
        FileNotFoundError: when neither is there.
    """
    package = Path(__file__).parent
    for folder in (package / "example_yamls", package.parent / "example_yamls"):
        if (folder / RUNS["naive"]).is_file():
            return folder
    raise FileNotFoundError("example_yamls/ is neither in the installed package nor beside it. Reinstall emguard-plugin.")


@dataclass
class Trained:
    """One finished `axolotl train`: training seconds per step, and the summary of its measurement."""

    seconds_per_step: float
    summary: Path


def run_demo(fresh: bool = True) -> int:
    """Train, measure, and show base / naive / TReFT side by side.

    Args:
        fresh: Remove an earlier `./demo` first.

    Returns:
        The exit code: 0, or that of the step that failed.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from emguard_plugin.evaluation.report.page import write_comparison
    from emguard_plugin.evaluation.report.table import comparison_table
    from emguard_plugin.lab.export import export

    console = Console()
    if fresh and FOLDER.exists():
        shutil.rmtree(FOLDER)
    FOLDER.mkdir(exist_ok=True)
    export(FOLDER / "lab")
    trained: dict[str, Trained] = {}
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[stage]}"))
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        for name, yaml in RUNS.items():
            task = progress.add_task(f"axolotl train {yaml}", total=100, stage="starting")
            code = _train(name, examples() / yaml, lambda done, stage, t=task: progress.update(t, completed=done, stage=stage))
            summary = FOLDER / name / "em_eval" / "summary.json"
            if code or not summary.is_file():
                progress.stop()
                console.print(f"[red]{yaml} failed (exit code {code})[/red]; the end of {FOLDER / name}.log:")
                console.print((FOLDER / f"{name}.log").read_text(errors="replace")[-2000:], markup=False)
                return code or 1
            progress.update(task, completed=100, stage="done")
            trained[name] = Trained(_seconds_per_step(FOLDER / f"{name}.log"), summary)
    runs = [("naive" if n == "naive" else "TReFT", t.summary) for n, t in trained.items()]
    plain, guarded = trained["naive"].seconds_per_step, trained["treft"].seconds_per_step
    extra = {
        "naive": {"s/step": f"{plain:.3f}"},
        "TReFT": {"s/step": f"{guarded:.3f}", "overhead": f"{100 * (guarded / plain - 1):+.0f} %"},
    }
    console.print(comparison_table(runs, extra=extra))
    page = write_comparison(runs, FOLDER / "report.html", extra=extra, title="A narrow fine-tune, plain and guarded by TReFT")
    console.print(f"Report with plots and sample answers: {page}")
    console.print("Overhead here is that of a model of 0.5M parameters, whose step is all fixed costs; see the README for real shapes.")
    return 0


def _train(name: str, yaml: Path, show: object) -> int:
    """Run `axolotl train`, follow its log, report (percent, stage)."""
    env = {"HF_HUB_OFFLINE": "1", "AXOLOTL_DO_NOT_TRACK": "1", "TOKENIZERS_PARALLELISM": "false", **os.environ}
    log = FOLDER / f"{name}.log"
    axolotl = Path(sys.executable).with_name("axolotl")
    with open(log, "wb") as out:
        process = subprocess.Popen(
            [str(axolotl), "train", str(yaml), "--launcher", "python"],
            stdout=out, stderr=subprocess.STDOUT, env=env, start_new_session=True,
        )  # fmt: skip
        try:
            while process.poll() is None:
                time.sleep(0.5)
                show(*_progress(log.read_bytes()))
        except BaseException:
            os.killpg(process.pid, signal.SIGTERM)  # with the measurement that it may have started
            process.wait()
            raise
    return process.returncode


def _progress(log: bytes) -> tuple[float, str]:
    """Return (percent, stage) from a log so far."""
    loading, started, training = log.partition(b"Starting trainer")
    training, completed, measuring = training.partition(b"Training completed")
    if completed:
        answers = _ANSWERS.findall(measuring)
        role, done, total = answers[-1] if answers else (b"base", 0, 1)
        return 60 + 20 * (role == b"tuned") + 20 * int(done) / int(total), "measuring the EM rate"
    if steps := _TRAINED.findall(training):
        done, total = map(int, steps[-1])
        return 20 + 40 * done / total, f"training, step {done} of {total}"
    return 20.0 if started else min(20.0, loading.count(b"\n") / 10), "loading model and data"


def _seconds_per_step(log: Path) -> float:
    """Return the median over the trainer's progress lines: other programs on the machine disturb it less than the mean."""
    training = log.read_text(errors="replace").split("Starting trainer")[-1].split("train_runtime")[0]
    return statistics.median(float(x) if unit == "s/it" else 1 / float(x) for x, unit in _RATE.findall(training))
