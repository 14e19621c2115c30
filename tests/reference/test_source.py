"""What a `cache` key comes to, and how a recording is cut into batches."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from emguard_plugin.reference.source import Source, batches
from tests.tiny import lora, perturb, tiny_model

IDS = torch.tensor([[4, 9, 17, 33]])


@pytest.mark.parametrize(
    ("cache", "adapter", "live", "folder", "words"),
    [
        ("auto", True, True, None, "the model with its adapter switched off"),
        ("auto", False, False, None, "the reference recorded in memory"),
        ("live", True, True, None, "the model with its adapter switched off"),
        ("memory", True, False, None, "the reference recorded in memory"),
        ("copy", False, True, None, "the frozen copy"),
        ("./there", False, False, "there", "the reference in there"),
    ],
)
def test_what_a_key_comes_to(cache, adapter, live, folder, words):
    model = lora(tiny_model("llama")) if adapter else tiny_model("llama")
    source = Source("em_regularizer.kl.cache", cache, model)
    assert (source.live, source.adapter_off, source.copied) == (live, adapter, cache == "copy")
    assert (None if source.folder is None else str(source.folder)) == folder
    assert source.in_words() == words


def test_live_without_a_switch_says_which_kind_is_missing():
    with pytest.raises(ValueError, match=r"`em_regularizer\.block_em\.cache: live` needs an adapter to switch off, and there is none"):
        Source("em_regularizer.block_em.cache", "live", tiny_model("llama"))
    with pytest.raises(ValueError, match=r"needs an adapter that starts at zero and trains alone"):
        Source("em_regularizer.block_em.cache", "live", perturb(lora(tiny_model("llama"))))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_reading_is_the_base_without_dropout_and_leaves_the_model_as_it_was(dropout):
    base = tiny_model("llama")
    with torch.no_grad():
        want = base.eval()(input_ids=IDS).logits
    model = lora(base, lora_dropout=dropout)
    source = Source("k", "auto", model)
    perturb(model, 0.3).train()
    with source.reading(model):
        found = model(input_ids=IDS).logits
    assert torch.equal(found, want)
    assert not found.requires_grad
    assert model.training
    assert not torch.equal(model(input_ids=IDS).logits, want)


@given(st.lists(st.integers(1, 40), max_size=30), st.integers(1, 100))
def test_batches_hold_every_row_once_and_keep_to_the_limit(lengths, tokens):
    found = batches(lengths, tokens)
    assert sorted(i for rows in found for i in rows) == list(range(len(lengths)))
    assert all(len(rows) == 1 or len(rows) * max(lengths[i] for i in rows) <= tokens for rows in found)
    assert [lengths[i] for rows in found for i in rows] == sorted(lengths)
