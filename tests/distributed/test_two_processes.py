"""Two gloo processes on the CPU must train what one process trains at the same global batch."""

import multiprocessing
import socket
from pathlib import Path

import pytest
import torch

from emguard_plugin.reference.stored import load_reference
from tests.distributed import scenarios
from tests.distributed.scenarios import COEF, MEASURED, REFUSED, SCENARIOS, SHARDED, STEPS, TRAINED

pytestmark = pytest.mark.slow

LIMIT_S = 400  # about 30 s on two idle cores


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Results of every scenario on two processes: {name: [rank 0, rank 1]}."""
    out = tmp_path_factory.mktemp("two")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = multiprocessing.get_context("forkserver")  # imports TRL once for both ranks
    context.set_forkserver_preload(
        ["emguard_plugin.training.trl_trainer", "emguard_plugin.regularizers.treft.callback", "datasets", "peft"]
    )
    ranks = [context.Process(target=scenarios.rank, args=(r, 2, port, out)) for r in (0, 1)]
    for p in ranks:
        p.start()
    try:
        for p in ranks:
            p.join(LIMIT_S)
        assert [p.exitcode for p in ranks] == [0, 0]
    finally:
        for p in ranks:
            p.kill()
    return {n: [torch.load(out / f"{n}.{r}.pt", weights_only=False) for r in (0, 1)] for n in SCENARIOS}


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The same scenario on this process, run when first asked for."""
    out, known = tmp_path_factory.mktemp("one"), {}

    def get(name):
        if name not in known:
            known[name] = SCENARIOS[name](out / name, 1)
        return known[name]

    return get


def same(a, b, rtol=1e-4):
    assert a.keys() == b.keys()
    assert a
    for n in a:
        torch.testing.assert_close(a[n], b[n], rtol=rtol, atol=rtol * max(1e-3, b[n].abs().max().item()), msg=lambda m, n=n: f"{n}: {m}")


def results(two, name):
    for rank in two[name]:
        assert "error" not in rank, rank["trace"]
    return two[name]


@pytest.mark.parametrize("name", TRAINED)
def test_gradients_and_weights_are_those_of_one_process(two, one, name):
    first, second = results(two, name)
    alone = one(name)
    steps = STEPS - 1 if name == "resumed" else STEPS
    assert len(first["gradients"]) == len(alone["gradients"]) == steps
    for a, b, c in zip(first["gradients"], second["gradients"], alone["gradients"], strict=True):
        same(a, b, rtol=0)
        same(a, c)
    same(first["weights"], alone["weights"])
    assert first["sharded"] == name.startswith("fsdp2")
    assert first["prefixes"] == alone["prefixes"] == (2 if name == "two_prefixes" else 0 if "kl" in name or "block_em" in name else 1)
    assert first["coef"] == second["coef"] == pytest.approx(alone["coef"], rel=1e-4)


def test_the_penalty_matters_in_these_runs(one, tmp_path):
    from tests.distributed.scenarios import train

    unguarded = train(tmp_path, 1, coef=0.0)["weights"]
    with pytest.raises(AssertionError):
        same(one("lora")["weights"], unguarded)


def test_a_resumed_run_ends_where_the_unbroken_one_does(two):
    same(results(two, "resumed")[0]["weights"], results(two, "lora")[0]["weights"])


def test_accumulation_over_processes_changes_nothing(two):
    same(results(two, "accumulated")[0]["weights"], results(two, "lora")[0]["weights"])


@pytest.mark.parametrize("name", ["lora", "two_prefixes", "accumulated"])
def test_metrics_are_those_of_the_whole_batch(two, one, name):
    first, alone = results(two, name)[0], one(name)
    steps = [(a, b) for a, b in zip(first["logs"], alone["logs"], strict=True) if "task_loss" in b]
    assert len(steps) == STEPS
    for a, b in steps:
        for key in (
            "loss",
            "task_loss",
            *(f"em_regularizer/treft/{m}" for m in ("penalty", "weighted", "key_drift", "value_drift")),
        ):
            assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-6), key
        assert a["loss"] == pytest.approx(a["task_loss"] + COEF * a["em_regularizer/treft/penalty"], rel=1e-3)
    assert steps[-1][0]["em_regularizer/treft/penalty"] > 0


@pytest.mark.parametrize("name", [n for n in TRAINED if "block_em" in n])
def test_block_em_measures_the_whole_batch(two, one, name):
    first, alone = results(two, name)[0], one(name)
    steps = [(a, b) for a, b in zip(first["logs"], alone["logs"], strict=True) if "task_loss" in b]
    for a, b in steps:
        for key in ("loss", "task_loss", "em_regularizer/block_em/penalty"):
            assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-6), key
    assert steps[-1][0]["em_regularizer/block_em/penalty"] > 1e-4


def test_rank_0_alone_writes_the_reference(two, one):
    first, second = results(two, "lora")
    assert [Path(p).parent.name for p in first["saves"]] == [f"checkpoint-{i + 1}" for i in range(STEPS)]
    assert not second["saves"]
    mine, theirs = (load_reference(Path(r["saves"][-1]), {}) for r in (one("lora"), first))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[n], theirs[n]) for n in mine)


@pytest.mark.parametrize("name", REFUSED)
def test_reentrant_checkpointing_is_refused_on_several_processes(two, name):
    for rank in two[name]:
        assert "ValueError: reentrant gradient checkpointing on several processes" in rank["error"]
        assert "use_reentrant: false" in rank["error"]


def test_a_method_that_holds_nothing_anywhere_stops_all_ranks_together(two):
    for rank in two["held_nowhere"]:
        assert "RuntimeError: em_regularizer.holding has held no token for 20 optimizer steps" in rank["error"]
    assert [rank["steps"] for rank in two["held_on_rank_1"]] == [21, 21]


@pytest.mark.parametrize("name", SHARDED)
def test_fsdp2_gradients_are_those_of_one_process(two, one, name):
    first, second = results(two, name)
    alone = one(name)
    assert first["at_start"] == second["at_start"] == alone["at_start"] == 0.0
    assert first["penalty"] == second["penalty"] == pytest.approx(alone["penalty"], rel=1e-4)
    assert alone["penalty"] > 1e-3
    same(first["gradients"], alone["gradients"])


@pytest.mark.parametrize("name", MEASURED)
def test_rank_0_decides_on_the_em_rate_and_all_ranks_agree(two, one, name):
    first, second = results(two, name)
    assert first["history"] == second["history"] == one(name)["history"]
    assert [row["eval_em_rate"] for row in first["history"]] == [1.0]
    assert first["stopped_at"] == second["stopped_at"] == 2 < STEPS
    assert first["sharded"] == name.endswith("fsdp2")
    same(first["weights"], one(name)["weights"])
