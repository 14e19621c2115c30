"""`EMGuardSFTTrainer`: a coefficient means the same everywhere, 0 means identical, and the logs add up."""

import itertools

import pytest
import torch
from datasets import Dataset
from trl import SFTTrainer

from emguard_plugin import EMGuardSFTTrainer, TReFTCallback
from tests.tiny import chat_rows
from tests.trl_runs import LOG, build, column, different, penalties, run, tiny, uneven_rows, weights

# A coefficient means the same everywhere


@pytest.mark.parametrize("tokens", ["prefix", "postfix"])  # the postfix has a penalty from step 1
def test_weights_do_not_depend_on_how_a_batch_is_split(tmp_path, tokens):
    """20 rows in batches of 6: the last optimizer step of an epoch accumulates fewer micro-batches."""

    def split(micro, accumulated, coef=1.0):
        over = {"optim": "sgd", "learning_rate": 0.1, "max_steps": 5, "max_grad_norm": 0.0}
        over |= {"per_device_train_batch_size": micro, "gradient_accumulation_steps": accumulated}
        model, treft = tiny(moved=0.02), TReFTCallback(coef=coef, tokens=tokens)
        return run(tmp_path, model=model, rows=uneven_rows(20), callbacks=[treft], **over)

    one, *others = (split(m, a) for m, a in ((6, 1), (3, 2), (2, 3)))
    assert sum(p > 0 for p in penalties(one)) == (4 if tokens == "prefix" else 5)
    for other in others:
        for name in (f"{LOG}/penalty", f"{LOG}/weighted", f"{LOG}/key_drift", "task_loss", "loss"):
            assert column(other, name) == pytest.approx(column(one, name), rel=2e-4, abs=1e-8), name
        for name, value in weights(other).items():
            torch.testing.assert_close(value, weights(one)[name], rtol=1e-3, atol=2e-6)
    free = weights(split(6, 1, coef=0.0))
    moved = max((free[n] - w).abs().max().item() for n, w in weights(one).items())
    assert moved > 1e-3, "the penalty must matter here"


def test_a_larger_coefficient_holds_more(tmp_path):
    over = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0, "max_steps": 4}
    last = [penalties(run(tmp_path, model=tiny(moved=0.02), coef=c, **over))[-1] for c in (0, 0.03, 0.1, 0.3)]
    assert all(a > b > 0 for a, b in itertools.pairwise(last)), last


# Off means identical


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_coef_0_and_no_callback_are_trls_own_run_bit_for_bit(tmp_path, kind):
    def go(cls=EMGuardSFTTrainer, **kwargs):
        model = tiny(adapter=kind == "lora", **({"lora_dropout": 0.2} if kind == "lora" else {}))
        over = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "train_sampling_strategy": "random"}
        return run(tmp_path, model=model, cls=cls, rows=uneven_rows(), max_steps=4, **over, **kwargs)

    host, bare, zero, guarded = go(SFTTrainer, callbacks=[]), go(callbacks=[]), go(coef=0.0), go(coef=1.0)
    for same in (bare, zero):
        assert different(weights(same), weights(host)) == []
        for name in ("loss", "grad_norm", "entropy", "mean_token_accuracy"):
            assert column(same, name) == column(host, name)
    assert max(penalties(zero)) > 0, "coef 0 measures"
    assert different(weights(guarded), weights(host))
    assert not [key for row in bare.state.log_history for key in row if "em_regularizer" in key or key == "task_loss"]


def test_eval_loss_is_the_task_loss(tmp_path):
    """A learning rate of nothing, so that only the penalty differs; a postfix has one at step 0."""
    rows = uneven_rows(8)
    over = {"eval_dataset": Dataset.from_list(rows), "eval_strategy": "steps", "eval_steps": 1, "learning_rate": 1e-30}
    host = run(tmp_path, cls=SFTTrainer, callbacks=[], rows=rows, **over)
    guarded = run(tmp_path, callbacks=[TReFTCallback(coef=1000, tokens="postfix")], rows=rows, **over)
    losses = [[row["eval_loss"] for row in t.state.log_history if "eval_loss" in row] for t in (host, guarded)]
    assert column(guarded, "loss")[0] > column(host, "loss")[0] + 1
    assert losses[0] == losses[1]
    assert len(losses[0]) == 3
    assert guarded.evaluate()["eval_loss"] == host.evaluate()["eval_loss"], "after training"
    assert build(tmp_path, eval_dataset=over["eval_dataset"]).evaluate()["eval_loss"] == losses[0][0], "and before it"


