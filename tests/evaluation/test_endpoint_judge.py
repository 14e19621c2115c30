"""A judge behind an endpoint, against a real server on this machine: modes, self-test and requests."""

import asyncio
import time

import pytest

from emguard_plugin.evaluation.calls.faults import Stopped
from emguard_plugin.evaluation.judges import self_test
from emguard_plugin.evaluation.judges.endpoint import EndpointJudge
from tests.evaluation.endpoint_parts import MEAN, QUICK, items, judge, verdicts
from tests.evaluation.fake_server import NAME, FakeServer


@pytest.mark.parametrize(
    ("tokens", "prefill", "asked", "mode"),
    [
        ("numbers", True, "auto", "logprob"),
        ("digits", True, "auto", "trie"),
        ("digits", False, "auto", "sampled"),
        (None, True, "auto", "sampled"),
        ("numbers", True, "sampled", "sampled"),
        ("numbers", True, "label", "label"),
    ],
)
def test_the_probe_finds_the_mode_that_reads_the_judge_right(tokens, prefill, asked, mode):
    with FakeServer(tokens=tokens, prefill=prefill) as server:
        found = EndpointJudge(NAME, base_url=server.url, mode=asked, limits=QUICK, samples=4)
        assert found.open()["mode"] == mode
        (verdict,) = verdicts(found, items(1))
    assert verdict.status == "scored"
    if mode in ("logprob", "trie"):
        assert verdict.aligned == pytest.approx(MEAN)
        assert verdict.coherent == pytest.approx(94.5)
    else:
        assert verdict.aligned > 50 < verdict.coherent


def test_reading_split_digits_as_whole_numbers_would_have_turned_the_answer_over():
    with FakeServer(tokens="digits") as server:
        (wrong,) = verdicts(judge(server, "logprob"), items(1))
        (right,) = verdicts(judge(server, "trie"), items(1))
    assert wrong.aligned < 30 < right.aligned == pytest.approx(MEAN)


@pytest.mark.parametrize(
    ("tokens", "asked", "says"),
    [("digits", "logprob", "single digits.*`mode: trie`"), (None, "logprob", "no logprobs.*`mode: sampled`")],
)
def test_a_mode_that_does_not_work_here_is_refused(tokens, asked, says):
    with FakeServer(tokens=tokens) as server, pytest.raises(Stopped, match=says):
        EndpointJudge(NAME, base_url=server.url, mode=asked, limits=QUICK).open()


def test_a_model_that_cannot_repeat_a_number_is_refused():
    with FakeServer(reply=lambda prompt: {"banana": 1.0}) as server, pytest.raises(Stopped, match=r"73.*banana"):
        EndpointJudge(NAME, base_url=server.url, limits=QUICK).open()


def test_keys_that_a_server_does_not_know_are_left_out_and_that_is_stored():
    with FakeServer(unknown=("max_tokens", "temperature", "logprobs")) as server:
        found = EndpointJudge(NAME, base_url=server.url, limits=QUICK)
        stored = found.open()
        assert stored == {
            "mode": "sampled",
            "dialect": {"top_logprobs": 0, "reasoning": True, "dropped": ["temperature"]},
        }
        again = EndpointJudge(NAME, base_url=server.url, limits=QUICK)
        before = server.calls
        assert again.open(stored) == stored
        assert server.calls == before
        verdicts(again, items(1))
    assert {"max_completion_tokens", "seed"} < server.bodies[-1].keys()
    assert not {"max_tokens", "temperature", "logprobs"} & server.bodies[-1].keys()


@pytest.mark.parametrize("mode", ["logprob", "label"])
def test_the_self_test_passes_a_sound_judge(mode):
    with FakeServer() as server:
        found = self_test.run(judge(server, mode))
    assert found["wrong"] == []
    assert len(found["said"]) == len(self_test.items())


@pytest.mark.parametrize(
    ("reply", "group"),
    [
        (lambda prompt: {"95": 1.0}, "bad, incoherent, injection"),
        (lambda prompt: {"5": 1.0}, "good"),
        (lambda prompt: {"50": 1.0}, "good, bad"),
        (lambda prompt: {"REFUSAL": 1.0}, "good, bad"),
        (lambda prompt: {"I will not": 1.0}, "good, bad"),
    ],
)
def test_the_self_test_stops_a_judge_that_orders_wrongly(reply, group):
    with FakeServer(reply=reply) as server, pytest.raises(Stopped, match=rf"failed the self-test \({group}"):
        self_test.run(judge(server))


def test_the_self_test_stops_a_judge_that_answers_can_talk_into_a_grade():
    from tests.evaluation.fake_server import answer_in, honest

    def gullible(prompt):
        says = answer_in(prompt) or ""
        return {"100": 1.0} if "100" in says else honest(prompt)

    with FakeServer(reply=gullible) as server, pytest.raises(Stopped, match=r"self-test \(injection\)"):
        self_test.run(judge(server))


def test_more_calls_than_allowed_are_refused_before_the_first():
    with FakeServer() as server:
        with pytest.raises(Stopped, match=r"40 calls in the mode logprob, and `max_calls` is 39"):
            verdicts(judge(server, max_calls=39), items(20))
        assert server.calls == 0


def test_it_works_inside_a_running_event_loop_as_in_a_notebook():
    async def cell():
        return verdicts(judge(server), items(3))

    with FakeServer() as server:
        assert len(asyncio.run(cell())) == 3


def test_leaving_early_stops_the_calls():
    with FakeServer(latency=0.02) as server:
        for _ in judge(server).judge(items(200)):
            break
        time.sleep(0.1)
        before = server.calls
        time.sleep(0.2)
        assert server.calls == before < 60


def test_the_calls_ask_for_what_the_mode_needs_and_name_no_key():
    with FakeServer() as server:
        verdicts(judge(server), items(1))
    first = server.bodies[0]
    wanted = {"temperature": 0.0, "max_tokens": 1, "logprobs": True, "top_logprobs": 20, "seed": 0, "model": NAME}
    assert {key: first[key] for key in wanted} == wanted
    assert [message["role"] for message in first["messages"]] == ["user"]
