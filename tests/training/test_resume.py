"""A run that was interrupted, one that diverges, and one that cannot write."""

import pytest
import torch
from safetensors import safe_open
from transformers import TrainerCallback

from emguard_plugin import TReFTCallback
from tests.trl_runs import LOG, REFERENCE, build, column, different, penalties, run, tiny, weights

KINDS = {
    "lora": ({"lora_dropout": 0.1}, {}),
    "pissa": ({"init_lora_weights": "pissa"}, {}),
    "full": ({"adapter": False}, {"learning_rate": 0.002}),
}
SAVED = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}


def reference_hash(folder):
    with safe_open(str(folder / REFERENCE), framework="pt") as f:
        return f.metadata()["sha256"]


@pytest.mark.parametrize(("kind", "tokens"), [("lora", "postfix"), ("pissa", "prefix"), ("full", "prefix"), ("full", "postfix")])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, kind, tokens):
    model, over = KINDS[kind]

    def go(name, resume=None):
        callbacks = [TReFTCallback(coef=5, tokens=tokens)]
        return run(tmp_path / name, resume, model=tiny(**model), callbacks=callbacks, **SAVED, **over)

    whole = go("whole")
    stored = tmp_path / "whole" / "checkpoint-2"
    resumed = go("resumed", str(stored))
    assert penalties(resumed) == penalties(whole), "the log history goes on"
    assert column(resumed, "loss") == column(whole, "loss")
    assert different(weights(resumed), weights(whole)) == []
    folders = [stored, tmp_path / "whole" / "checkpoint-4", tmp_path / "resumed" / "checkpoint-4"]
    assert len({reference_hash(f) for f in folders}) == 1
    fresh = run(tmp_path / "tuned", model=whole.model, callbacks=[TReFTCallback(tokens=tokens)], **SAVED, **over)
    assert reference_hash(tmp_path / "tuned" / "checkpoint-4") != reference_hash(stored), "the hash tells models apart"
    assert penalties(fresh)[0] != penalties(whole)[2]


def test_resume_true_takes_the_last_checkpoint(tmp_path):
    over = {**SAVED, "learning_rate": 0.002}
    whole = run(tmp_path / "whole", model=tiny(adapter=False), **over)
    run(tmp_path / "cut", model=tiny(adapter=False), **{**over, "max_steps": 2})
    resumed = run(tmp_path / "cut", True, model=tiny(adapter=False), **over)
    assert penalties(resumed) == penalties(whole)
    assert different(weights(resumed), weights(whole)) == []


@pytest.mark.parametrize("kind", ["pissa", "full"])
def test_without_the_reference_there_is_nothing_to_hold_to(tmp_path, kind):
    model, over = KINDS[kind]
    run(tmp_path, model=tiny(**model), **{**SAVED, **over, "max_steps": 2})
    checkpoint = tmp_path / "checkpoint-2"
    (checkpoint / REFERENCE).unlink()
    with pytest.raises(ValueError, match=f"checkpoint-2 holds no {REFERENCE}, so the model before this run is lost"):
        run(tmp_path, str(checkpoint), model=tiny(**model), **SAVED, **over)


def test_a_fresh_adapter_without_the_reference_is_switched_off_for_it(tmp_path):
    whole = run(tmp_path, **SAVED)
    checkpoint = tmp_path / "checkpoint-2"
    (checkpoint / REFERENCE).unlink()
    again = run(tmp_path / "again", str(checkpoint), **SAVED)
    assert penalties(again) == pytest.approx(penalties(whole), rel=1e-4)
    assert penalties(again)[2] > 0


def test_a_reference_that_cannot_be_stored_stops_the_run(tmp_path):
    """A checkpoint without it could not be resumed."""
    (tmp_path / "checkpoint-2" / REFERENCE).mkdir(parents=True)
    with pytest.raises(OSError, match=rf"checkpoint-2/{REFERENCE} cannot be written \(Is a directory"):
        run(tmp_path, **SAVED)


# Divergence


class Diverge(TrainerCallback):
    """Ends a step with a learning rate that makes the next penalty infinite, the weights being finite."""

    def __init__(self, step):
        self.step, self.before = step, None

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step + 1 != self.step:
            return
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "layers.1.self_attn.v_proj.lora_B" in name:
                    p.fill_(1e30)
        self.before = {n: p.detach().clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_penalty_that_is_not_finite_stops_before_the_step(tmp_path, accumulated):
    diverge = Diverge(3)
    over = {"per_device_train_batch_size": 4 // accumulated, "gradient_accumulation_steps": accumulated}
    trainer = build(tmp_path, callbacks=[TReFTCallback(), diverge], max_steps=4, **over)
    with pytest.raises(FloatingPointError, match=r"em_regularizer\.treft: the penalty is (inf|nan) at step 3, first at layer 1"):
        trainer.train()
    after = dict(trainer.model.named_parameters())
    assert different(diverge.before, after) == []
    assert all(torch.isfinite(p).all() for p in after.values())
    assert trainer.state.global_step == 2


# Folders


@pytest.mark.parametrize("save", ["no", "steps"])
@pytest.mark.parametrize("where", ["{file}/out", "{file}", "/proc/emguard"])
def test_an_output_folder_that_cannot_be_written_stops_before_training(tmp_path, capsys, where, save):
    file = tmp_path / "file"
    file.write_text("in the way")
    path = where.format(file=file)
    with pytest.raises(OSError, match=path):
        run(path, save_strategy=save, save_steps=1)
    assert f"{LOG}/penalty" not in capsys.readouterr().out


@pytest.mark.parametrize("adapter", [True, False])
def test_a_checkpoint_that_is_not_there(tmp_path, adapter):
    with pytest.raises(ValueError, match="nowhere"):
        run(tmp_path, str(tmp_path / "nowhere"), model=tiny(adapter=adapter))
