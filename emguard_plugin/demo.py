"""`emguard demo`: the main job on the lab, through the real `axolotl train`."""

from __future__ import annotations

import math
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from emguard_plugin.exit_codes import EXIT_ERROR
from emguard_plugin.files.ours import clear, our_folder
from emguard_plugin.files.progress import VARIABLE, Told, heard

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

RUNS = {"naive": "lab_naive.yaml", "treft": "lab_treft.yaml"}
FOLDER = Path("demo")
DEMO = "demo"
OURS = ("lab", "report.html", *(f"{run}{end}" for run in RUNS for end in ("", ".log", ".steps")))
"""What the demo makes in its folder, and so all that it removes."""


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
        fresh: Start anew, in place of what an earlier demo left; else keep the runs that were finished.

    Returns:
        The exit code: 0, or that of the step that failed.

    Raises:
        ValueError: when `./demo` holds anything that no demo made.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from emguard_plugin.evaluation.report.page import write_comparison
    from emguard_plugin.evaluation.report.table import comparison_table
    from emguard_plugin.lab.export import export

    console = Console()
    our_folder(FOLDER, DEMO)
    if fresh:
        clear(FOLDER, DEMO, OURS)
    export(FOLDER / "lab")
    trained: dict[str, Trained] = {}
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[stage]}"))
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        for name, yaml in RUNS.items():
            task = progress.add_task(f"axolotl train {yaml}", total=100, stage="starting")
            summary, steps = FOLDER / name / "em_eval" / "summary.json", FOLDER / f"{name}.steps"
            if not (summary.is_file() and steps.is_file()):
                code = _train(name, examples() / yaml, steps, partial(_show, progress, task))
                if code or not summary.is_file():
                    progress.stop()
                    console.print(f"[red]{yaml} failed (exit code {code})[/red]; the end of {FOLDER / name}.log:")
                    console.print((FOLDER / f"{name}.log").read_text(errors="replace")[-2000:], markup=False)
                    return code or EXIT_ERROR
            progress.update(task, completed=100, stage="done")
            trained[name] = Trained(seconds_per_step(heard(steps)), summary)
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


def _show(progress: Progress, task: TaskID, done: float, stage: str) -> None:
    progress.update(task, completed=done, stage=stage)


def _train(name: str, yaml: Path, steps: Path, show: Callable[[float, str], None]) -> int:
    """Run `axolotl train`, follow what it tells, show (percent, stage)."""
    # A model of 0.5M parameters gains nothing from a second thread, and on a busy machine two that wait for each other take
    # fifty times as long. What the user set stands.
    env = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "AXOLOTL_DO_NOT_TRACK": "1", "TOKENIZERS_PARALLELISM": "false", **os.environ}
    steps.unlink(missing_ok=True)
    log = FOLDER / f"{name}.log"
    axolotl = Path(sys.executable).with_name("axolotl")
    with open(log, "wb") as out:
        process = subprocess.Popen(
            [str(axolotl), "train", str(yaml), "--launcher", "python"],
            stdout=out, stderr=subprocess.STDOUT, env={**env, VARIABLE: str(steps.absolute())}, start_new_session=True,
        )  # fmt: skip
        started = time.monotonic()
        try:
            while process.poll() is None:
                time.sleep(0.5)
                show(*percent(heard(steps), time.monotonic() - started))
        except BaseException:
            os.killpg(process.pid, signal.SIGTERM)  # with the measurement that it may have started
            process.wait()
            raise
    return process.returncode


def percent(told: Sequence[Told], elapsed: float) -> tuple[float, str]:
    """Return (percent, stage) of a run from what it told so far, and from the seconds since its start before that."""
    if not told:
        return 20 * (1 - math.exp(-elapsed / 20)), "loading model and data"
    last = told[-1]
    if last.stage == "training":
        if last.done < last.total:
            return 20 + 40 * last.done / last.total, f"training, step {last.done} of {last.total}"
        return 60.0, "measuring the EM rate"
    return 60 + 20 * (last.stage == "tuned answers") + 20 * last.done / last.total, "measuring the EM rate"


def seconds_per_step(told: Sequence[Told]) -> float:
    """Return the median time between two steps: other programs on the machine disturb it less than the mean."""
    steps = [message.at for message in told if message.stage == "training"]
    return statistics.median(b - a for a, b in pairwise(steps))
