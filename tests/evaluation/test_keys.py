"""Keys reach the server and nothing else; what leaves the machine is asked for and announced."""

import logging
import re
import subprocess
import sys

import pytest

from emguard_plugin.config import EMEvalConfig
from tests.evaluation.fake_server import FakeServer
from tests.evaluation.judging_parts import (
    KEY,
    endpoint,
    graded,
    judging_judges,
)


def scan(folder, *texts):
    for file in folder.rglob("*"):
        if file.is_file():
            assert KEY.encode() not in file.read_bytes(), file
    for text in texts:
        assert KEY not in text


@pytest.mark.parametrize("fault", [None, "401", "500"])
def test_the_key_reaches_the_server_and_neither_files_nor_logs(evaluate, answered, monkeypatch, caplog, capfd, fault):
    monkeypatch.setenv("MY_JUDGE_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    for name in ("openai", "httpx", "httpx2", "httpcore", "httpcore2", "emguard_plugin"):
        caplog.set_level(logging.DEBUG, logger=name)

    def echoing(number, body):
        return fault if fault and number > 60 else None

    def leaky(prompt):
        return {KEY: 1.0} if "[reply" in prompt and "self-test" not in prompt and "[end of reply" not in prompt else graded(prompt)

    with FakeServer(echoing, reply=leaky) as server:
        summary = evaluate(endpoint(server, api_key_env="MY_JUDGE_KEY", deadline=4, timeout=2))
        assert all(headers["authorization"] == f"Bearer {KEY}" for headers in server.headers)
    if fault == "401":
        assert "MY_JUDGE_KEY" in summary.judges[0].stopped
        assert "Incorrect API key provided" in summary.judges[0].stopped
    out = capfd.readouterr()
    scan(answered, caplog.text, out.out, out.err, repr(summary))
    assert caplog.records


@pytest.mark.parametrize(
    "judge",
    [
        {"provider": "openai", "model": "m", "api_key": KEY},
        {"provider": "openai", "model": "m", "token": KEY},
        {"provider": "openai", "model": "m", "api_key_env": KEY},
        {"provider": "openai", "model": "m", "base_url": f"http://user:{KEY}@localhost/v1"},
        {"provider": "openai", "model": "m", "base_url": f"http://localhost/v1?api-key={KEY}"},
        {"provider": "opnai", "model": "m", "API_KEY": KEY, "concurrency": "x"},
    ],
)
def test_a_key_in_the_file_is_an_error_that_does_not_repeat_it(judge):
    with pytest.raises(Exception, match=r"leaked|must not") as caught:
        EMEvalConfig(questions="q.yaml", judges=[judge])
    assert KEY not in str(caught.value)


def test_a_key_in_the_file_is_not_repeated_by_the_command_either(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(f"em_eval:\n  questions: q.yaml\n  judges:\n    - {{provider: openai, model: m, api_key: {KEY}}}\n")
    command = [sys.executable, "-m", "emguard_plugin.cli", "eval", str(tmp_path), "--config", str(file)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 4
    assert "api_key_env" in done.stderr
    assert KEY not in done.stderr + done.stdout
    assert "Traceback" not in done.stderr


def test_a_variable_that_is_not_set_is_named(monkeypatch):
    monkeypatch.delenv("MY_JUDGE_KEY", raising=False)
    judge = {"provider": "openai", "model": "m", "base_url": "http://localhost:1/v1", "api_key_env": "MY_JUDGE_KEY"}
    with pytest.raises(ValueError, match="MY_JUDGE_KEY is not set"):
        judging_judges(EMEvalConfig(questions="q.yaml", judges=[judge]))


@pytest.mark.parametrize(
    ("over", "says"),
    [
        ({}, r"api.openai.com.*`allow_remote: true`"),
        ({"base_url": "https://10.0.0.7/v1"}, r"10.0.0.7.*`allow_remote: true`"),
        ({"base_url": "http://localhost.evil.org/v1"}, r"localhost.evil.org.*`allow_remote: true`"),
        ({"base_url": "http://judge.org/v1", "allow_remote": True, "api_key_env": "K"}, "unencrypted"),
        ({"base_url": "judge.org/v1"}, "is no URL"),
        ({"function": "a:b"}, r"`function` goes with `provider: exact`"),
        ({"provider": "hf", "base_url": "http://localhost/v1"}, r"`base_url` goes with `provider: openai`"),
        ({"provider": "replay"}, "`model` goes with `provider: openai or hf`, not with replay"),
        ({"provider": "opnai"}, "`provider: opnai` is not known. Did you mean 'openai'"),
    ],
)
def test_settings_that_cannot_work_are_refused(over, says):
    with pytest.raises(ValueError, match=says):
        EMEvalConfig(questions="q.yaml", judges=[{"provider": "openai", "model": "m", **over}])


def test_answers_that_leave_the_machine_are_announced_with_the_host(caplog):
    from emguard_plugin.evaluation.judges.endpoint import EndpointJudge

    judge = EndpointJudge("m", base_url="https://judge.example.org/v1")
    judge.open({"mode": "label", "dialect": {"top_logprobs": 0, "reasoning": False, "dropped": []}})
    assert "sent to judge.example.org" in caplog.text


def test_without_the_openai_package_the_message_says_what_to_install(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("questions: open_ended\njudges:\n  - {provider: openai, model: m, base_url: 'http://localhost:1/v1'}\n")
    code = (
        "import sys; sys.modules['openai'] = None\n"
        f"sys.argv = ['emguard', 'eval', {str(tmp_path)!r}, '--config', {str(file)!r}]\n"
        "from emguard_plugin.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 4
    assert re.search(r"needs the package `openai`.*pip install 'emguard-plugin\[judge\]'", done.stderr)
    assert "Traceback" not in done.stderr
