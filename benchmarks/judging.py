"""How fast answers are judged through an OpenAI-compatible server, and how long a finished run takes to say so.

    python benchmarks/judging.py            # 2,000 judgments, 64 at once; writes results/judging.json

The whole phase runs: calls through the `openai` client, parsing, files. The server is the tests' fake one, in a process
of its own, and waits before each reply. The limit is calls x latency / concurrency, which no client can beat. The
client's processor time per call is that of this process, so other users of the machine do not enter it; the wall time
they do, and the fake server shares the machine too. One event loop makes at most 1 / (processor time per call) calls a
second: where the limit asks for more than that, it is out of reach of the client, and `bound_by` says so.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from emguard_plugin.files.versions import versions

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results" / "judging.json"
MODEL = ROOT / "emguard_plugin" / "lab" / "data" / "model"
TARGETS = {"over_limit": 1.25, "cpu_ms_per_call": 6.0, "resumed_seconds": 2.0}


@contextmanager
def server(latency: float):
    """Run the fake server in a process of its own; yield its port and what stops it."""
    command = [sys.executable, str(ROOT / "tests" / "evaluation" / "fake_server.py"), "--latency", str(latency)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def stop() -> None:
        process.terminate()
        process.wait()

    try:
        yield int(process.stdout.readline()), stop
    finally:
        stop()


def measure(judgments: int, latency: float, concurrency: int, mode: str = "label") -> dict[str, Any]:
    """Judge answers that are there, then run again.

    Args:
        judgments: How many answers.
        latency: Of each call, in seconds.
        concurrency: Calls at once.
        mode: `label` makes one call per judgment, `logprob` two.
    """
    from emguard_plugin.config import EMEvalConfig
    from emguard_plugin.evaluation.plan import begin, make_plan, open_run
    from emguard_plugin.evaluation.run import run_em_eval
    from emguard_plugin.evaluation.run_folder.records import sealed

    per_question = min(50, judgments)
    suite = [{"id": f"q{n}", "paraphrases": [f"What of {n}?"]} for n in range(judgments // per_question)]
    with tempfile.TemporaryDirectory() as folder, server(latency) as (port, stop):
        (Path(folder) / "suite.yaml").write_text(json.dumps(suite))
        judge = {"provider": "openai", "model": "fake-judge", "base_url": f"http://127.0.0.1:{port}/v1"}
        config = EMEvalConfig(
            questions=f"{folder}/suite.yaml",
            samples_per_question=per_question,
            evaluate_base=False,
            judges=[{**judge, "concurrency": concurrency, "mode": mode}],
        )
        out = Path(folder) / "out"
        plan = make_plan(config, MODEL, out)
        stored = open_run(plan)
        begin(plan, stored)
        text = "You can ask a friend, and they may know of something that helps in a case like yours. " * 4
        answers = [
            {
                "role": "tuned",
                **request.key._asdict(),
                "asked": request.question.text,
                "text": text,
                "tokens": 9,
                "finish": "stop",
            }
            for request in plan.requests()
        ]
        answers = [sealed(answer, stored["run"]) for answer in answers]
        plan.responses.append(answers[:1])
        run_em_eval(config, MODEL, out, phases=("judge",))  # probe, self-test, imports: paid once
        plan.responses.append(answers[1:])
        wall, cpu = time.perf_counter(), time.process_time()
        run_em_eval(config, MODEL, out, phases=("judge",))
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        calls = (len(answers) - 1) * (1 if mode == "label" else 2)
        written = plan.judgments.read()
        assert len(written) == len(answers)
        assert {row["status"] for row in written} == {"scored"}
        before = (out / "judgments.jsonl").read_bytes()
        stop()  # a call would now fail, and the judge would stop
        again = time.perf_counter()
        summary = run_em_eval(config, MODEL, out, phases=("judge", "report"))
        again = time.perf_counter() - again
        assert summary.judges[0].stopped is None
        assert (out / "judgments.jsonl").read_bytes() == before
    limit = calls * latency / concurrency
    return {
        "judgments": len(answers),
        "mode": mode,
        "latency_s": latency,
        "concurrency": concurrency,
        "calls": calls,
        "limit_s": limit,
        "wall_s": wall,
        "over_limit": wall / limit,
        "cpu_ms_per_call": 1000 * cpu / calls,
        "bound_by": "latency" if cpu < limit else "the client's processor time",
        "resumed_seconds": again,
    }


def main(
    judgments: Annotated[int, typer.Option(help="Answers to judge.")] = 2000,
    output: Annotated[Path, typer.Option(help="Where results go.")] = RESULTS,
) -> None:
    """Measure at the target's 50 ms, and at 500 ms, which is what hosted judges take."""
    runs = [
        measure(judgments, latency, 64, mode) for latency, mode in ((0.05, "label"), (0.05, "logprob"), (0.5, "label"), (0.5, "logprob"))
    ]
    for run in runs:
        typer.echo(json.dumps(run))
    result = {
        "targets": TARGETS,
        "runs": runs,
        "versions": versions(("openai", "emguard-plugin")),
        "python": platform.python_version(),
        "machine": f"{os.cpu_count()} processors, load average {os.getloadavg()[0]:.1f} at the end",
    }
    output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
