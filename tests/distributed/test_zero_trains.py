"""ZeRO-2 and ZeRO-3 on two gloo processes train what one process trains: the cells of README's table of engines.

Where DeepSpeed is installed; it is none of our dependencies. `make zero` installs it for CPUs and runs these.
"""

import multiprocessing
import socket

import pytest
import torch

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: `make zero` does that, and runs the ZeRO tests")

from tests.distributed import zero

pytestmark = pytest.mark.slow

LIMIT_S = 400


@pytest.fixture(scope="module", params=[2, 3], ids=["ZeRO-2", "ZeRO-3"])
def two(request, tmp_path_factory):
    """The stage, and every cell on two processes: {name: [rank 0, rank 1]}."""
    out = tmp_path_factory.mktemp("zero")
    names = [*zero.CELLS, *zero.REFUSED]
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    ranks = [multiprocessing.get_context("spawn").Process(target=zero.rank, args=(r, 2, port, out, request.param, names)) for r in (0, 1)]
    for p in ranks:
        p.start()
    try:
        for p in ranks:
            p.join(LIMIT_S)
        assert [p.exitcode for p in ranks] == [0, 0]
    finally:
        for p in ranks:
            p.kill()
    return request.param, {n: [torch.load(out / f"{n}.{r}.pt", weights_only=False) for r in (0, 1)] for n in names}


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    out, known = tmp_path_factory.mktemp("one"), {}

    def get(name):
        if name not in known:
            known[name] = zero.CELLS[name](0, out / name.replace(", ", "-"), 1)
        return known[name]

    return get


def penalties(result):
    return [value for row in result["logs"] for name, value in row.items() if name.endswith("/penalty")]


@pytest.mark.parametrize("name", zero.CELLS)
def test_what_two_processes_train_is_what_one_does(two, one, name):
    stage, cells = two
    alone = one(name)
    for rank in cells[name]:
        assert "error" not in rank, rank.get("trace")
        assert rank["cut"] == (stage == 3)
        for n, w in alone["weights"].items():
            away = (rank["weights"][n.removeprefix("module.")] - w).abs().max() / w.abs().max().clamp_min(1e-3)
            assert away < 1e-4, n
    assert penalties(cells[name][0]) == pytest.approx(penalties(alone), rel=1e-3, abs=1e-7)
    assert penalties(alone)[-1] > 0


def test_checkpointing_under_zero_3_with_an_adapter_is_refused_with_what_to_change(two):
    stage, cells = two
    for rank in cells["kl, LoRA, checkpointing"]:
        if stage == 3:
            assert "ZeRO-3 with an adapter and gradient checkpointing forces reentrant checkpointing" in rank["error"]
        else:
            assert "error" not in rank, rank.get("trace")
