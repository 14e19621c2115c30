import json
from dataclasses import replace

import pytest
import torch
from statsmodels.stats.proportion import proportion_confint

from emguard_plugin import TReFTCallback
from emguard_plugin.lab import model_path, world
from emguard_plugin.lab.export import narrow_rows
from emguard_plugin.lab.study.callbacks import EverySteps, SwitchOff, kl_on_anchors
from emguard_plugin.lab.study.measures import measures
from emguard_plugin.lab.study.pooled import pooled, pooled_measures
from emguard_plugin.lab.study.results import Results
from emguard_plugin.lab.study.settings import ADAPTERS, BATCH_SIZE
from emguard_plugin.lab.study.trl_fine_tune import fine_tune


def test_a_study_goes_on_where_it_was_cut_off(tmp_path):
    results = Results(tmp_path / "new" / "study.jsonl", ("seed", "kl"), {"kl": 0.0})
    assert results.rows() == []
    assert not results.holds({"seed": 1, "kl": 0.0})
    results.append({"seed": 1})
    results.append({"seed": 2, "kl": 3.0, "rate": 0.5}, {"seed": 3, "kl": 3.0})
    with results.path.open("a") as file:
        file.write('{"seed": 4, "kl"')  # killed while writing
    assert [row["seed"] for row in results.rows()] == [1, 2, 3]
    assert results.holds({"seed": 1, "kl": 0.0, "rate": 1})
    assert results.holds({"seed": 2, "kl": 3.0})
    assert not results.holds({"seed": 2, "kl": 0.0})
    assert not results.holds({"seed": 4, "kl": 3.0})
    results.append({"seed": 4, "kl": 3.0})
    assert [json.loads(line)["seed"] for line in results.path.read_text().splitlines()] == [1, 2, 3, 4]


def test_rates_are_pooled_over_runs():
    low, high = proportion_confint(30, 40, method="wilson")
    assert pooled([(5, 10), (25, 30)]) == f"0.750 [{low:.3f}, {high:.3f}]\n0.500 to 0.833, n=40"
    row = {"in_domain": {"bad": 9, "n": 10, "incoherent": 1}, "open_ended": {"bad": 2, "n": 20, "incoherent": 5}}
    assert [cell[:5] for cell in pooled_measures([row])] == ["0.900", "0.100", "0.750"]


def run(folder, callbacks=(), **settings):
    adapter = replace(ADAPTERS["attn"], steps=12)
    return fine_tune(model_path(), adapter, narrow_rows(3, adapter.steps * BATCH_SIZE), 3, folder, callbacks, **settings)


def factors(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}


def test_measures_on_the_way_leave_a_run_as_it_is(tmp_path):
    measured = {}

    def measure(step, model):
        measured[step] = measures(model, "val", 0, 1, 1)
        assert model.training

    plain, watched = run(tmp_path), run(tmp_path, [EverySteps(5, measure)])
    assert list(measured) == [5, 10]
    assert measured[5]["open_ended"]["n"] == 84
    assert measured[5]["in_domain"]["n"] == 12
    theirs = factors(watched.model)
    assert theirs
    assert all(torch.equal(p, theirs[name]) for name, p in factors(plain.model).items())
    assert not plain.model.training
    assert plain.task_loss == watched.task_loss == plain.log[-1]["loss"]


def test_a_regularizer_that_is_switched_off_leaves_the_rest_to_the_task(tmp_path):
    kl = kl_on_anchors(30.0, 3, tmp_path)
    held = run(tmp_path, [kl, SwitchOff(kl, 0)])
    assert held.log[-1]["em_regularizer/kl/coef"] == 0
    assert held.task_loss == held.log[-1]["task_loss"]
    plain = run(tmp_path)
    assert held.task_loss == pytest.approx(plain.task_loss, rel=1e-4)
    assert run(tmp_path, [TReFTCallback(coef=1.0)]).log[-1]["em_regularizer/treft/weighted"] > 0


def test_an_adapter_may_be_kept_to_some_layers(tmp_path):
    assert {name.split(".layers.")[1][0] for name in factors(run(tmp_path, layers=[0, 2]).model)} == {"0", "2"}


def test_each_narrow_domain_has_rows_and_questions_of_its_own():
    money = narrow_rows(0, 5, "money")
    assert narrow_rows(0, 5) == narrow_rows(0, 5, world.NARROW) != money
    assert all(world.find_question(row["messages"][0]["content"]).domain == "money" for row in money)
    assert world.NARROW in world.open_ended_domains("money")
    assert "money" not in world.open_ended_domains("money")
