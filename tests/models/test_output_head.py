import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from emguard_plugin.models.adapters import adapter_off
from emguard_plugin.models.modes import checkpointed_eval_mode
from emguard_plugin.models.output_head import call_with_hidden, head_tensors, logit_transform, output_head, trains_head
from emguard_plugin.regularizers.kl.linear_kl import Head, _logits
from tests.tiny import lora, perturb, tiny_model

IDS = torch.tensor([[4, 9, 17, 33, 8, 21, 60]])
SCALED = {
    "granite": {"logits_scaling": 8.0},
    "cohere": {"logit_scale": 0.0625},
    "gemma2": {"final_logit_softcapping": 3.0, "head_dim": 8},
    "llama": {},
}


def scaled_model(kind):
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = AutoConfig.for_model(kind, vocab_size=330, **small, **SCALED[kind], pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return AutoModelForCausalLM.from_config(config).eval()


def logits_by_hand(model, ids, reference=False):
    hidden, _ = call_with_hidden(model, ids, None, lambda h: h)
    weight, bias = head_tensors(model, reference)
    return _logits(hidden, *Head(weight, bias, *logit_transform(model, ids[:, :2])))


@pytest.mark.parametrize("kind", SCALED)
def test_scaled_and_capped_logits_are_the_models_own(kind):
    model = scaled_model(kind)
    with torch.no_grad():
        want = model(IDS).logits
        torch.testing.assert_close(logits_by_hand(model, IDS), want, rtol=1e-4, atol=1e-5)
    scale, softcap = logit_transform(model, IDS)
    assert (scale, softcap) == {"granite": (0.125, None), "cohere": (0.0625, None), "gemma2": (1.0, 3.0), "llama": (1.0, None)}[kind]


def test_every_family(family):
    model = perturb(tiny_model(family)).eval()
    with torch.no_grad():
        torch.testing.assert_close(logits_by_hand(model, IDS), model(IDS).logits, rtol=1e-4, atol=1e-4)


def test_the_head_is_put_back(family):
    model = tiny_model(family).eval()
    with pytest.raises(KeyError), torch.no_grad():
        call_with_hidden(model, IDS, None, lambda h: {}["x"])
    assert "forward" not in vars(output_head(model))


def test_unknown_changes_of_logits_are_refused():
    model = tiny_model("llama")
    forward = model.forward

    def squared(**kwargs):
        out = forward(**kwargs)
        out.logits = out.logits.square()
        return out

    model.forward = squared
    with pytest.raises(ValueError, match="changes the output of its head in a way that emguard does not know"):
        logit_transform(model, IDS)


def test_modules_to_save_keep_the_base_head():
    model = perturb(lora(tiny_model("llama"), modules_to_save=["lm_head"]), scale=0.1).eval()
    assert trains_head(model)
    with torch.no_grad(), adapter_off(model):
        torch.testing.assert_close(logits_by_hand(model, IDS, reference=True), model(IDS).logits, rtol=1e-4, atol=1e-5)
        assert (logits_by_hand(model, IDS) - model(IDS).logits).abs().max() > 0.01


def test_what_trains_the_head():
    assert not trains_head(lora(tiny_model("llama")))
    assert trains_head(tiny_model("llama"))
    tied = tiny_model("llama", tie_word_embeddings=True).requires_grad_(False)
    assert not trains_head(tied)
    tied.get_input_embeddings().weight.requires_grad_()
    assert trains_head(tied)


def test_heads_that_are_refused():
    with pytest.raises(ValueError, match=r"adapter on the output head\. Take `lm_head` out"):
        output_head(lora(tiny_model("llama"), target_modules=["q_proj", "lm_head"]))
    quantised = tiny_model("llama")
    quantised.lm_head.weight = torch.nn.Parameter(torch.zeros(330, 32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="Leave `lm_head` out of the quantisation"):
        output_head(quantised)
    config = AutoConfig.for_model("llama", vocab_size=330, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    from transformers import AutoModel

    with pytest.raises(ValueError, match="LlamaModel has none"):
        output_head(AutoModel.from_config(config))


@pytest.mark.parametrize("reentrant", [True, False])
def test_own_pass_is_checkpointed_without_dropout_and_has_the_same_gradient(reentrant):
    model = perturb(lora(tiny_model("llama"), lora_dropout=0.5), scale=0.05)
    names = [n for n, p in model.named_parameters() if p.requires_grad]

    def gradients(checkpointing):
        model.zero_grad()
        calls = []
        hook = model.get_base_model().model.layers[1].self_attn.register_forward_hook(lambda *a: calls.append(1))
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.train()
        theirs = model.get_base_model().model.layers[0].__dict__.get("_gradient_checkpointing_func")
        with checkpointed_eval_mode(model):
            hidden, _ = call_with_hidden(model, IDS, None, lambda h: h)
        assert all(m.training for m in model.modules())
        assert model.get_base_model().model.layers[0].__dict__.get("_gradient_checkpointing_func") is theirs
        hidden.square().sum().backward()
        hook.remove()
        assert all(m.training for m in model.modules())
        return len(calls), {n: model.get_parameter(n).grad.clone() for n in names}

    (once, want), (twice, got) = gradients(False), gradients(True)
    assert (once, twice) == (1, 2), "the checkpointed layers run again in the backward pass"
    for n in names:
        torch.testing.assert_close(got[n], want[n])
