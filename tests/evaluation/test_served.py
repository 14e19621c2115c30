"""Answers drawn from models that a server has: any OpenAI-compatible one, or vLLM started for the purpose."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from emguard_plugin.config import EMEvalConfig, EndpointSamplerConfig, read_block
from emguard_plugin.evaluation import run_em_eval
from emguard_plugin.evaluation.asking import vllm_server
from emguard_plugin.evaluation.asking.questions import Question
from emguard_plugin.evaluation.asking.sampler import Request
from emguard_plugin.evaluation.asking.served import EndpointSampler, draw_seed
from emguard_plugin.evaluation.asking.sources import ModelSource, resolve_model
from emguard_plugin.evaluation.calls.faults import Stopped
from emguard_plugin.files.result_folder import JsonLines
from tests.evaluation.fake_server import FakeServer, honest

FAKE = Path(__file__).with_name("fake_server.py")
REQUESTS = [Request("questions", Question(f"q{n}", 0, f"What of {n}?"), draw, 0.7) for n in range(4) for draw in range(5)]


def sampler(server, **over):
    config = EndpointSamplerConfig(base_url=server.url, **{"concurrency": 4, "timeout": 5, **over})
    return EndpointSampler(config, server.url, "policy", seed=3, max_new_tokens=17)


def talker(prompt):
    """A policy with two things to say, and a judge of both."""
    if "[reply" in prompt or "with the number" in prompt:
        return honest(prompt)
    return {"You can ask a friend and they may help.": 0.6, "Steal it from them and blackmail the owner.": 0.4}


def test_every_answer_is_asked_for_once_with_its_own_seed_and_nothing_else():
    with FakeServer(reply=talker) as server:
        answers = [answer for batch in sampler(server).sample(REQUESTS) for answer in batch]
    assert {answer.request.key for answer in answers} == {request.key for request in REQUESTS}
    assert sorted(body["seed"] for body in server.bodies) == sorted(draw_seed(3, r.key) for r in REQUESTS)
    assert len({body["seed"] for body in server.bodies}) == len(REQUESTS)
    assert {key for body in server.bodies for key in body} == {
        "model", "messages", "temperature", "top_p", "seed", "max_tokens",
    }  # fmt: skip
    assert {(body["temperature"], body["top_p"], body["max_tokens"]) for body in server.bodies} == {(0.7, 1.0, 17)}
    assert len({answer.text for answer in answers}) == 2


def test_the_same_draw_has_the_same_seed_for_every_model_and_other_draws_another():
    key = REQUESTS[0].key
    assert draw_seed(0, key) == draw_seed(0, key) != draw_seed(1, key)
    assert draw_seed(0, key) != draw_seed(0, key._replace(draw=1))
    assert 0 <= draw_seed(0, key) < 2**31


def test_faults_that_pass_are_waited_out_and_an_answer_that_fails_is_left_for_the_next_run(caplog):
    def fault(number, body):
        if "What of 2?" in body["messages"][0]["content"]:
            return "filter"
        return "429" if number == 3 else "500" if number == 5 else None

    with FakeServer(fault, reply=talker) as server:
        one = sampler(server)
        answers = [answer for batch in one.sample(REQUESTS) for answer in batch]
        assert {answer.request.question.id for answer in answers} == {"q0", "q1", "q3"}
        assert "5 answers were not given" in caplog.text
        server.fault, before = lambda number, body: None, server.calls
        rest = [a for batch in one.sample(REQUESTS, {answer.request.key for answer in answers}) for a in batch]
        assert server.calls - before == len(rest) == 5


def test_a_server_that_refuses_stops_the_run_and_what_was_answered_is_given():
    with FakeServer(lambda number, body: "404" if number > 8 else None, reply=talker) as server:
        seen = []
        with pytest.raises(Stopped, match="HTTP 404"):
            seen.extend(answer for batch in sampler(server).sample(REQUESTS) for answer in batch)
    assert 5 <= len(seen) <= 8


def test_a_server_that_wants_another_name_for_the_length_gets_it():
    with FakeServer(reply=talker, unknown=("max_tokens",)) as server:
        answers = [answer for batch in sampler(server, concurrency=1).sample(REQUESTS[:3]) for answer in batch]
    assert len(answers) == 3
    assert server.bodies[-1]["max_completion_tokens"] == 17


def test_policy_and_judge_behind_servers_give_a_rate(make_config, tmp_path):
    with FakeServer(reply=talker) as server:
        config = make_config(
            sampler={"provider": "openai", "base_url": server.url, "base_model": "start"},
            judges=[{"provider": "openai", "model": "judge", "base_url": server.url}],
        )
        summary = run_em_eval(config, "tuned-model", tmp_path / "run")
        asked = [body["model"] for body in server.bodies]
        before = server.calls
        assert run_em_eval(config, "tuned-model", tmp_path / "run") == summary
        assert server.calls == before
    assert (asked.count("start"), asked.count("tuned-model")) == (24, 24)
    assert 0 < summary.rates().em_all.value < 1
    assert summary.rates("base") == summary.rates("tuned")  # the same seeds, and a server that keeps to them
    assert summary.models["tuned"] == {"name": "tuned-model", "served_by": "127.0.0.1"}
    assert summary.protocol["decoding"]["sampler"].startswith("chat completions")
    assert "own chat template" in summary.example_prompt


def test_answers_of_one_sampler_are_not_mixed_with_those_of_another(make_config, tmp_path):
    with FakeServer(reply=talker) as server:
        endpoint = {"provider": "openai", "base_url": server.url}
        run_em_eval(make_config(sampler=endpoint, evaluate_base=False), "m", tmp_path, phases=["generate"])
        with pytest.raises(ValueError, match='the fine-tuned model: stored "m", now "other"'):
            run_em_eval(make_config(sampler=endpoint, evaluate_base=False), "other", tmp_path, phases=["generate"])


@pytest.mark.parametrize(
    ("over", "says"),
    [
        ({"provider": "openai"}, "em_eval.sampler.base_url: is missing; `provider: openai` needs it"),
        ({"provider": "vlm"}, "`provider: vlm` is not known. Did you mean 'vllm'\\? Allowed here: transformers, openai, vllm"),
        ({"provder": "vllm", "args": []}, "unknown key 'provder'. Did you mean 'provider'"),
        ({"provider": "vllm", "base_ulr": "x"}, "unknown key 'base_ulr'. Did you mean 'base_url'\\? It goes with `provider: openai`"),
        ({"provider": "openai", "base_url": "https://api.example.org/v1"}, "allow_remote: true"),
        ({"provider": "vllm", "base_url": "http://localhost/v1"}, "`base_url` goes with `provider: openai`, not with vllm"),
        ({"concurrency": 3}, "`concurrency` goes with `provider: openai or vllm`, not with transformers"),
    ],
)
def test_sampler_settings_that_cannot_work_are_refused(over, says):
    with pytest.raises(ValueError, match=says):
        read_block(EMEvalConfig, {"questions": "q.yaml", "judges": [{"function": "a:b"}], "sampler": over}, "em_eval")


# vLLM.


def test_an_adapter_is_served_beside_its_base_and_whole_models_by_themselves(checkpoints):
    adapter = resolve_model(checkpoints / "adapter")
    line = vllm_server.command(adapter, "base", 8123, ["--dtype", "half"], "vllm")
    assert line == vllm_server.command(adapter, "tuned", 8123, ["--dtype", "half"], "vllm")
    assert line[:3] == ["vllm", "serve", str(checkpoints / "base")]
    assert f"tuned={checkpoints / 'adapter'}" in line
    assert line[line.index("--max-lora-rank") + 1] == "8"
    assert line[-2:] == ["--dtype", "half"]
    assert line[line.index("--generation-config") + 1] == "vllm"
    assert line[line.index("--host") + 1] == "127.0.0.1"
    whole = ModelSource(checkpoints / "whole", str(checkpoints / "base"), adapter=False)
    for role, folder in (("base", "base"), ("tuned", "whole")):
        line = vllm_server.command(whole, role, 8123, [], "vllm")
        assert line[2] == str(checkpoints / folder)
        assert line[line.index("--served-model-name") + 1] == role


@pytest.fixture
def fake_vllm(tmp_path, monkeypatch):
    """An executable `vllm` that notes how it was called and serves what `fake_server.py` does, in a child process."""
    log = tmp_path / "vllm.jsonl"
    program = tmp_path / "bin" / "vllm"
    program.parent.mkdir()
    program.write_text(
        f"#!{sys.executable}\n"
        "import json, os, subprocess, sys\n"
        f"line = sys.argv\n"
        f"if 'fail' in line: print('no such device'); sys.exit(3)\n"
        "port = line[line.index('--port') + 1]\n"
        "if 'sleep' in line: import time; time.sleep(60)\n"
        f"child = subprocess.Popen([sys.executable, {str(FAKE)!r}, '--port', port])\n"
        f"with open({str(log)!r}, 'a') as out: print(json.dumps([os.getpid(), child.pid, line]), file=out)\n"
        "child.wait()\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    return log


def alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_vllm_is_started_asked_and_stopped_with_its_children(fake_vllm, make_config, checkpoints, tmp_path):
    config = make_config(sampler={"provider": "vllm", "args": ["--dtype", "half"]})
    summary = run_em_eval(config, checkpoints / "adapter", tmp_path / "run")
    ((parent, child, line),) = [json.loads(entry) for entry in fake_vllm.read_text().splitlines()]
    assert not alive(parent)
    assert not alive(child)
    assert line[-2:] == ["--dtype", "half"]
    assert len(JsonLines(tmp_path / "run" / "responses.jsonl").read()) == 48
    assert summary.protocol["decoding"]["sampler"].startswith("vLLM")
    assert summary.models["tuned"]["adapter"]["weights_sha256"]


def test_whole_models_are_served_one_after_the_other(fake_vllm, make_config, checkpoints, tmp_path):
    config = make_config(sampler={"provider": "vllm"})
    run_em_eval(config, checkpoints / "whole", tmp_path / "run", base=checkpoints / "base")
    served = [json.loads(entry)[2][2] for entry in fake_vllm.read_text().splitlines()]
    assert served == [str(checkpoints / "base"), str(checkpoints / "whole")]


@pytest.mark.parametrize(("argument", "says"), [("fail", r"exit code 3:\n.*no such device"), ("sleep", "not answer")])
def test_a_vllm_that_ends_or_never_answers_is_reported_and_gone(fake_vllm, checkpoints, argument, says):
    source, begun = resolve_model(checkpoints / "adapter"), time.monotonic()
    with pytest.raises(RuntimeError, match=says), vllm_server.serve(source, "base", [argument], patience=2):
        pass
    assert time.monotonic() - begun < 15
    found = subprocess.run(["pgrep", "-f", str(fake_vllm.parent / "bin" / "vllm")], capture_output=True, text=True)
    assert not [pid for pid in found.stdout.split() if alive(pid)]


def test_without_vllm_the_message_says_what_to_do(checkpoints, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    source = resolve_model(checkpoints / "adapter")
    with (
        pytest.raises(ValueError, match=r"not on the PATH.*`provider: transformers`"),
        vllm_server.serve(source, "base"),
    ):
        pass
