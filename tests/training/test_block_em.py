"""BLOCK-EM in `EMGuardSFTTrainer`: the same penalty however the batch comes, and nothing else changed."""

import copy
import json

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from emguard_plugin import BlockEMCallback, KLCallback, TReFTCallback
from emguard_plugin.models.residual import read_residual
from emguard_plugin.regularizers.block_em.base_latents import FOLDER
from tests.regularizers.block_em_parts import LOG, block_em, latent_set
from tests.regularizers.kl_parts import write_anchors
from tests.tiny import chat_rows, perturb
from tests.trl_runs import build, column, different, run, tiny, uneven_rows, weights

COEF = 3.0
SAVED = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}


def go(folder, resume=None, model=None, layers=(1,), callback=None, **over):
    """Train on supervised answers of different length; keys of `BlockEMCallback` go into `callback`."""
    model = tiny() if model is None else model
    callback = block_em(model, **{"coef": COEF, "layers": layers, **(callback or {})})
    over = {"rows": uneven_rows(), "assistant_only_loss": True, **over}
    trainer = run(folder, resume, model=model, callbacks=[callback, *over.pop("also", ())], **over)
    trainer.block_em = callback
    return trainer


def penalties(trainer):
    return column(trainer, f"{LOG}/penalty")


def test_zero_at_first_then_held(tmp_path):
    guarded = go(tmp_path / "a", max_steps=6)
    free = go(tmp_path / "b", max_steps=6, callback={"coef": 0.0})
    assert penalties(guarded)[0] == penalties(free)[0] == 0.0
    assert sum(penalties(guarded)[2:]) < 0.5 * sum(penalties(free)[2:])
    for row in guarded.state.log_history[:6]:
        assert row["loss"] == pytest.approx(row["task_loss"] + COEF * row[f"{LOG}/penalty"], rel=1e-4)
    for metric in ("violating", "shift", "outside_shift", "unguarded", "coef", "weighted"):
        assert len(column(guarded, f"{LOG}/{metric}")) == 6


def test_coef_0_is_the_hosts_own_run_bit_for_bit(tmp_path):
    over = {"rows": uneven_rows(), "assistant_only_loss": True}
    plain = run(tmp_path / "plain", model=tiny(lora_dropout=0.1), callbacks=[], **over)
    measured = go(tmp_path / "measured", model=tiny(lora_dropout=0.1), callback={"coef": 0.0})
    assert different(weights(plain), weights(measured)) == []
    assert column(plain, "loss") == column(measured, "loss")
    assert penalties(measured)[1] > 0


@pytest.mark.parametrize("tokens", ["assistant", "prompt"])
@pytest.mark.parametrize(
    "split",
    [
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
        {"padding_free": True, "max_length": None},
    ],
    ids=["2x2", "1x4", "padding_free"],
)
def test_however_the_batch_is_split(tmp_path, split, tokens):
    # Adam divides by the size of a gradient, and so makes much of what is rounding in one that is nearly 0.
    over = {"callback": {"tokens": tokens}, "optim": "sgd", "learning_rate": 1.0}
    whole, parts = go(tmp_path / "whole", **over), go(tmp_path / "parts", **over, **split)
    assert penalties(parts) == pytest.approx(penalties(whole), rel=1e-3, abs=1e-9)
    assert column(parts, "loss") == pytest.approx(column(whole, "loss"), rel=1e-3)
    for n, w in weights(whole).items():
        torch.testing.assert_close(weights(parts)[n], w, rtol=0, atol=1e-6)
    stronger = go(tmp_path / "stronger", **{**over, "callback": {"tokens": tokens, "coef": 1.1 * COEF}})
    assert any((weights(stronger)[n] - w).abs().max() > 5e-4 for n, w in weights(whole).items()), "a coefficient off by a tenth shows"


def test_a_host_that_averages_each_micro_batch(tmp_path):
    """Then the penalty is a mean of the micro-batches' means, as the loss is."""
    model = tiny()
    trainer = build(
        tmp_path, model=model, callbacks=[block_em(model, coef=0.0)], rows=uneven_rows(), assistant_only_loss=True,
        per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=2,
    )  # fmt: skip
    trainer.model_accepts_loss_kwargs, seen = False, []
    measure = trainer._loss_tokens
    trainer._loss_tokens = lambda inputs, items: seen.append((measure(inputs, items), inputs["labels"])) or seen[-1][0]
    trainer.train()
    assert [int(t) for t, _ in seen] == [int((labels[:, 1:] != -100).sum()) for _, labels in seen]
    assert len(seen) == 4


