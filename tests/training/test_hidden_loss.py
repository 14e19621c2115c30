"""A trainer whose own `compute_loss` goes around the mixin would train unguarded without a word."""

import pytest
import torch

from emguard_plugin import EMGuardSFTTrainer, KLCallback, TReFTCallback
from tests.trl_runs import build


class HidesTheMixin(EMGuardSFTTrainer):
    """As users write it: a loss of their own instead of the host's."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        out = model(**{name: inputs[name] for name in ("input_ids", "attention_mask", "labels")})
        return (out.loss, out) if return_outputs else out.loss


class AddsToIt(EMGuardSFTTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return 1.5 * super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)


class MeasuresInEvalMode(EMGuardSFTTrainer):
    """Without dropout, as some want it; the mixin takes it for an evaluation."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return super().compute_loss(model.eval(), inputs, num_items_in_batch=num_items_in_batch)


def test_a_loss_that_is_asked_for_in_eval_mode_is_no_quiet_way_around_it(tmp_path):
    trainer = build(tmp_path, callbacks=[TReFTCallback(coef=1.0)], cls=MeasuresInEvalMode, max_steps=2)
    with pytest.raises(RuntimeError, match="in optimizer step 1 no loss was asked"):
        trainer.train()


@pytest.mark.parametrize("callback", [lambda: TReFTCallback(coef=1.0), lambda: KLCallback(coef=0.0)], ids=["treft", "kl, coef 0"])
def test_a_loss_that_hides_the_penalty_stops_the_run_before_any_weight_changes(tmp_path, callback):
    trainer = build(tmp_path, callbacks=[callback()], cls=HidesTheMixin, max_steps=3, gradient_accumulation_steps=2)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    with pytest.raises(RuntimeError, match=r"in optimizer step 1 no loss was asked of `EMRegularizerMixin`.*super\(\)\.compute_loss"):
        trainer.train()
    assert all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())


def test_a_loss_that_adds_to_it_trains(tmp_path):
    trainer = build(tmp_path, callbacks=[TReFTCallback(coef=1.0)], cls=AddsToIt, max_steps=2)
    trainer.train()
    assert trainer.state.global_step == 2
