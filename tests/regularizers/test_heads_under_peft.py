"""Whatever PEFT puts around head and embeddings, the reference is the base's, or the wrapper is refused (trained-tied-tokens)."""

import copy

import pytest
import torch

from emguard_plugin.models import output_head
from emguard_plugin.models.adapters import adapter_off, adapter_starts_at_zero
from emguard_plugin.models.output_head import base_head, call_with_hidden, head_tensors, logit_transform, trains_head
from emguard_plugin.regularizers.moment import Moment
from emguard_plugin.regularizers.start import check_switched_off
from tests.regularizers.kl_parts import batch, drawn, gradients, kl_from_logits, started
from tests.tiny import chatml_tokenizer, lora, perturb, tiny_model

IDS = torch.tensor([[4, 9, 5, 33, 8, 6, 60]])
WRAPPERS = {
    "plain": {},
    "dora": {"use_dora": True},
    "saved_head": {"modules_to_save": ["lm_head"]},
    "saved_embeddings": {"modules_to_save": ["embed_tokens"]},
    "saved_both": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "saved_and_tied": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "tokens": {"trainable_token_indices": [5, 6]},
    "tokens_of_head": {"trainable_token_indices": {"lm_head": [5, 6]}},
    "tokens_of_both": {"trainable_token_indices": {"lm_head": [5, 6], "embed_tokens": [7, 6]}},
    "tokens_tied": {"trainable_token_indices": [5, 6], "ensure_weight_tying": True},
    "lora_embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "dora_embeddings": {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True},
}
HEAD_TRAINS = {
    False: {"saved_head", "saved_both", "tokens_of_head", "tokens_of_both"},
    True: {"saved_head", "saved_both", "saved_and_tied", "tokens", "tokens_of_head", "tokens_of_both", "tokens_tied"},
}
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def wrapped(name, tied, **over):
    return lora(perturb(tiny_model("llama", tie_word_embeddings=tied, **over), 0.2), **copy.deepcopy(WRAPPERS[name]))


def logits_of(model, reference):
    hidden, _ = call_with_hidden(model, IDS, None, lambda h: h)
    return hidden @ head_tensors(model, reference)[0].T


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", WRAPPERS)
@torch.no_grad()
def test_the_reference_is_a_plain_base_model_to_1e_6(name, tied):
    plain = perturb(tiny_model("llama", tie_word_embeddings=tied), 0.2).eval()
    model = wrapped(name, tied)
    assert adapter_starts_at_zero(model)
    perturb(model, 0.1).eval()
    assert trains_head(model) == (name in HEAD_TRAINS[tied])
    with adapter_off(model):
        torch.testing.assert_close(logits_of(model, reference=True), plain(IDS).logits, rtol=0, atol=1e-6)
        torch.testing.assert_close(model(IDS).logits, plain(IDS).logits, rtol=0, atol=1e-6)
    torch.testing.assert_close(logits_of(model, reference=False), model(IDS).logits, rtol=0, atol=1e-5)
    assert (model(IDS).logits - plain(IDS).logits).abs().max() > 0.01
    base_head(model, IDS, logit_transform(model, IDS), switched=True)
    check_switched_off(model, IDS, "em_regularizer.kl")


@pytest.mark.parametrize("direction", ["base||model", "model||base"])
@pytest.mark.parametrize("name", ["tokens", "tokens_of_both", "saved_both", "saved_and_tied"])
def test_penalty_and_gradient_of_a_head_that_trains(tmp_path, name, direction):
    """The penalty over full logits of a plain base model; its gradient reaches the trained rows."""
    tokenizer = chatml_tokenizer()
    plain = perturb(tiny_model("llama", vocab=len(tokenizer), tie_word_embeddings=True), 0.2).eval()
    model = lora(copy.deepcopy(plain), **copy.deepcopy(WRAPPERS[name]))
    callback = started(model, tmp_path, tokenizer, direction=direction)
    perturb(model, 0.1)
    value = callback.measure(Moment(model, batch(), 1)).value
    value.backward()
    got = gradients(model)
    model.zero_grad()
    want = kl_from_logits(model, plain, drawn(callback, 1), direction)
    want.backward()
    torch.testing.assert_close(value, want, rtol=1e-4, atol=1e-6)
    assert got.keys() == gradients(model).keys()
    for n, g in gradients(model).items():
        torch.testing.assert_close(got[n], g, rtol=1e-3, atol=1e-6)
    assert any("trainable_tokens" in n or "modules_to_save" in n for n in got)


@pytest.mark.parametrize("target", [{"target_modules": ["q_proj", "lm_head"]}, {"target_parameters": ["lm_head.weight"]}], ids=str)
def test_an_adapter_on_the_head_is_refused(target):
    with pytest.raises(ValueError, match="does not support an adapter on the output head"):
        output_head.output_head(lora(tiny_model("llama"), **target))


def test_a_head_that_is_not_the_models_own_is_an_error(monkeypatch):
    """What a wrapper that nobody has seen would do."""
    model = perturb(lora(perturb(tiny_model("llama"), 0.2), modules_to_save=["lm_head"]), 0.1).eval()
    linear = output_head._linear
    for wrong in (True, False):  # the trained head for the reference, the base's for the trained one
        monkeypatch.setattr(output_head, "_linear", lambda head, reference, w=wrong: linear(head, not w))
        with pytest.raises(ValueError, match=r"makes logits that are .*% away from the model's own"):
            base_head(model, IDS, (1.0, None), switched=True)


def test_an_adapter_that_cannot_be_switched_off_is_an_error(monkeypatch):
    """At step 0 nothing has moved, so equal logits prove nothing: what trains must not stand behind the reference at all."""
    model = lora(tiny_model("llama")).eval()
    layer = next(m for m in model.modules() if type(m).__name__ == "Linear" and hasattr(m, "lora_A"))
    monkeypatch.setattr(type(layer), "disable_adapters", property(lambda self: False))
    with pytest.raises(ValueError, match=r"still runs through base_model\.model\.model\.layers\..*lora_B.*which trains"):
        check_switched_off(model, IDS, "em_regularizer.kl")
