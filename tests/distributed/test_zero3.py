"""ZeRO-3, where DeepSpeed is installed (it is none of our dependencies): the cases zero3-head and zero3-fingerprint."""

import pytest
import torch

from tests.distributed import zero3
from tests.distributed.ranks import together

pytestmark = pytest.mark.deepspeed


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    out = tmp_path_factory.mktemp("zero3")
    together(zero3.rank, out, start="spawn", limit=200)
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
