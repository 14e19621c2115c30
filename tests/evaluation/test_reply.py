"""What a server sends is read without trust (`logprob-not-a-number`), and never more of it than fits."""

import gzip
import math
import tracemalloc
import zlib

import pytest

from emguard_plugin.evaluation.calls import size
from emguard_plugin.evaluation.calls.chat import address
from emguard_plugin.evaluation.calls.faults import Failed
from emguard_plugin.evaluation.calls.reply import ABOVE_ONE, ABOVE_ZERO, first_tokens, read_reply


def entries(*pairs):
    return {"content": [{"token": "x", "top_logprobs": [{"token": t, "logprob": p} for t, p in pairs]}]}


def completion(*choices):
    return {"model": "m", "choices": list(choices)}


def choice(text, index=0, logprobs=None):
    return {"index": index, "message": {"role": "assistant", "content": text}, "finish_reason": "stop", "logprobs": logprobs}


@pytest.mark.parametrize(
    "value",
    [math.nan, math.inf, -math.inf, 0.5, 2 * ABOVE_ZERO, 7, 10**400, True, False, "NaN", "-0.1", None, [], {}],
    ids=lambda value: f"{value!r:.12}",
)
def test_a_logprob_that_is_none_is_a_failure_with_its_value(value):
    """Once `min(0.0, nan)` made 0.0 of it, which is certainty."""
    with pytest.raises(Failed, match="the logprob of '90' is"):
        first_tokens(entries(("5", -0.2), ("90", value)))


@pytest.mark.parametrize(
    ("value", "chance"), [(0, 1.0), (0.0, 1.0), (ABOVE_ZERO / 2, 1.0), (-9999.0, 0.0), (-(10**400), 0.0), (-1, math.exp(-1))]
)
def test_a_logprob_of_at_most_zero_is_a_probability(value, chance):
    assert first_tokens(entries(("90", value))) == {"90": pytest.approx(chance)}


def test_probabilities_may_sum_to_one_and_what_half_precision_adds_and_no_more():
    half = math.log(0.5)
    assert first_tokens(entries(("5", half), ("6", half))) == {"5": pytest.approx(0.5), "6": pytest.approx(0.5)}
    assert first_tokens(entries(("5", half), ("6", math.log(0.5 + 0.9 * ABOVE_ONE))))
    with pytest.raises(Failed, match=r"sum to 1\.02"):
        first_tokens(entries(("5", half), ("6", math.log(0.52))))
    assert first_tokens(entries(("5", half), ("5", half))) == {"5": pytest.approx(1.0)}, "two tokens of one spelling"


@pytest.mark.parametrize("logprobs", [None, {}, {"content": None}, {"content": []}, {"content": [{"top_logprobs": []}]}])
def test_no_logprobs_are_none(logprobs):
    assert first_tokens(logprobs) is None


def test_the_choice_is_the_one_that_was_asked_for():
    right, other = choice("90"), choice("5", 1)
    for choices in ([right], [right, other], [other, right], [{k: v for k, v in right.items() if k != "index"}]):
        assert read_reply(completion(*choices), False).text == "90"
    for choices in ([], [other], [right, choice("5")], [choice("90", "0")], [choice("90", True)], [None]):
        with pytest.raises(Failed, match="no chat completion"):
            read_reply(completion(*choices), False)


@pytest.mark.parametrize("content", [5, True, ["5"], {"text": "5"}])
def test_a_message_that_is_no_text_is_not_read_as_one(content):
    with pytest.raises(Failed, match="`content` is"):
        read_reply(completion(choice(content)), False)


def test_logprobs_that_nobody_asked_for_do_no_harm():
    broken = completion(choice("90", logprobs=entries(("90", "x"))))
    assert read_reply(broken, False).first is None
    with pytest.raises(Failed):
        read_reply(broken, True)


def test_packed_replies_are_unpacked_up_to_the_limit_whatever_they_hold():
    bomb = gzip.compress(b" " * (100 * 2**20))
    assert len(bomb) < 2**17
    tracemalloc.start()
    found = size._unpacked("gzip")(bomb, size.MOST_BYTES)
    assert len(found) == size.MOST_BYTES + 1, "one more than is allowed, so that it shows"
    assert tracemalloc.get_traced_memory()[1] < 4 * size.MOST_BYTES
    tracemalloc.stop()
    for coding, packed in (("gzip", gzip.compress(b"{}")), ("deflate", zlib.compress(b"{}")), ("deflate", zlib.compress(b"{}")[2:-4])):
        assert size._unpacked(coding)(packed, size.MOST_BYTES) == b"{}"
    with pytest.raises(size.ReplyError, match="not what its header says"):
        size._unpacked("gzip")(b"{}", 10)


def test_an_address_is_host_and_port_and_nothing_that_may_be_a_key():
    assert address("http://localhost:8000/v1/sk-secret") == "localhost:8000"
    assert address("https://api.example.org/v1") == "api.example.org:443"
    assert address("http://[::1]/v1") == "[::1]:80"
