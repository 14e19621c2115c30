"""What two gloo processes agree on, beside the table of engines (`test_engines.py`)."""

import functools

import pytest
import torch

from tests.distributed import scenarios
from tests.distributed.engines import need
from tests.distributed.ranks import together
from tests.distributed.runs import STEPS
from tests.distributed.scenarios import LOADED, MEASURED, REFUSED, SCENARIOS, SHARDED
from tests.distributed.test_engines import same

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Results of every scenario on two processes: {name: [rank 0, rank 1]}."""
    out = tmp_path_factory.mktemp("two")
    together(scenarios.rank, out)
    return {n: [torch.load(out / f"{n}.{r}.pt", weights_only=False) for r in (0, 1)] for n in SCENARIOS}


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The same scenario on this process, run when first asked for."""
    out = tmp_path_factory.mktemp("one")
    return functools.cache(lambda name: SCENARIOS[name](out / name, 1))


def results(two, name):
    need("FSDP2" if "fsdp2" in name else "DDP")
    for rank in two[name]:
        assert "error" not in rank, rank["trace"]
    return two[name]


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


@pytest.mark.parametrize("name", LOADED)
def test_what_is_loaded_from_a_state_dict_in_one_file_is_whole(two, one, name):
    for rank in results(two, name):
        same(rank["weights"], one(name)["weights"])


@pytest.mark.parametrize("name", [n for n in LOADED if "best" in n])
def test_the_best_checkpoint_was_not_the_last(one, tmp_path, name):
    assert one(name)["best"].endswith("checkpoint-1")
    assert one(name)["stopped_at"] == STEPS
