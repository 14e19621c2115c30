"""A judge behind an endpoint, against a real server on this machine that fails in every way that servers do."""

import time
from itertools import pairwise

import pytest

from emguard_plugin.evaluation.calls.faults import Stopped
from emguard_plugin.evaluation.calls.pressure import Limits
from emguard_plugin.evaluation.judges.endpoint import EndpointJudge
from tests.evaluation.endpoint_parts import MEAN, QUICK, after, items, judge, once_each, only_for, verdicts
from tests.evaluation.fake_server import NAME, FakeServer


# Faults that pass: each call fails once, and all answers are scored in the end.
@pytest.mark.parametrize(
    "name", ["429", "429 date", "429 bare", "500", "reset", "truncate", "html", "not json", "no choices", "no logprobs"]
)
def test_a_fault_that_passes_costs_time_and_nothing_else(name):
    with FakeServer(once_each(name)) as server:
        found = verdicts(judge(server), items(20))
    assert [verdict.status for verdict in found] == ["scored"] * 20
    assert all(verdict.aligned == pytest.approx(MEAN) for verdict in found)
    assert server.calls <= 110


def test_a_call_that_hangs_is_given_up_and_tried_again():
    with FakeServer(once_each("hang")) as server:
        found = verdicts(judge(server, limits=Limits(8, timeout=0.15, backoff=0.02, probes=(0.05, 0.1))), items(4))
    assert [verdict.status for verdict in found] == ["scored"] * 4


@pytest.mark.parametrize("name", ["500", "reset", "no logprobs", "html"])
def test_one_prompt_that_always_fails_is_unscored_and_the_others_are_scored(name):
    with FakeServer(only_for(name, "What of 3?")) as server:
        found = verdicts(judge(server), items(20))
    assert [n for n, verdict in enumerate(found) if verdict.status == "unscored"] == [3]
    assert found[3].aligned is None
    assert "5 tries failed" in found[3].detail


@pytest.mark.parametrize(
    ("name", "status", "says"),
    [
        ("filter", "judge_refused", "content filter"),
        ("filter 400", "judge_refused", "content filter"),
        ("refuse", "judge_refused", "declined"),
        ("garbage", "judge_refused", "on numbers"),
    ],
)
def test_what_the_judge_will_not_grade_is_unscored_for_good_and_never_aligned(name, status, says):
    with FakeServer(only_for(name, "What of 1?")) as server:
        found = verdicts(judge(server), items(3))
    assert [verdict.status for verdict in found] == ["scored", status, "scored"]
    assert found[1].aligned is None
    assert says in found[1].detail


@pytest.mark.parametrize("mode", ["sampled", "label"])
def test_a_reply_that_cannot_be_read_gets_one_more_try_and_no_number_is_picked_out_of_it(mode):
    with FakeServer(after(0, "garbage")) as server:
        (found,) = verdicts(judge(server, mode), items(1))
    assert (found.status, found.aligned, found.coherent) == ("malformed", None, None)
    assert server.calls == (2 if mode == "label" else 2 * 2 * 5)


def test_an_answer_that_is_too_long_is_judged_without_its_middle_and_that_is_noted():
    def fault(number, body):
        return "context" if len(body["messages"][0]["content"]) > 7500 else None

    long = "You can ask a friend and they may help. " * 250
    with FakeServer(fault) as server:
        (found,) = verdicts(judge(server), items(1, long))
        assert found.status == "scored"
        assert "without its middle" in found.detail
        (hopeless,) = verdicts(judge(FakeServer(port=server.port)), items(1, long * 3))
    assert hopeless.status == "malformed"
    assert "too long" in hopeless.detail


# Faults that do not pass.
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("401", "HTTP 401.*api_key_env"),
        ("404", "HTTP 404.*Check `model` and `base_url`"),
        ("quota", "no quota left"),
        ("other model", "asked for the model fake-judge, and another-model answered"),
        ("redirect", "redirects to http://example.org.*not followed"),
        ("other 400", "does not accept the request"),
    ],
)
def test_what_no_try_can_mend_stops_the_judge_at_once_and_keeps_what_was_judged(name, says):
    with FakeServer(after(40, name)) as server:
        seen, begun = [], time.perf_counter()
        with pytest.raises(Stopped, match=says):
            seen.extend(judge(server).judge(items(200)))
    assert time.perf_counter() - begun < 3
    assert 10 <= len(seen) <= 20
    assert all(verdict.status == "scored" for _, verdict in seen)
    assert server.calls <= 40 + 2 * QUICK.concurrency


@pytest.mark.parametrize("name", ["500", "reset", "html", "no logprobs"])
def test_a_server_that_dies_mid_run_stops_the_judge_within_seconds(name):
    with FakeServer(after(60, name)) as server:
        seen, begun = [], time.perf_counter()
        with pytest.raises(Stopped, match="the server is down"):
            seen.extend(judge(server).judge(items(300)))
    assert time.perf_counter() - begun < 5
    assert 20 <= len(seen) <= 30
    # One window of failures, calls in flight, and three test calls; not five tries for each of the 270 others.
    assert server.calls < 60 + QUICK.window + 2 * QUICK.concurrency + 3


def test_a_server_that_comes_back_is_used_again():
    with FakeServer(lambda number, body: "500" if 40 < number < 60 else None) as server:
        found = verdicts(judge(server), items(60))
    assert [verdict.status for verdict in found] == ["scored"] * 60


def test_nobody_listening_is_found_out_at_once():
    with FakeServer() as server:
        pass
    with pytest.raises(Stopped, match="does not answer"):
        EndpointJudge(NAME, base_url=server.url, limits=QUICK).open()


def test_a_server_that_only_ever_says_wait_is_given_up():
    with FakeServer(after(0, "429 date")) as server, pytest.raises(Stopped, match="rate-limited 10 times in a row"):
        verdicts(judge(server), items(30))


def test_one_rate_limit_makes_all_calls_wait_and_halves_them():
    arrivals = []

    def fault(number, body):
        arrivals.append((time.perf_counter(), server.running))
        return "429 slow" if number == 25 else None

    with FakeServer(fault, latency=0.01) as server:
        verdicts(judge(server), items(40))
    gaps = [later[0] - earlier[0] for earlier, later in pairwise(arrivals)]
    pause = max(range(24, len(gaps)), key=gaps.__getitem__)  # a busy machine may stand still before as well
    # Calls in flight when the server said so still arrive; then nobody for the 0.4 s it asked for, and half as many.
    assert pause <= 24 + QUICK.concurrency
    assert gaps[pause] > 0.3
    assert max(running for _, running in arrivals[:pause]) == QUICK.concurrency
    assert max(running for _, running in arrivals[pause + 1 : pause + 5]) <= QUICK.concurrency / 2


def test_the_deadline_ends_judging_and_keeps_what_was_judged():
    limits = Limits(concurrency=2, timeout=5, deadline=0.6)
    with FakeServer(latency=0.1) as server:
        seen = []
        with pytest.raises(Stopped, match=r"not done after 0\.6 s.*`deadline`"):
            seen.extend(judge(server, limits=limits).judge(items(50)))
    assert 2 <= len(seen) <= 8


def test_no_more_calls_run_at_once_than_allowed():
    with FakeServer(latency=0.02) as server:
        verdicts(judge(server, limits=Limits(concurrency=6)), items(40))
    assert server.most == 6
