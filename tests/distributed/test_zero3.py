"""ZeRO-3, where DeepSpeed is installed (it is none of our dependencies): the cases zero3-head and zero3-fingerprint."""

import multiprocessing
import socket

import pytest
import torch

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed; ZeRO-3 is looked at where it is")

from tests.distributed import zero3


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    out = tmp_path_factory.mktemp("zero3")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    started = [multiprocessing.get_context("spawn").Process(target=zero3.rank, args=(r, 2, port, out)) for r in (0, 1)]
    for p in started:
        p.start()
    try:
        for p in started:
            p.join(200)
        assert [p.exitcode for p in started] == [0, 0]
    finally:
        for p in started:
            p.kill()
    return [torch.load(out / f"{r}.pt", weights_only=False) for r in (0, 1)]


def test_the_identity_of_a_model_in_parts_is_that_of_the_whole(ranks):
    for seen in ranks:
        assert seen["cut"]
        assert seen["identity"] == seen["identity of the whole"]


def test_the_head_is_found_and_the_fingerprint_of_latents_is_not_empty(ranks):
    for seen in ranks:
        assert seen["head"] == "Linear"
        assert len(seen["fingerprint"]) == len(seen["fingerprint of the whole"]) > 0
        assert seen["fingerprint"] == pytest.approx(seen["fingerprint of the whole"])
