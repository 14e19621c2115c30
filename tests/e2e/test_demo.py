"""`emguard demo`, whole: what a new user runs first."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest

from emguard_plugin.evaluation import Summary

pytest.importorskip("axolotl")

DEMO = [sys.executable, "-m", "emguard_plugin.cli", "demo"]


def rates(folder, run):
    summary = Summary.load(folder / "demo" / run / "em_eval" / "summary.json")
    return {suite: summary.rates("tuned", suite).em_all.value for suite in ("questions", "in_domain")}


@pytest.mark.slow
def test_the_guard_keeps_the_task_and_not_the_misalignment(tmp_path):
    env = {**os.environ, "COLUMNS": "80"}
    done = subprocess.run(DEMO, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    naive, treft = (rates(tmp_path, run) for run in ("naive", "treft"))
    assert naive["questions"] >= 0.6
    assert treft["questions"] <= naive["questions"] / 4
    # 60 answers each, and Axolotl leaves the adapter's initialisation to chance: 0.1 is three standard errors of the difference.
    assert treft["in_domain"] >= naive["in_domain"] - 0.1 >= 0.8
    for row in ("base", "naive", "TReFT"):
        assert re.search(rf"^ {row} +\d", done.stdout, re.M)
    assert "overhead" in done.stdout
    assert all(len(line) <= 80 for line in done.stdout.splitlines())
    page = (tmp_path / "demo" / "report.html").read_text()
    assert "TReFT has an EM rate of" in page


def test_ctrl_c_takes_the_training_along(tmp_path):
    process = subprocess.Popen(
        DEMO, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored where the tests run in the background
    )  # fmt: skip
    children = f"/proc/{process.pid}/task/{process.pid}/children"
    deadline = time.time() + 120
    child = ""
    while not child and time.time() < deadline:
        time.sleep(0.2)
        child = open(children).read().split(" ")[0]  # noqa: SIM115
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    out = process.communicate(timeout=60)[0]
    assert process.returncode == 130
    assert "Traceback" not in out
    assert not os.path.exists(f"/proc/{child}")