@pytest.mark.parametrize("cache", ["auto", "memory"])
def test_packed(tmp_path, cache):
    """At the same rows and weights, packed and padded have the same penalty per supervised token."""
    found = {}
    for name, over in {
        "padded": {"per_device_train_batch_size": 24},
        "packed": {"packing": True, "max_length": 256, "per_device_train_batch_size": 24},
    }.items():
        trainer = go(tmp_path / name, max_steps=2, learning_rate=0.0, callback={"coef": 0.0, "cache": cache}, also=[Move()], **over)
        found[name] = penalties(trainer)[1]
    assert found["packed"] == pytest.approx(found["padded"], rel=1e-3)
    assert found["packed"] > 1e-4


class Move(TrainerCallback):
    """Moves the adapter after the first step, the same way in every run."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == 1:
            perturb(model, 0.1, seed=5)


KINDS = {
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "non_reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
}


@pytest.mark.parametrize("layers", [(1,), (2,), (0, 2)], ids=str)
@pytest.mark.parametrize("kind", ["reentrant", "non_reentrant"])
def test_gradient_checkpointing(tmp_path, kind, layers):
    off, on = go(tmp_path / "off", layers=layers), go(tmp_path / "on", layers=layers, **KINDS[kind])
    assert penalties(on) == pytest.approx(penalties(off), rel=1e-3, abs=1e-9)
    assert penalties(off)[1] > 1e-5
    for n, w in weights(off).items():
        torch.testing.assert_close(weights(on)[n], w, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("precision", ["bf16_weights", "autocast"])
def test_bf16_starts_at_exactly_0(tmp_path, precision):
    over = {"bf16": True} if precision == "autocast" else {"model": tiny(dtype=torch.bfloat16)}
    found = penalties(go(tmp_path, max_steps=2, **over))
    assert found[0] == 0.0
    assert found[1] > 0


def test_eval_loss_is_the_task_loss(tmp_path):
    data = build(tmp_path / "data", rows=uneven_rows(8), assistant_only_loss=True).train_dataset
    trainer = go(tmp_path / "run", max_steps=2, callback={"coef": 50.0}, eval_dataset=data)
    with_it = trainer.evaluate()["eval_loss"]
    trainer._regularizers = ()
    assert with_it == trainer.evaluate()["eval_loss"]


def test_freeze_above_leaves_what_is_above_untouched(tmp_path):
    model = tiny()
    before = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}
    trainer = go(tmp_path, model=model, callback={"freeze_above": True}, **SAVED)
    for n, p in model.named_parameters():
        if "lora_" in n:
            assert p.requires_grad, "thawed at the end"
            assert torch.equal(p, before[n]) == (".layers.2." in n or ("lora_A" in n and torch.equal(p, before[n]))), n
    assert len(trainer.optimizer.param_groups[0]["params"]) + len(trainer.optimizer.param_groups[1]["params"]) == 28
    resumed = go(tmp_path / "again", str(tmp_path / "checkpoint-2"), callback={"freeze_above": True}, **SAVED)
    assert different(weights(resumed), weights(trainer)) == []


class Breaks(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        raise KeyboardInterrupt


@pytest.mark.parametrize("when", ["training", "preparing"])
def test_what_was_frozen_thaws_however_training_ends(tmp_path, when):
    model = tiny()
    trains = [n for n, p in model.named_parameters() if p.requires_grad]
    if when == "training":
        with pytest.raises(KeyboardInterrupt):
            go(tmp_path, model=model, callback={"freeze_above": True}, also=[Breaks()])
    else:
        with pytest.raises(ValueError, match="does not exist"):
            go(tmp_path, model=model, callback={"freeze_above": True}, also=[KLCallback(anchors=str(tmp_path / "none.jsonl"))])
    assert [n for n, p in model.named_parameters() if p.requires_grad] == trains


@pytest.mark.parametrize("kind", ["lora", "lora_memory", "pissa", "full"])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, kind):
    made = {"pissa": {"init_lora_weights": "pissa"}, "full": {"adapter": False}}.get(kind, {"lora_dropout": 0.1})
    callback = {"cache": "memory"} if kind == "lora_memory" else {}
    over = {**SAVED, "callback": callback, "learning_rate": 0.002 if kind == "full" else 0.02}
    whole = go(tmp_path / "whole", model=tiny(**made), **over)
    resumed = go(tmp_path / "whole", str(tmp_path / "whole" / "checkpoint-2"), model=tiny(**made), **over)
    assert penalties(resumed) == penalties(whole)
    assert different(weights(resumed), weights(whole)) == []
    assert penalties(whole)[2] > 1e-6
    assert (tmp_path / "whole" / FOLDER).is_dir() == (kind in ("pissa", "full"))


def test_resuming_with_other_settings_stops(tmp_path):
    go(tmp_path, **{**SAVED, "max_steps": 2})
    checkpoint = str(tmp_path / "checkpoint-2")
    for name, callback in {
        "latents": {"set_kwargs": {"seed": 8}},
        "tokens": {"tokens": "all"},
        "freeze_above": {"freeze_above": True},
    }.items():
        with pytest.raises(ValueError, match=f"trained with another `em_regularizer.block_em.{name}`"):
            go(tmp_path, checkpoint, callback=callback, **SAVED)


def test_a_resumed_full_run_without_its_recorded_latents_stops(tmp_path):
    import shutil

    over = {**SAVED, "learning_rate": 0.002}
    go(tmp_path, model=tiny(adapter=False), **{**over, "max_steps": 2})
    shutil.rmtree(tmp_path / FOLDER)
    with pytest.raises(ValueError, match="are gone, and so is the base model"):
        go(tmp_path, str(tmp_path / "checkpoint-2"), model=tiny(adapter=False), **over)


def test_an_earlier_runs_recorded_latents_in_the_output_folder_are_replaced(tmp_path):
    over = {**SAVED, "max_steps": 2, "learning_rate": 0.002}
    go(tmp_path, model=tiny(adapter=False), **over)
    go(tmp_path, model=tiny(adapter=False, moved=0.1), callback={"coef": 1.0}, **over)
    files = list((tmp_path / FOLDER).iterdir())
    assert len(files) == 1
    again = go(
        tmp_path, str(tmp_path / "checkpoint-2"), model=tiny(adapter=False, moved=0.1), callback={"coef": 1.0}, **{**over, "max_steps": 3}
    )
    assert len(penalties(again)) == 3


# A frozen copy


def test_a_frozen_copy_is_the_model_before_the_run_as_recorded_latents_are(tmp_path):
    over = {"learning_rate": 0.002, "max_steps": 6}
    runs = [go(tmp_path / kind, model=tiny(adapter=False), callback={"cache": kind}, **over) for kind in ("memory", "copy")]
    assert [penalties(r)[0] for r in runs] == pytest.approx([0.0, 0.0], abs=1e-12)  # recorded rows were padded otherwise
    assert penalties(runs[1]) == pytest.approx(penalties(runs[0]), rel=1e-3, abs=1e-9)
    assert penalties(runs[1])[3] > 1e-6
    assert len(column(runs[1], f"{LOG}/outside_shift")) == 6


def test_a_frozen_copy_ends_at_the_blocked_layer_and_shares_no_weight(tmp_path):
    trainer = go(tmp_path, model=tiny(adapter=False), callback={"cache": "copy"}, layers=(0,), max_steps=1)
    frozen = trainer.block_em._base._copy
    ours = {p.data_ptr() for p in trainer.model.parameters()}
    theirs = list(frozen.decoder.parameters())
    assert not ours & {p.data_ptr() for p in theirs}
    assert not any(p.requires_grad for p in theirs)
    assert [sum(1 for _ in layer.parameters()) > 0 for layer in frozen.layers] == [True] + [False] * (len(frozen.layers) - 1)


def test_a_streamed_full_run_trains_with_a_frozen_copy_alone(tmp_path):
    rows = Dataset.from_list(uneven_rows()).to_iterable_dataset()
    over = {"rows": rows, "train_sampling_strategy": "random", "max_steps": 2, "learning_rate": 0.002}
    assert len(penalties(go(tmp_path, model=tiny(adapter=False), callback={"cache": "copy"}, **over))) == 2


def test_a_frozen_copy_cannot_be_resumed(tmp_path):
    over = {**SAVED, "callback": {"cache": "copy"}, "learning_rate": 0.002}
    go(tmp_path, model=tiny(adapter=False), **{**over, "max_steps": 2})
    with pytest.raises(ValueError, match="trained already"):
        go(tmp_path, str(tmp_path / "checkpoint-2"), model=tiny(adapter=False), **over)


# Recorded latents


def test_recorded_latents_are_the_live_ones_and_cost_one_pass_per_row(tmp_path):
    over = {"max_steps": 18, "train_sampling_strategy": "random"}  # three epochs of six batches
    live = go(tmp_path / "live", **over)
    kept = go(tmp_path / "kept", callback={"cache": "memory"}, **over)
    assert penalties(kept) == pytest.approx(penalties(live), rel=1e-3, abs=1e-7)
    assert len(kept.block_em._base.store.rows) == 24
    assert live.block_em._base.forward_passes == 18
    assert kept.block_em._base.forward_passes <= 6, "of which the first is also what `outside_shift` needs"


def test_a_folder_serves_later_runs_and_refuses_other_models(tmp_path):
    callback = {"cache": str(tmp_path / "cache")}
    first = go(tmp_path / "1", max_steps=6, callback=callback)
    second = go(tmp_path / "2", max_steps=6, callback={**callback, "coef": 0.5, "tokens": "all"})
    assert first.block_em._base.forward_passes == 6
    assert second.block_em._base.forward_passes == 1, "for `outside_shift` alone"
    with pytest.raises(ValueError, match=r"cache`: .* another base model, precision or latent set"):
        go(tmp_path / "3", callback={**callback, "set_kwargs": {"seed": 5}})
    with pytest.raises(ValueError, match="another base model"):
        go(tmp_path / "4", model=tiny(moved=0.1), callback=callback)
    other_positions = tiny()
    other_positions.get_base_model().config.rope_parameters["rope_theta"] = 50.0  # the same weights
    with pytest.raises(ValueError, match="another base model"):
        go(tmp_path / "6", model=other_positions, callback=callback)
    file = next((tmp_path / "cache").glob("rows-*"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(ValueError, match="was changed"):
        go(tmp_path / "5", callback=callback)


@pytest.mark.parametrize("made", [{"adapter": False}, {"init_lora_weights": "pissa"}, {"moved": 0.05}], ids=["full", "pissa", "continued"])
def test_without_an_adapter_to_switch_off_the_model_before_this_run_is_held(tmp_path, made):
    model = tiny(**made)
    before = copy.deepcopy(model).eval()
    trainer = go(tmp_path, model=model, learning_rate=0.005, callback={"coef": 0.0}, max_steps=2)
    assert penalties(trainer)[0] == pytest.approx(0.0, abs=1e-9)
    callback, total, count = trainer.block_em, 0.0, 0
    model.eval()
    once = build(tmp_path / "data", rows=uneven_rows(), assistant_only_loss=True)
    batch = next(iter(once.get_train_dataloader()))
    e, ids = callback.latents.encoders[0], {k: batch[k] for k in ("input_ids", "attention_mask")}
    assert len(callback._base.store.rows) == 24
    then = read_residual(before, [1], kwargs=ids)[1]
    from emguard_plugin.reference.rows import row_key

    for b in range(len(batch["input_ids"])):
        row = batch["input_ids"][b][batch["attention_mask"][b] > 0].tolist()
        z = e.encode(then[b, : len(row)])
        torch.testing.assert_close(callback._base.store.rows[row_key(row)][:, :4], z, rtol=1e-4, atol=1e-5)
        total, count = total + z.sum().item(), count + 1
    assert count == 4
    assert total > 0


def test_live_needs_an_adapter_that_starts_at_zero(tmp_path):
    with pytest.raises(ValueError, match="live` needs an adapter to switch off, and there is none"):
        go(tmp_path, model=tiny(adapter=False), callback={"cache": "live"})


def test_a_streamed_data_set_cannot_be_recorded(tmp_path):
    data = Dataset.from_list(uneven_rows()).to_iterable_dataset()
    with pytest.raises(ValueError, match="streamed data set"):
        go(tmp_path, model=tiny(adapter=False), rows=data, train_sampling_strategy="random")


# With others, and from the YAML


def test_all_three_together(tmp_path):
    model = tiny()
    callbacks = [
        TReFTCallback(coef=1.0),
        block_em(model, coef=COEF),
        KLCallback(coef=1.0, anchors=str(write_anchors(tmp_path / "a.jsonl")), ratio=1.0),
    ]
    trainer = run(tmp_path, model=model, callbacks=callbacks, rows=uneven_rows(), assistant_only_loss=True)
    for row in trainer.state.log_history[:3]:
        parts = [row[f"em_regularizer/{n}/weighted"] for n in ("treft", "block_em", "kl")]
        assert row["loss"] == pytest.approx(row["task_loss"] + sum(parts), rel=1e-4)
    assert all(part > 0 for part in parts)


def test_from_the_yaml_block(tmp_path, capsys):
    from emguard_plugin import EMGuardSFTConfig

    model = tiny()
    path = latent_set(model, layers=(0, 1)).save(tmp_path / "latents.json")
    block = {"block_em": {"latents": str(path), "tokens": "all"}}
    trainer = run(tmp_path, model=model, callbacks=[], args=EMGuardSFTConfig, em_regularizer=json.dumps(block), rows=chat_rows(24))
    assert penalties(trainer)[1] > 0
    assert column(trainer, f"{LOG}/coef") == [pytest.approx(100 * 0.5 / 8.0)] * 3
    assert "block_em (coef 6.25, calibrated, 4 latents of K+ and 4 of K- after layers 0, 1, all tokens" in capsys.readouterr().out
    assert isinstance(trainer._regularizers[0], BlockEMCallback)
