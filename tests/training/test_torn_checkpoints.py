"""torn-checkpoint: a run that was killed while it saved goes on from what is whole, bit for bit."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback
from trl import SFTTrainer

from emguard_plugin import KLCallback, TReFTCallback, guard
from emguard_plugin.reference.checkpoints import siblings, whole_checkpoint
from emguard_plugin.regularizers.kl.callback import STATE_FILE as KL_STATE
from tests.regularizers.block_em_parts import block_em
from tests.regularizers.kl_parts import write_anchors
from tests.trl_runs import REFERENCE, column, different, run, tiny, weights

SAVED = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}
KINDS = {"full": ({"adapter": False}, {"learning_rate": 0.002}), "pissa": ({"init_lora_weights": "pissa"}, {})}
REPO = Path(__file__).resolve().parents[2]


def go(folder, resume=None, kind="full", name="treft", **over):
    made, settings = KINDS[kind]
    model = tiny(**made)
    callbacks = {
        "treft": lambda: [TReFTCallback(coef=2.0)],
        "kl": lambda: [KLCallback(coef=1.0, ratio=1.0, anchors=write_anchors(folder.parent / "a.jsonl"))],
        "target": lambda: [KLCallback(target=0.01, ratio=1.0, anchors=write_anchors(folder.parent / "a.jsonl"))],
        "self": lambda: [KLCallback(coef=1.0, ratio=1.0, anchors=f"self:{write_anchors(folder.parent / 'a.jsonl')}")],
        "block_em": lambda: [block_em(model if kind == "full" else model.get_base_model())],
    }[name]()
    return run(folder, resume, model=model, callbacks=callbacks, **{**SAVED, **settings, **over})


def remove(path):
    path.unlink()


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("damage", [remove, cut])
@pytest.mark.parametrize(("name", "file"), [("treft", REFERENCE), ("kl", KL_STATE), ("block_em", "emguard_block_em.json")])
@pytest.mark.parametrize("kind", KINDS)
def test_what_the_newest_checkpoint_lost_is_found_in_another_of_the_run(tmp_path, caplog, kind, name, file, damage):
    whole = go(tmp_path / "whole", kind=kind, name=name)
    damage(tmp_path / "whole" / "checkpoint-4" / file)
    again = go(tmp_path / "whole", str(tmp_path / "whole" / "checkpoint-4"), kind=kind, name=name)
    assert different(weights(again), weights(whole)) == []
    assert column(again, f"em_regularizer/{name}/penalty") == column(whole, f"em_regularizer/{name}/penalty")
    assert "of the same run instead" in caplog.text
    assert file in caplog.text


def test_a_checkpoint_of_another_run_does_not_stand_in(tmp_path):
    """One in the same folder, by another learning rate: its log is no beginning of this one's."""
    go(tmp_path / "run", learning_rate=0.004, max_steps=2)
    other = tmp_path / "other"
    (tmp_path / "run" / "checkpoint-2").rename(other)
    go(tmp_path / "run")
    for step in (2, 6):
        shutil.rmtree(tmp_path / "run" / f"checkpoint-{step}")
    other.rename(tmp_path / "run" / "checkpoint-2")
    (tmp_path / "run" / "checkpoint-4" / REFERENCE).unlink()
    assert siblings(tmp_path / "run" / "checkpoint-4") == []
    with pytest.raises(ValueError, match="the model before this run is lost"):
        go(tmp_path / "run", str(tmp_path / "run" / "checkpoint-4"))


def test_a_coefficient_that_moves_is_taken_from_its_own_checkpoint_alone(tmp_path):
    whole = go(tmp_path / "run", name="target")
    cut(tmp_path / "run" / "checkpoint-4" / KL_STATE)
    with pytest.raises(ValueError, match=rf"checkpoint-4 holds no readable {KL_STATE}.*Resume from .*checkpoint-2, which has its own"):
        go(tmp_path / "run", str(tmp_path / "run" / "checkpoint-4"), name="target")
    again = go(tmp_path / "run", str(tmp_path / "run" / "checkpoint-2"), name="target")
    assert column(again, "em_regularizer/kl/coef") == column(whole, "em_regularizer/kl/coef")


