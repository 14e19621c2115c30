"""What a method of one's own gets, one value at a time, and what becomes of a method with nothing to say."""

from collections import Counter

import pytest

from emguard_plugin import EMRegularizerCallback, KLCallback, Moment, Penalty, TReFTCallback
from emguard_plugin.chats import training_rows
from tests.regularizers.block_em_parts import block_em
from tests.regularizers.kl_parts import write_anchors
from tests.trl_runs import build, column, run, tiny, uneven_rows, weights


class Seldom(EMRegularizerCallback):
    """The size of the first trained weight, at some micro-batches alone."""

    name = "seldom"

    def __init__(self, when, coef=1.0):
        super().__init__(coef)
        self.when, self.moments = when, []

    def prepare(self, run):
        self.prepared = True
        return self.name

    def watch(self, moment):
        from contextlib import nullcontext

        return nullcontext(f"seen at {moment.step}, {moment.micro_batch}")

    def penalty(self, moment):
        assert isinstance(moment, Moment)
        self.moments.append(moment)
        if not self.when(moment):
            return None
        return Penalty(next(p for p in moment.model.parameters() if p.requires_grad).square().sum())


def test_a_method_that_measures_nothing_for_a_whole_log_has_a_coefficient_and_no_penalty(tmp_path):
    """It was a KeyError."""
    method = Seldom(lambda moment: moment.step == 2)
    logs = run(tmp_path, callbacks=[method], max_steps=4).state.log_history[:4]
    assert [row["em_regularizer/seldom/coef"] for row in logs] == [1.0] * 4
    assert ["em_regularizer/seldom/penalty" in row for row in logs] == [False, False, True, False]
    assert ["em_regularizer/seldom/weighted" in row for row in logs] == [False, False, True, False]
    assert all("task_loss" in row for row in logs)


def test_a_method_that_never_measures_changes_nothing(tmp_path):
    never = run(tmp_path / "never", callbacks=[Seldom(lambda moment: False)])
    none = run(tmp_path / "none", callbacks=[])
    assert all(bool((a == b).all()) for a, b in zip(weights(never).values(), weights(none).values(), strict=True))


def test_the_moment_of_each_micro_batch(tmp_path):
    method = Seldom(lambda moment: True, coef=0.0)
    trainer = build(
        tmp_path, callbacks=[method], rows=uneven_rows(24), per_device_train_batch_size=2, gradient_accumulation_steps=3, max_steps=2
    )
    trainer.train()
    found = [(m.step, m.micro_batch, m.micro_batches, m.seen) for m in method.moments]
    assert found == [(step, i, 3, f"seen at {step}, {i}") for step in (0, 1) for i in range(3)]
    supervised = [int((m.inputs["labels"][..., 1:] != -100).sum()) for m in method.moments]
    assert [float(m.tokens) for m in method.moments] == pytest.approx(
        [sum(s) / 3 for s in (supervised[:3], supervised[3:]) for _ in range(3)]
    )


def test_a_method_written_for_an_earlier_emguard_is_told_what_to_change():
    with pytest.raises(
        TypeError, match=r"Old\.penalty must take one argument besides `self`, the `Moment` .*`def penalty\(self, moment\)`"
    ):

        class Old(EMRegularizerCallback):
            name = "old"

            def penalty(self, model, inputs, step):
                return None

    with pytest.raises(TypeError, match=r"OldToo\.watch must take one argument"):

        class OldToo(EMRegularizerCallback):
            name = "old"

            def watch(self, model, inputs):
                return None


def test_the_training_set_is_walked_once_for_all_methods(tmp_path, monkeypatch):
    model = tiny()
    anchors = write_anchors(tmp_path / "anchors.jsonl")
    methods = [TReFTCallback(coef=1.0), block_em(model, tokens="prefix"), KLCallback(coef=1.0, anchors=anchors)]
    trainer = build(tmp_path / "run", model=model, callbacks=methods, max_steps=1)
    walks, spread = Counter(), training_rows.spread
    monkeypatch.setattr(
        training_rows, "spread", lambda data, limit=2000: walks.update([data is trainer.train_dataset]) or spread(data, limit)
    )
    trainer.train()
    assert walks[True] == 1
    assert walks[False] > 1, "the rows that were kept are read again"
    assert all(column(trainer, f"em_regularizer/{m.name}/penalty") for m in methods)


def test_a_method_that_never_measures_stops_the_run(tmp_path):
    """Having nothing to say at every step is being inactive, and is loud."""
    with pytest.raises(RuntimeError, match=r"em_regularizer\.seldom has held no token for 20 optimizer steps"):
        run(tmp_path, callbacks=[Seldom(lambda moment: False)], max_steps=21)


def test_a_method_with_a_state_that_it_cannot_write_is_refused_at_once():
    with pytest.raises(TypeError, match=r"Forgetful has a `state_file` and no `write_state`"):

        class Forgetful(EMRegularizerCallback):
            name, state_file = "forgetful", "forgetful.json"

            def read_state(self, path, run, own):
                return None, {}