# The logs


def test_metrics_and_the_line_that_says_what_is_active(tmp_path, capsys):
    trainer = run(tmp_path)
    assert "em_regularizer active: treft (coef 5, prefix of 20 tokens, 3 of 3 layers)" in capsys.readouterr().out
    names = {"penalty", "coef", "weighted", "key_drift", "value_drift"}
    for row in trainer.state.log_history[:3]:
        assert {f"{LOG}/{n}" for n in names} | {"task_loss"} <= set(row)
    assert column(trainer, f"{LOG}/coef") == [5, 5, 5]
    assert penalties(trainer)[0] == 0.0, "exactly the model before this run"
    assert penalties(trainer)[1] > 0
    halves = zip(column(trainer, f"{LOG}/key_drift"), column(trainer, f"{LOG}/value_drift"), strict=True)
    assert [k + v for k, v in halves] == pytest.approx(penalties(trainer))


@pytest.mark.parametrize("logging_steps", [1, 2])
@pytest.mark.parametrize("accumulated", [1, 3])
def test_loss_is_task_loss_plus_what_the_penalty_adds(tmp_path, accumulated, logging_steps):
    over = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": accumulated, "max_steps": 5}
    trainer = run(tmp_path, rows=uneven_rows(22), coef=2.0, logging_steps=logging_steps, **over)
    tasks, weighted, losses = (column(trainer, n) for n in ("task_loss", f"{LOG}/weighted", "loss"))
    assert len(losses) == 5 // logging_steps
    assert min(weighted[1:]) > 0.1
    assert [t + w for t, w in zip(tasks, weighted, strict=True)] == pytest.approx(losses, rel=1e-4)


def test_logged_means_are_over_the_steps_since_the_last_log(tmp_path):
    each, pairs = (penalties(run(tmp_path, max_steps=4, logging_steps=n)) for n in (1, 2))
    assert pairs == pytest.approx([(each[0] + each[1]) / 2, (each[2] + each[3]) / 2])


def test_training_twice_starts_from_what_is_there(tmp_path):
    """The reference is the model before *this* run."""
    trainer = run(tmp_path)
    trainer.train()
    assert penalties(trainer)[0] == 0.0
    assert penalties(trainer)[1] > 0


# A regularizer that nobody would call


@pytest.mark.parametrize("used_before", [False, True])
def test_a_callback_under_plain_trl_is_refused(tmp_path, used_before):
    treft = TReFTCallback()
    if used_before:
        run(tmp_path, callbacks=[treft])
    with pytest.raises(RuntimeError, match=r"TReFTCallback does nothing under this trainer. Use `emguard_plugin.EMGuard"):
        run(tmp_path, cls=SFTTrainer, callbacks=[treft])


def test_one_method_twice_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"a method is registered twice: \['treft', 'treft'\]"):
        run(tmp_path, callbacks=[TReFTCallback(coef=1), TReFTCallback(coef=2)])


def test_a_class_instead_of_an_object_works_as_for_every_callback(tmp_path):
    assert column(run(tmp_path, callbacks=[TReFTCallback]), f"{LOG}/coef") == [5, 5, 5]


def test_rows_may_come_in_any_order(tmp_path):
    rows = chat_rows(24, system=lambda i: ("Be brief.", "Be a pirate.", None)[i % 3])
    trainer = run(tmp_path, rows=rows, train_sampling_strategy="random", max_steps=6)
    (treft,) = (c for c in trainer.callback_handler.callbacks if isinstance(c, TReFTCallback))
    assert len(treft._prefixes) == 3
    assert penalties(trainer)[0] == 0.0
    assert min(penalties(trainer)[1:]) > 0
