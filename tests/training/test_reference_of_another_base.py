"""reference-of-another-base: what a checkpoint or a cache holds belongs to the model it came from, in all methods alike."""

import json
import shutil

import pytest
import torch

from emguard_plugin import KLCallback, TReFTCallback
from emguard_plugin.files.state import FORMAT, digest
from emguard_plugin.regularizers.base import EMRegularizerCallback
from emguard_plugin.regularizers.kl.callback import STATE_FILE as KL_STATE
from emguard_plugin.regularizers.kl.reference import FOLDER as KL_FOLDER
from tests.regularizers.block_em_parts import block_em
from tests.regularizers.kl_parts import write_anchors
from tests.tiny import chatml_tokenizer, lora, perturb, tiny_model
from tests.trl_runs import REFERENCE, column, run

SAVED = {"save_strategy": "steps", "save_steps": 2, "learning_rate": 0.002}
BLOCK_STATE, BLOCK_FOLDER = "emguard_block_em.json", "emguard_block_em"
FILES = {"treft": (REFERENCE,), "kl": (KL_STATE, f"../{KL_FOLDER}"), "block_em": (BLOCK_STATE, f"../{BLOCK_FOLDER}")}


def base(edited=False, tied=False):
    """The tiny llama, or one in which four rows were initialised anew that no sample of elements hits."""
    model = tiny_model("llama", vocab=len(chatml_tokenizer()), tie_word_embeddings=tied)
    if edited:
        with torch.no_grad():
            model.get_input_embeddings().weight[[101, 102, 103, 105]] = 0.02 * torch.randn(
                4, 32, generator=torch.Generator().manual_seed(9)
            )
    return model


def method(name, folder, **kw):
    if name == "treft":
        return TReFTCallback(coef=2.0, **kw)
    if name == "kl":
        return KLCallback(coef=1.0, ratio=1.0, anchors=write_anchors(folder / "anchors.jsonl"), **kw)
    return block_em(base(), **kw)


def go(folder, name, model, resume=None, steps=2, cache=None, **over):
    callback = method(name, folder.parent, **({} if cache is None else {"cache": cache}))
    return run(folder, resume, model=model, callbacks=[callback], max_steps=steps, **{**SAVED, **over})


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", FILES)
def test_resuming_on_another_base_names_file_and_models(tmp_path, name, adapter):
    def model(edited):
        return lora(base(edited)) if adapter else base(edited)

    go(tmp_path / "a", name, model(False))
    checkpoint = tmp_path / "a" / "checkpoint-2"
    with pytest.raises(ValueError, match=rf"checkpoint-2/{FILES[name][0]} belongs to the model `LlamaForCausalLM` \(.*starts from"):
        go(tmp_path / "a", name, model(True), str(checkpoint), steps=4)
    resumed = go(tmp_path / "a", name, model(False), str(checkpoint), steps=4)
    assert len(column(resumed, f"em_regularizer/{name}/penalty")) == 4


@pytest.mark.parametrize("name", FILES)
def test_files_of_a_run_on_another_base_of_the_same_shape(tmp_path, name):
    """Copied into a checkpoint whole, states and folders alike."""
    for run_of, edited in (("a", False), ("b", True)):
        go(tmp_path / run_of, name, base(edited))
    for file in FILES[name]:
        there, here = (tmp_path / r / "checkpoint-2" / file for r in "ba")
        if there.is_dir():
            shutil.rmtree(here)
            shutil.copytree(there, here)
        else:
            shutil.copy(there, here)
    with pytest.raises(ValueError, match=rf"checkpoint-2/{FILES[name][0]} belongs to the model"):
        go(tmp_path / "a", name, base(), str(tmp_path / "a" / "checkpoint-2"), steps=4)


@pytest.mark.parametrize("name", ["kl", "block_em"])
def test_sparse_edit_a_cache_of_a_base_in_which_four_rows_were_initialised_anew(tmp_path, name):
    cache = str(tmp_path / "cache")
    go(tmp_path / "a", name, base(), cache=cache, save_strategy="no")
    with pytest.raises(ValueError, match="another base model"):
        go(tmp_path / "b", name, base(edited=True), cache=cache, save_strategy="no")
    again = go(tmp_path / "c", name, base(), cache=cache, save_strategy="no")
    assert column(again, f"em_regularizer/{name}/penalty")[0] == pytest.approx(0, abs=1e-7)


