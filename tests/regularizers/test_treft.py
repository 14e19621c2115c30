import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from emguard_plugin.regularizers.moment import Moment
from tests.regularizers.treft_parts import (
    HELPFUL,
    MODES,
    PIRATE,
    by_hand,
    drift,
    prefix_ids,
    ready,
    value,
)
from tests.tiny import chat_rows, lora, perturb, tiny_model

INPUTS = {"input_ids": torch.zeros(1, 1, dtype=torch.long)}


@pytest.fixture(params=MODES)
def mode(request):
    return request.param


def gradients(callback, model, step=0):
    """Penalise in training mode as the trainer does; return the gradient of every parameter that has one."""
    model.zero_grad()
    callback.measure(Moment(model.train(), INPUTS, step)).value.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def test_starts_at_zero_and_grows_to_the_value_worked_out_by_hand(family, mode):
    dropout = 0.0 if family == "mixtral" else 0.3  # PEFT has none for fused experts
    model = lora(tiny_model(family), lora_dropout=dropout)
    callback = ready(model, **MODES[mode])
    at_start = value(callback, model)
    start_gradients = gradients(callback, model)
    assert start_gradients
    if mode != "shared":
        assert at_start == 0
        assert not any(g.any() for g in start_gradients.values())
    perturb(model)
    now = value(callback, model)
    assert now > 1e-4
    assert now == pytest.approx(by_hand(model, mode, chat_rows(6)), rel=1e-3)
    moved = gradients(callback, model)
    assert all("lora_" in n for n in moved)
    assert {n.split("layers.")[1][0] for n, g in moved.items() if g.any()} == {"0", "1", "2"}


def test_a_step_along_the_gradient_lowers_the_penalty(family, mode):
    model = lora(tiny_model(family))
    callback = ready(model, **MODES[mode])
    value(callback, model)
    perturb(model)
    before, grads = value(callback, model), gradients(callback, model)
    rate = 0.1 * before / sum(g.square().sum() for g in grads.values())
    with torch.no_grad():
        for n, p in model.named_parameters():
            if n in grads:
                p -= rate * grads[n]
    assert value(callback, model) == pytest.approx(0.9 * before, rel=0.05)


def test_full_fine_tuning_reaches_every_weight_below_the_last_keys():
    model = tiny_model("llama")
    callback = ready(model)
    value(callback, model)
    moved = {n for n, g in gradients(callback, perturb(model)).items() if g.any()}
    last = {f"model.layers.2.{n}.weight" for n in ("self_attn.k_proj", "self_attn.v_proj", "input_layernorm")}
    below = {n for n, _ in model.named_parameters() if "layers.0" in n or "layers.1" in n}
    assert moved == below | last | {"model.embed_tokens.weight"}


def test_metrics_split_the_penalty():
    model = lora(tiny_model("llama"))
    callback = ready(model)
    value(callback, model)
    penalty = callback.measure(Moment(perturb(model), INPUTS, 0))
    parts = penalty.metrics["key_drift"] + penalty.metrics["value_drift"]
    torch.testing.assert_close(parts, penalty.value.detach())
    torch.testing.assert_close(penalty.per_layer.mean(), penalty.value)


def test_the_host_gets_its_modes_and_flags_back(mode):
    model = lora(tiny_model("llama"))
    frozen = [p for n, p in model.named_parameters() if "lora_A" in n]  # as in FFA-LoRA
    for p in frozen:
        p.requires_grad_(False)
    callback = ready(model.train(), **MODES[mode])
    model.get_base_model().model.layers[1].eval()
    before = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    callback.measure(Moment(model, INPUTS, 0))
    assert ([m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]) == before


# Which layers


def test_some_layers(mode):
    model = lora(tiny_model("llama"))
    callback = ready(model, layers=[2, 0, 2], **MODES[mode])
    value(callback, model)
    assert value(callback, perturb(model)) == pytest.approx(by_hand(model, mode, chat_rows(6), layers=[0, 2]), rel=1e-3)


def test_a_layer_out_of_range():
    with pytest.raises(ValueError, match=r"`em_regularizer\.treft\.layers: 3` is out of range: the model has layers 0 to 2"):
        ready(tiny_model("llama"), layers=[0, 3])


