"""The reference is the model before this run: recorded, stored in every checkpoint, loaded on resume."""

import copy
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import TrainerControl, TrainerState, TrainingArguments

from emguard_plugin.reference.stored import tensors_hash
from emguard_plugin.regularizers.treft.callback import REFERENCE_FILE
from tests.regularizers.treft_parts import HELPFUL, MODES, PIRATE, ready, value
from tests.tiny import chat_rows, lora, perturb, tiny_model

KINDS = {
    "full": lambda: tiny_model("llama"),
    "lora": lambda: lora(tiny_model("llama")),
    "pissa": lambda: lora(tiny_model("llama"), init_lora_weights="pissa"),
    "continued": lambda: perturb(lora(tiny_model("llama"))),
}


def save(callback, folder, step=3):
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    args = TrainingArguments(output_dir=str(folder), use_cpu=True, report_to=[])
    callback.on_save(args, TrainerState(global_step=step), TrainerControl())
    return checkpoint


def about(path):
    with safe_open(path, "pt") as f:
        return f.metadata()


def first_run(model, folder, rows=None, **settings):
    """Take the reference, train a little, save."""
    callback = ready(model, rows, **settings)
    value(callback, model)
    perturb(model)
    return callback, save(callback, folder)


@pytest.mark.parametrize("mode", ["prefix", "shared"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_has_the_reference_of_the_first(tmp_path, kind, mode):
    fresh, model = KINDS[kind](), KINDS[kind]()
    rows = chat_rows(8, system=lambda i: (HELPFUL, PIRATE)[i % 2])
    settings = {} if mode == "prefix" else MODES[mode]
    callback, checkpoint = first_run(model, tmp_path / "a", rows, **settings)
    assert {n.split(".")[0] for n in load_file(checkpoint / REFERENCE_FILE)} == set("01" if mode == "prefix" else "0")
    resumed = ready(fresh, rows, resume_from=checkpoint, **settings)  # before the host loads the trained weights
    expected = [value(callback, model, s) for s in range(3, 9)]
    assert min(expected) > 1e-4
    assert [value(resumed, model, s) for s in range(3, 9)] == expected
    again = save(resumed, tmp_path / "b", step=9)
    stored, stored_again = (load_file(c / REFERENCE_FILE) for c in (checkpoint, again))
    assert tensors_hash(stored) == tensors_hash(stored_again)
    assert about(checkpoint / REFERENCE_FILE) == about(again / REFERENCE_FILE)


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_the_adapter_a_fresh_run_starts_at_zero(kind):
    model = KINDS[kind]()
    callback = ready(model)
    assert value(callback, model) == 0
    assert value(callback, perturb(model)) > 1e-4


@pytest.mark.parametrize("mode", ["prefix", "shared", "per_row"])
def test_a_checkpoint_of_a_fresh_lora_needs_no_reference(tmp_path, mode):
    model = lora(tiny_model("llama"))
    untuned = copy.deepcopy(model)
    callback, checkpoint = first_run(model, tmp_path, **MODES[mode])
    assert (checkpoint / REFERENCE_FILE).is_file() == (mode != "per_row")
    (checkpoint / REFERENCE_FILE).unlink(missing_ok=True)
    resumed = ready(untuned, resume_from=checkpoint, **MODES[mode])
    assert value(resumed, model) == pytest.approx(value(callback, model), rel=1e-5)
    assert value(resumed, model) > 1e-4


@pytest.mark.parametrize("kind", ["full", "pissa", "continued"])
def test_without_its_reference_any_other_run_is_lost(tmp_path, kind):
    _, checkpoint = first_run(KINDS[kind](), tmp_path)
    (checkpoint / REFERENCE_FILE).unlink()
    with pytest.raises(ValueError, match=rf"checkpoint-3 holds no {REFERENCE_FILE}.*the model before this run is lost"):
        ready(KINDS[kind](), resume_from=checkpoint)


CHANGED = {
    "layers": {"layers": [0, 1]},
    "compat": {"compat": True},
    "another prefix": {"extra_prefixes": [PIRATE]},
    "postfix": {"tokens": "postfix"},
    "data": {"rows": chat_rows(6, system=PIRATE)},
}


@pytest.mark.parametrize("what", CHANGED)
def test_other_settings_on_resume(tmp_path, what):
    model = tiny_model("llama")
    _, checkpoint = first_run(model, tmp_path)
    with pytest.raises(ValueError, match=r"recorded for another `settings`. Resume with the data and settings"):
        ready(model, resume_from=checkpoint, **CHANGED[what])


def test_the_coefficient_may_change_on_resume(tmp_path):
    model = tiny_model("llama")
    callback, checkpoint = first_run(model, tmp_path)
    assert value(ready(tiny_model("llama"), resume_from=checkpoint, coef=1.0), model) == value(callback, model)


def tamper(path):
    tensors = load_file(path)
    metadata = about(path)
    tensors["0.0.key"][0, 0, 0] += 1
    save_file(tensors, path, metadata=metadata)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (tamper, "does not match its hash: it was changed"),
        (lambda path: path.write_bytes(path.read_bytes()[:-50]), "cannot be read"),
        (lambda path: path.write_bytes(b""), "cannot be read"),
    ],
)
def test_a_damaged_reference_stops_the_run(tmp_path, damage, message):
    model = lora(tiny_model("llama"))
    untuned = copy.deepcopy(model)
    _, checkpoint = first_run(model, tmp_path)
    assert ready(untuned, resume_from=checkpoint).prepared
    damage(checkpoint / REFERENCE_FILE)
    with pytest.raises(ValueError, match=message):  # although the adapter could be switched off
        ready(untuned, resume_from=checkpoint)


def test_coef_0_stores_the_reference_for_a_later_resume(tmp_path):
    model = tiny_model("llama")
    callback, checkpoint = first_run(model, tmp_path, coef=0)
    assert value(ready(tiny_model("llama"), resume_from=checkpoint), model) == value(callback, model) > 1e-4


def test_nothing_is_written_where_no_checkpoint_is(tmp_path):
    model = tiny_model("llama")
    callback, checkpoint = first_run(model, tmp_path)
    shutil.rmtree(checkpoint)
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    callback.on_save(args, TrainerState(global_step=3), TrainerControl())
    assert not list(tmp_path.iterdir())


# per_row switches the adapter off at every step


@pytest.mark.parametrize("kind", ["full", "pissa", "continued"])
def test_per_row_needs_a_fresh_adapter(kind):
    with pytest.raises(ValueError, match=r"`em_regularizer\.treft\.postfix_reference: per_row`.*needs a fresh LoRA adapter"):
        ready(KINDS[kind](), **MODES["per_row"])


def test_per_row_needs_a_frozen_base():
    model = lora(tiny_model("llama"))
    model.get_base_model().model.norm.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="needs a fresh LoRA adapter"):
        ready(model, **MODES["per_row"])


def test_per_row_takes_modules_to_save_back_too():
    model = lora(tiny_model("llama"), modules_to_save=["embed_tokens"], target_modules=["q_proj"])
    callback = ready(model, **MODES["per_row"])
    assert value(callback, model) == 0
    with torch.no_grad():
        model.get_base_model().model.embed_tokens.modules_to_save["default"].weight.mul_(1.5)
    assert value(callback, model) > 1e-4