class Order(TrainerCallback):
    """Sees what a checkpoint holds when the host says that it is saved."""

    def __init__(self):
        self.whole = []

    def on_save(self, args, state, control, **kwargs):
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        stamps = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
        self.whole.append(all(stamps[n] <= stamps["trainer_state.json"] for n in (REFERENCE, KL_STATE)))


def test_ours_stands_in_a_checkpoint_before_the_host_completes_it(tmp_path):
    order = Order()
    callbacks = [TReFTCallback(), KLCallback(anchors=write_anchors(tmp_path / "a.jsonl"), ratio=1.0), order]
    run(tmp_path / "run", model=tiny(adapter=False), callbacks=callbacks, **SAVED, save_total_limit=1, learning_rate=0.002)
    assert order.whole == [True, True, True]


@pytest.mark.parametrize("damage", [remove, cut])
def test_a_checkpoint_that_the_host_did_not_complete_is_passed_over(tmp_path, capsys, damage):
    whole = go(tmp_path / "run")
    damage(tmp_path / "run" / "checkpoint-6" / "trainer_state.json")
    (tmp_path / "run" / "checkpoint-6" / "optimizer.pt").unlink()
    again = go(tmp_path / "run", True)
    assert (
        "checkpoint-6 was cut while it was written (no readable trainer_state.json); resuming from checkpoint-4" in capsys.readouterr().out
    )
    assert different(weights(again), weights(whole)) == []


def test_the_first_checkpoint_cut(tmp_path, capsys):
    whole = go(tmp_path / "run", max_steps=2)
    remove(tmp_path / "run" / "checkpoint-2" / "trainer_state.json")
    with pytest.raises(ValueError, match=r"checkpoint-2 was cut while it was written .* Delete it and start afresh"):
        go(tmp_path / "run", str(tmp_path / "run" / "checkpoint-2"), max_steps=2)
    again = go(tmp_path / "run", True, max_steps=2)
    assert "starting afresh" in capsys.readouterr().out
    assert different(weights(again), weights(whole)) == []


def test_a_folder_that_is_no_checkpoint_is_the_hosts_to_refuse(tmp_path):
    assert whole_checkpoint(tmp_path / "nowhere") == tmp_path / "nowhere"
    (tmp_path / "best").mkdir()
    assert whole_checkpoint(tmp_path / "best") == tmp_path / "best"


# weights-unharmed: a sentence that is true


class Poisoned(SFTTrainer):
    """A host whose own loss is NaN in its second step."""

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        return loss * float("nan") if self.state.global_step == 1 else loss


@pytest.mark.parametrize("name", ["treft", "kl"])
def test_weights_that_the_hosts_own_loss_broke_are_not_called_unharmed(tmp_path, name):
    model = tiny(adapter=False)
    callback = TReFTCallback() if name == "treft" else KLCallback(coef=1.0, ratio=1.0, anchors=write_anchors(tmp_path / "a.jsonl"))
    with pytest.raises(
        FloatingPointError, match=r"the penalty is nan at step 3.*The weights are not finite any more \(.*Go back to the last checkpoint"
    ) as found:
        run(tmp_path / "run", model=model, cls=guard(Poisoned), callbacks=[callback], max_steps=4, max_grad_norm=0.0)
    assert not all(torch.isfinite(p).all() for p in model.parameters())
    assert "unharmed" not in str(found.value)


def test_a_host_that_has_stepped_already_is_not_promised_anything():
    from emguard_plugin.regularizers.start import state_of_weights

    model = tiny(adapter=False)
    assert state_of_weights(model, steps_early=False) == "The weights before this step are unharmed."
    assert state_of_weights(model, steps_early=True) == "DeepSpeed has taken this step already. Go back to the last checkpoint."


@pytest.mark.slow
def test_a_slice_of_the_kills(tmp_path):
    """benchmarks/kill_training.py runs 40 points of TRL and Axolotl."""
    out = tmp_path / "kills.json"
    command = [
        sys.executable,
        str(REPO / "benchmarks" / "kill_training.py"),
        "--trl",
        "4",
        "--axolotl",
        "0",
        "--cases",
        "2",
        "--out",
        str(out),
    ]
    done = subprocess.run([*command, "--work", str(tmp_path / "work")], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads(out.read_text())
    assert (found["points"], found["lost"]) == (4, 0)
    assert found["killed"] >= 2, "a moment may come when the run has ended"
