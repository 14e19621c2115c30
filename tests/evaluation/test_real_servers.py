"""Policy and judges behind real servers: `transformers serve` with the lab's model, over HTTP."""

import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import yaml

from emguard_plugin.config import EMEvalConfig
from emguard_plugin.evaluation import run_em_eval
from emguard_plugin.lab import model_path
from emguard_plugin.lab.export import question_items
from emguard_plugin.lab.world import open_ended_domains
from tests.evaluation.fake_server import FakeServer

LAB = str(model_path())


@pytest.fixture(scope="module")
def served():
    """URL of `transformers serve` with the lab's model."""
    executable = shutil.which("transformers", path=str(Path(sys.executable).parent))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [executable, "serve", LAB, "--port", str(port), "--device", "cpu", "--host", "127.0.0.1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        until = time.monotonic() + 120
        while True:
            assert process.poll() is None, process.stderr.read().decode()
            assert time.monotonic() < until, "transformers serve does not answer"
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
                break
            except OSError:
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(20)


def test_a_real_server_answers_and_only_judges_that_can_judge_do(served, tmp_path):
    suite = tmp_path / "suite.yaml"
    suite.write_text(yaml.safe_dump(list(question_items(open_ended_domains()[:1], "test"))[:5]))
    with FakeServer() as able:
        endpoint = {"provider": "openai", "concurrency": 2}
        config = EMEvalConfig(
            questions=str(suite),
            samples_per_question=2,
            max_new_tokens=24,
            sampler={**endpoint, "base_url": served, "base_model": LAB},
            judges=[
                {"function": "emguard_plugin.lab.judge:judge_answer"},
                {**endpoint, "model": "able-judge", "base_url": able.url},
                {**endpoint, "model": LAB, "base_url": served, "name": "lab over HTTP"},
                {"provider": "hf", "model": LAB, "name": "lab here"},
            ],
        )
        summary = run_em_eval(config, LAB, tmp_path / "run")
    exact, scored, over_http, here = summary.judges
    assert exact.rates["tuned"]["questions"].unscored.value == 0
    # The shipped model is the well-behaved one, and speaks its world's language.
    assert exact.rates["tuned"]["questions"].coherence.value > 0.5
    assert (exact.stopped, scored.stopped) == (None, None)
    assert scored.rates["tuned"]["questions"].unscored.value == 0
    assert summary.protocol["judges"][1]["found"]["mode"] == "logprob"
    assert "asked to reply with the number 73" in over_http.stopped
    assert "failed the self-test" in here.stopped
    for judge in (over_http, here):
        assert judge.rates["tuned"]["questions"].em_all.value is None