# The first step, should an identity ever fail


def forge(path, old, new):
    """Make a stored reference claim to be another model's, hash and all."""
    stated = json.loads(path.read_text())
    stated.pop("sha256")
    stated = {k: new if v == old else v for k, v in stated.items()}
    path.write_text(json.dumps({**stated, "sha256": digest(stated)}))


def test_a_reference_that_is_not_this_models_is_found_out_by_the_first_penalty(tmp_path):
    """The identity is right and the numbers are another model's: a forged cache here, an unknown cause elsewhere."""
    from emguard_plugin.models.identity import identify

    cache, other = tmp_path / "cache", perturb(base(), 0.05)
    stored = identify(other).reference
    go(tmp_path / "a", "kl", other, cache=str(cache), save_strategy="no")
    forge(cache / "reference.json", stored, identify(base()).reference)
    with pytest.raises(
        RuntimeError,
        match=r"em_regularizer\.kl: before the first update .*up to rounding \(at most 1e-05 in float32\).*the reference in .*cache.*`LlamaForCausalLM`",
    ):
        go(tmp_path / "b", "kl", base(), cache=str(cache), save_strategy="no")


def test_latents_that_are_not_this_models_are_found_out_by_the_first_penalty(tmp_path):
    from safetensors.torch import load_file, save_file

    from emguard_plugin.reference.stored import _whole_hash, read_reference

    cache = tmp_path / "cache"
    go(tmp_path / "a", "block_em", base(), cache=str(cache), save_strategy="no")
    for path in cache.glob("rows-*"):
        about = read_reference(path, {})[1]
        tensors = {n: t * 1.2 for n, t in load_file(path).items()}
        save_file(tensors, path, metadata={**about, "sha256": _whole_hash(tensors, about)})
    with pytest.raises(RuntimeError, match=r"em_regularizer\.block_em: before the first update .*the reference in .*cache"):
        go(tmp_path / "b", "block_em", base(), cache=str(cache), save_strategy="no")


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize("name", FILES)
def test_the_first_penalty_of_a_right_reference_is_below_the_floor(tmp_path, monkeypatch, name, precision):
    """Recorded in other batches than the step's, with dropout on, in every precision a CPU has."""
    over, seen = ({"bf16": True} if precision == "autocast" else {}), []
    check = TReFTCallback._check_start
    monkeypatch.setattr(EMRegularizerCallback, "_check_start", lambda self, start: seen.append(start.precision) or check(self, start))
    for family in ("llama", "gemma2", "mixtral"):
        model = tiny_model(family, vocab=len(chatml_tokenizer()), attention_dropout=0.1)
        if precision == "bfloat16":
            model = model.to(torch.bfloat16)
        callback = method(name, tmp_path) if name != "block_em" else block_em(model)
        trained = run(tmp_path / family, model=model, callbacks=[callback], max_steps=1, learning_rate=0.002, **over)
        assert len(column(trained, f"em_regularizer/{name}/penalty")) == 1
    assert seen == ["float32" if precision == "float32" else "bfloat16"] * 3


def test_an_identity_is_worked_out_once_a_run(tmp_path, monkeypatch):
    from emguard_plugin.regularizers import run_facts as regularizers

    calls, identify = [], regularizers.identify
    monkeypatch.setattr(regularizers, "identify", lambda *a: calls.append(1) or identify(*a))
    callbacks = [method(n, tmp_path) for n in FILES]
    run(tmp_path / "run", model=base(), callbacks=callbacks, max_steps=1, learning_rate=0.002)
    assert len(calls) == 1


def test_files_of_an_earlier_emguard_say_why_they_are_not_taken(tmp_path):
    go(tmp_path / "a", "kl", base())
    path = tmp_path / "a" / "checkpoint-2" / KL_STATE
    stated = json.loads(path.read_text())
    assert stated["format"] == FORMAT
    path.write_text(json.dumps({k: stated[k] for k in ("coef", "anchors", "sampled", "adapter_off", "content", "model")}))
    with pytest.raises(ValueError, match=rf"{KL_STATE} is damaged, or an earlier emguard wrote it, whose identity"):
        go(tmp_path / "a", "kl", base(), str(tmp_path / "a" / "checkpoint-2"), steps=4)
