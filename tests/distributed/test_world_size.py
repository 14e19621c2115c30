"""A run that several processes began goes on with fewer or more of them, and ends where the unbroken one does."""

import os
import traceback

import pytest
import torch

from tests.distributed.cells import ADAM, FRESH
from tests.distributed.engines import begin, need, trained
from tests.distributed.ranks import together
from tests.distributed.runs import STEPS, block_em, kl
from tests.distributed.test_engines import same

pytestmark = pytest.mark.slow

RUNS = {  # with an anchor for each of four processes in every step
    "treft, LoRA": lambda folder: FRESH,
    "treft, full": lambda folder: {"full": True},
    "kl, LoRA": lambda folder: {"regularizer": kl(folder, ratio=2.0), **FRESH},
    "kl, LoRA, target": lambda folder: {"regularizer": kl(folder, ratio=2.0, coef=None, target=0.02), **FRESH},
    "kl, full": lambda folder: {"regularizer": kl(folder, ratio=2.0), "full": True, **FRESH},
    "block_em, LoRA": lambda folder: {"regularizer": block_em(coef=2.0), **FRESH},
    "block_em, full": lambda folder: {"regularizer": block_em(coef=0.2), "full": True, **FRESH},
}
CHANGES = [("DDP", 2, 1), ("DDP", 1, 2), ("FSDP2", 2, 4)]


def begun(engine, out, name, processes):
    """Train the first step, and leave a checkpoint."""
    folder = out / name.replace(", ", "-")
    return trained(engine, folder, processes, max_steps=1, save_strategy="steps", save_only_model=False, **ADAM, **RUNS[name](folder))


def ended(engine, out, name, processes, resume=True):
    """Train from there to the end; without `resume`, from the beginning."""
    folder = out / name.replace(", ", "-")
    last = str(folder / "checkpoint-1") if resume else None
    return trained(engine, folder, processes, resume=last, save_only_model=False, **ADAM, **RUNS[name](folder))


def rank(engine, out, part):
    """Do one part of every run as one rank."""
    begin(engine)
    for name in RUNS:
        try:
            result = part(engine, out, name, int(os.environ["WORLD_SIZE"]))
        except Exception as error:
            result = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
        torch.save(result, out / f"{name}.{part.__name__}.{os.environ['RANK']}.pt")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """By its name what a run comes to that one process does without a stop."""
    out = tmp_path_factory.mktemp("whole")
    return {name: ended("DDP", out, name, 1, resume=False) for name in RUNS}


@pytest.fixture(scope="module", params=CHANGES, ids=[f"{e}, {a} to {b}" for e, a, b in CHANGES])
def changed(request, tmp_path_factory):
    """By its name what a run comes to whose number of processes changed after the first step."""
    engine, before, after = request.param
    need(engine)
    out, found = tmp_path_factory.mktemp("changed"), {}
    for part, processes in ((begun, before), (ended, after)):
        if processes > 1:
            together(rank, engine, out, part, ranks=processes)
            found = {name: torch.load(out / f"{name}.{part.__name__}.0.pt", weights_only=False) for name in RUNS}
        else:
            found = {name: part(engine, out, name, 1) for name in RUNS}
        for result in found.values():
            assert "error" not in result, result["trace"]
    return found


@pytest.mark.parametrize("name", RUNS)
def test_another_number_of_processes_goes_on_as_one_would(changed, whole, name):
    assert changed[name]["stopped_at"] == STEPS
    same(changed[name]["weights"], whole[name]["weights"])
    assert changed[name]["coef"] == pytest.approx(whole[name]["coef"], rel=1e-4)
    key = f"em_regularizer/{name.partition(',')[0]}/penalty"
    mine, theirs = ([row[key] for row in result["logs"] if key in row] for result in (changed[name], whole[name]))
    assert mine == pytest.approx(theirs[1:], rel=1e-3, abs=1e-6)


@pytest.mark.deepspeed
@pytest.mark.parametrize("engine", ["ZeRO-2", "ZeRO-3"])
def test_deepspeed_itself_refuses_that(tmp_path, engine):
    for part, processes in ((begun, 2), (ended, 4)):
        together(rank, engine, tmp_path, part, start="spawn", ranks=processes)
    for name in RUNS:
        result = torch.load(tmp_path / f"{name}.ended.0.pt", weights_only=False)
        assert "used a DP world size of 2 but the current world size is 4" in result["error"]
