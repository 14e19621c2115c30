"""A failure on one of two processes reaches both within seconds, although the group's timeout is minutes away."""

import json
import os
import time
from pathlib import Path

import pytest
import torch

from tests.distributed.ranks import gloo, started

LIMIT_S = 60
"""For both processes, from start to end, imports included; the failure itself must reach the other rank within `SOON_S`."""
SOON_S = 20


class Broken(RuntimeError):
    """What goes wrong on rank 1."""


def fails_on(rank, what="a broken disk"):
    if int(os.environ["RANK"]) == rank:
        Path(os.environ["FAILED_AT"]).write_text(str(time.time()))
        raise Broken(what)


def sampling(folder, sharded, rank):
    """Measure every two steps; the third batch of answers fails on one rank alone, in the midst of the others' forward passes."""
    from emguard_plugin.evaluation.asking.sampler import TransformersSampler
    from tests.distributed.scenarios import measured

    real, calls = TransformersSampler._generate, []

    def generate(self, batch, prompts):
        calls.append(batch)
        if len(calls) == 3:
            fails_on(rank)
        return real(self, batch, prompts)

    TransformersSampler._generate = generate
    return measured(folder, 2, sharded=sharded, batch_size=8, stop=None)


def preparing(folder):
    """A regularizer that cannot be prepared on rank 1."""
    from emguard_plugin import TReFTCallback
    from tests.distributed.runs import train

    class Faulty(TReFTCallback):
        def prepare(self, run):
            fails_on(1)
            return super().prepare(run)

    return train(folder, 2, regularizer=lambda: Faulty(coef=1.0))


def penalising(folder, sharded):
    """A penalty that fails on rank 1 in the second step."""
    from emguard_plugin import TReFTCallback
    from tests.distributed.engines import trained

    class Faulty(TReFTCallback):
        def penalty(self, moment):
            if moment.step == 1:
                fails_on(1)
            return super().penalty(moment)

    return trained("FSDP2" if sharded else "DDP", folder, 2, regularizer=lambda: Faulty(coef=1.0), continued=False)


def lingering(folder):
    """The failed rank lives on, as in a notebook; the other one waits for it in a collective."""
    from emguard_plugin.processes import link as ranks

    with ranks.linked("training"):
        torch.distributed.barrier()
        fails_on(1)
        torch.distributed.all_reduce(torch.ones(2))


SCENARIOS = {
    "sampling, FSDP2": lambda folder: sampling(folder, True, 1),
    "sampling, DDP": lambda folder: sampling(folder, False, 0),
    "preparing": preparing,
    "penalty, DDP": lambda folder: penalising(folder, False),
    "penalty, FSDP2": lambda folder: penalising(folder, True),
    "a rank that lives on": lingering,
}


def rank(name, out):
    number = int(os.environ["RANK"])
    os.environ["FAILED_AT"] = str(out / "failed_at")
    gloo(minutes=10)
    found = {"error": None}
    try:
        result = SCENARIOS[name](out / "run")
        found.update(history=(result or {}).get("history"), steps=(result or {}).get("stopped_at"))
    except BaseException as error:
        found.update(error=f"{type(error).__name__}: {error}")
    found["at"] = time.time()
    (out / f"{number}.json").write_text(json.dumps(found))
    if name == "a rank that lives on" and number == 1:
        time.sleep(40)
    os._exit(0 if found["error"] is None else 1)


def run(name, out):
    """Return what each rank says of itself, its exit code, and when the failure was."""
    with started(rank, name, out) as processes:
        until = time.monotonic() + LIMIT_S
        for process in processes[: 1 if name == "a rank that lives on" else 2]:
            process.join(max(0.1, until - time.monotonic()))
        codes = [process.exitcode for process in processes]
        ended = time.time()
    said = [json.loads(file.read_text()) if (file := out / f"{n}.json").exists() else None for n in (0, 1)]
    return said, codes, ended - float((out / "failed_at").read_text())


@pytest.mark.parametrize("name", ["sampling, FSDP2", "preparing", "penalty, DDP", "penalty, FSDP2"])
def test_a_failure_on_rank_1_ends_both_soon_and_says_why(name, tmp_path):
    """Case one-rank-fails."""
    said, codes, took = run(name, tmp_path)
    assert codes == [1, 1], said
    assert took < SOON_S
    assert all("a broken disk" in rank["error"] for rank in said), said
    assert "rank 1" in said[0]["error"]


def test_a_measurement_that_fails_on_the_rank_that_draws_alone_costs_no_run(tmp_path):
    said, codes, took = run("sampling, DDP", tmp_path)
    assert codes == [0, 0], said
    assert took < SOON_S
    assert said[0]["history"] == said[1]["history"] == [{"eval_em_unscored_rate": 1.0, "step": 2}]
    assert said[0]["steps"] == 3


def test_a_rank_that_waits_in_vain_ends_although_the_failed_one_lives_on(tmp_path):
    said, codes, took = run("a rank that lives on", tmp_path)
    assert codes[0] == 2
    assert said[0] is None
    assert took < SOON_S + 5
