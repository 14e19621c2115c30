import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from emguard_plugin.models.kv import decoder_layers, has_rotary_positions, num_layers, read_kv
from tests.tiny import FAMILIES, lora, perturb, tiny_model

IDS = torch.tensor([[4, 9, 17, 33, 8, 21, 60]])
REST = torch.randint(4, 300, (1, 9), generator=torch.Generator().manual_seed(0))


def full_sequence_kv(model, ids, monkeypatch):
    """Keys and values inside the training forward, caught where attention uses them: an independent second way."""
    module, seen = sys.modules[type(model).__module__], []
    attention = module.eager_attention_forward

    def record(module, query, key, value, *args, **kwargs):
        seen.append((key.transpose(1, 2).flatten(2), value.transpose(1, 2).flatten(2)))
        return attention(module, query, key, value, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(module, "eager_attention_forward", record)
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    return seen


def test_prefix_forward_sees_what_every_training_row_sees(family, monkeypatch):
    model = perturb(tiny_model(family, attn_implementation="eager"))
    alone = read_kv(model, IDS, range(3))
    inside = full_sequence_kv(model.train(), torch.cat([IDS, REST], 1), monkeypatch)
    assert len(inside) == 3
    for i, (k, v) in enumerate(inside):
        torch.testing.assert_close(alone.keys[i], k[:, :7], rtol=1e-4, atol=2e-5)
        torch.testing.assert_close(alone.values[i], v[:, :7], rtol=1e-4, atol=2e-5)


def test_gradient_equals_the_training_rows_gradient(family, monkeypatch):
    model = perturb(tiny_model(family, attn_implementation="eager"))
    grads = []
    for way in ("alone", "inside"):
        model.zero_grad()
        if way == "alone":
            kv = read_kv(model, IDS, range(3))
            loss = sum(t.square().sum() for t in (*kv.keys, *kv.values))
        else:
            seen = full_sequence_kv(model, torch.cat([IDS, REST], 1), monkeypatch)
            loss = sum(k[:, :7].square().sum() + v[:, :7].square().sum() for k, v in seen)
        loss.backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    touched = {n for n, g in grads[0].items() if g.abs().max() > 0}
    assert any("embed" in n for n in touched)
    assert len(touched) > 8
    for n in touched:
        torch.testing.assert_close(grads[0][n], grads[1][n], rtol=2e-3, atol=2e-4)


def test_windowed_layers_return_all_positions():
    model = tiny_model("gemma2")  # window 4, prefix of 7
    assert all(k.shape[1] == 7 for k in read_kv(model, IDS, range(3)).keys)


def test_modes_are_restored_and_dropout_is_off():
    model = lora(tiny_model("llama"), lora_dropout=0.5)
    model.train()
    model.get_base_model().model.layers[1].eval()
    before = [m.training for m in model.modules()]
    a, b = read_kv(model, IDS, range(3)), read_kv(model, IDS, range(3))
    assert [m.training for m in model.modules()] == before
    assert not all(before)
    assert all(torch.equal(x, y) for x, y in zip(a.keys, b.keys, strict=True))


@pytest.mark.parametrize("reentrant", [True, False])
def test_cache_has_gradient_under_gradient_checkpointing(reentrant):
    model = tiny_model("llama")
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    kv = read_kv(model, IDS, range(3))
    assert all(t.requires_grad for t in (*kv.keys, *kv.values))


def test_layers_are_read_in_the_order_asked():
    model = tiny_model("llama")
    every, some = read_kv(model, IDS, range(3)), read_kv(model, IDS, [2, 0])
    assert torch.equal(some.keys[0], every.keys[2])
    assert torch.equal(some.values[1], every.values[0])


HYBRID = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16, "decoder_sparse_step": 1,
    "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
}  # fmt: skip


def test_linear_attention_layers_are_an_error_unless_left_out():
    config = AutoConfig.for_model("qwen3_next", vocab_size=330, **HYBRID)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=r"layer 0 of Qwen3NextForCausalLM keeps no keys.*treft\.layers"):
        read_kv(model, IDS, range(4))
    assert [k.shape for k in read_kv(model, IDS, [1, 3]).keys] == [(1, 7, 16)] * 2


def test_a_model_without_attention_is_an_error():
    config = AutoConfig.for_model("mamba", vocab_size=330, hidden_size=32, num_hidden_layers=2, state_size=4)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match="keeps no keys and values"):
        read_kv(model, IDS, range(2))


def test_facts_about_models(family):
    model = tiny_model(family)
    assert num_layers(model) == len(decoder_layers(model)) == 3
    assert has_rotary_positions(model)


def test_learned_positions_are_not_rotary():
    gpt2 = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", vocab_size=330, n_embd=32, n_layer=2, n_head=4))
    assert not has_rotary_positions(gpt2)
    assert set(FAMILIES) == {"llama", "qwen2", "qwen3", "gemma2", "gemma3", "mistral", "phi3", "gpt_neox", "mixtral"}