def test_hybrid_models_are_held_at_their_attention_layers():
    config = AutoConfig.for_model(
        "lfm2", vocab_size=330, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, layer_types=["conv", "full_attention", "conv"],
    )  # fmt: skip
    model = lora(AutoModelForCausalLM.from_config(config), target_modules=["k_proj"])
    with pytest.raises(ValueError, match=r"layer 0 of Lfm2ForCausalLM keeps no keys.*treft\.layers"):
        value(ready(model), model)
    callback = ready(model, layers=[1])
    assert value(callback, model) == 0
    assert value(callback, perturb(model)) > 0


# compat: the authors' released code


def residual_projections(model, ids):
    """k_proj and v_proj of what enters each layer, caught at its door."""
    seen, layers = {}, model.get_base_model().model.layers
    doors = [
        layer.register_forward_pre_hook(
            lambda _, args, kwargs, i=i: seen.update({i: args[0] if args else kwargs["hidden_states"]}), with_kwargs=True
        )
        for i, layer in enumerate(layers)
    ]
    kv = {}
    with torch.no_grad():
        model(input_ids=torch.tensor([ids]))
        for door in doors:
            door.remove()
        for i, layer in enumerate(layers):
            for name, projection in (("keys", layer.self_attn.k_proj), ("values", layer.self_attn.v_proj)):
                kv[i, name] = projection(seen[i])[0].double().numpy()
    return kv


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2", "mistral"])
def test_compat_projects_the_residual_stream(family):
    model = lora(tiny_model(family)).eval()
    callback = ready(model, compat=True)
    assert value(callback, model) == 0
    perturb(model)
    now, ids = residual_projections(model, prefix_ids()), prefix_ids()
    with model.disable_adapter():
        ref = residual_projections(model, ids)
    expected = drift(now, ref, [(t, t) for t in range(len(ids))])
    assert value(callback, model) == pytest.approx(expected, rel=1e-4)
    assert value(callback, model) != pytest.approx(by_hand(model, "prefix", []), rel=1e-2)
    assert any(g.any() for g in gradients(callback, model).values())


@pytest.mark.parametrize(("family", "module"), [("phi3", "Phi3Attention of layer 0"), ("gpt_neox", "GPTNeoXLayer of layer 0")])
def test_compat_needs_separate_projections(family, module):
    model = tiny_model(family)
    with pytest.raises(ValueError, match=rf"`treft\.compat: true` needs separate k_proj.*{module}.*`compat: false`"):
        value(ready(model, compat=True), model)


# Several prefixes


def one_prefix(model, system, reference_of):
    """Return a callback on data with this system prompt alone, its reference taken from `reference_of`."""
    callback = ready(model, chat_rows(6, system=system))
    value(callback, reference_of)
    return callback


def test_prefixes_are_drawn_by_frequency_from_seed_and_step_alone():
    model, base = lora(tiny_model("llama")), tiny_model("llama")
    rows = chat_rows(24, system=lambda i: PIRATE if i % 4 == 0 else HELPFUL)
    callback, again, other = (ready(model, rows, run={"seed": s}) for s in (7, 7, 8))
    for c in (callback, again, other):
        value(c, model)
    helpful, pirate = (one_prefix(model, s, base) for s in (HELPFUL, PIRATE))
    perturb(model)
    expected = {round(value(c, model), 6): name for name, c in (("helpful", helpful), ("pirate", pirate))}
    assert len(expected) == 2
    drawn = [expected[round(value(callback, model, step), 6)] for step in range(150)]
    assert 0.15 < drawn.count("pirate") / 150 < 0.35  # a quarter; 0.1 is 2.8 standard errors
    backwards = [value(again, model, step) for step in reversed(range(20))]
    assert backwards[::-1] == [value(callback, model, step) for step in range(20)]
    assert [value(other, model, step) for step in range(20)] != backwards[::-1]


def test_extra_prefixes_are_held():
    model = lora(tiny_model("llama"))
    callback = ready(model, extra_prefixes=[PIRATE, HELPFUL])  # the data have the helpful one already
    assert {value(callback, model, s) for s in range(20)} == {0}
    perturb(model)
    drawn = [value(callback, model, s) for s in range(60)]
    expected = [by_hand(model, "prefix", [], system=s) for s in (HELPFUL, PIRATE)]
    assert sorted(set(drawn)) == pytest.approx(sorted(expected), rel=1e-4)
    assert 18 < sum(d == pytest.approx(expected[1], rel=1e-4) for d in drawn) < 42
