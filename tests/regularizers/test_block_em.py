"""The callback by itself: its value by hand, what is held where, the rules around it, and bad input."""

import logging

import pytest
import torch

from emguard_plugin import BlockEMCallback
from emguard_plugin.latents import LatentSet
from emguard_plugin.models.adapters import adapter_off
from emguard_plugin.models.modes import eval_mode
from emguard_plugin.models.residual import read_residual
from emguard_plugin.regularizers.block_em.calibration import calibrated_coef
from emguard_plugin.regularizers.block_em.rules import warn_if_bypassed
from emguard_plugin.regularizers.moment import Moment
from emguard_plugin.regularizers.run_facts import RunFacts
from tests.latents.parts import small_set
from tests.regularizers.block_em_parts import CALIBRATION, block_em, latent_set
from tests.tiny import chat_rows, lora, perturb, tiny_model


def rows(tokenizer, n=4):
    made = []
    for row in chat_rows(n):
        out = tokenizer.apply_chat_template(row["messages"], tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        labels = [i if m else -100 for i, m in zip(out["input_ids"], out["assistant_masks"], strict=True)]
        made.append({"input_ids": out["input_ids"], "labels": labels})
    return made


def padded(rows):
    longest = max(len(r["input_ids"]) for r in rows)

    def column(values, fill):
        return torch.tensor([v + [fill] * (longest - len(v)) for v in values])

    return {
        "input_ids": column([r["input_ids"] for r in rows], 0),
        "labels": column([r["labels"] for r in rows], -100),
        "attention_mask": column([[1] * len(r["input_ids"]) for r in rows], 0),
    }


def packed(rows):
    def join(name):
        return torch.tensor([[i for r in rows for i in r[name]]])

    positions = torch.cat([torch.arange(len(r["input_ids"])) for r in rows])[None]
    return {"input_ids": join("input_ids"), "labels": join("labels"), "position_ids": positions}


def run_of(model, tokenizer, dataset=None, **kw):
    return RunFacts(model=model, tokenizer=tokenizer, dataset=dataset if dataset is not None else rows(tokenizer), seed=0, **kw)


def moved(model, scale=0.1):
    """Make a trained adapter of a fresh one, after `prepare` has looked at it."""
    return perturb(model, scale)


def measured(callback, model, batch, step=0):
    tokens = (batch["labels"][..., 1:] != -100).sum()
    forward = {k: v for k, v in batch.items() if k != "labels"}
    with callback.watch(Moment(model, batch, step)) as seen:
        model(**forward, use_cache=False)
    return callback.measure(Moment(model, batch, step, tokens=tokens, seen=seen))


@pytest.fixture
def model(tokenizer):
    return lora(tiny_model("llama", vocab=len(tokenizer))).train()


def by_hand(model, latents, batch, held):
    """The formula, latent by latent and token by token, with none of the code under test but the encoder."""
    kwargs = {k: v for k, v in batch.items() if k != "labels"}
    with eval_mode(model):
        now = read_residual(model, latents.layers, kwargs=kwargs)
        with adapter_off(model):
            then = read_residual(model, latents.layers, kwargs=kwargs)
    total = 0.0
    for e in latents.encoders:
        z, z0 = e.encode(now[e.layer]), e.encode(then[e.layer])
        for b, t in held.nonzero().tolist():
            for k, sign in enumerate(e.signs.tolist()):
                d = sign * (z[b, t, k] - z0[b, t, k]).item()
                total += d * d if d > 0 else 0.0
    return total / (batch["labels"][..., 1:] != -100).sum().item()


@pytest.mark.parametrize("layers", [(1,), (0, 2)])
@pytest.mark.parametrize("tokens", ["assistant", "all", "prompt"])
def test_value_by_hand(model, tokenizer, tokens, layers):
    callback = block_em(model, layers=layers, tokens=tokens)
    callback.prepare(run_of(model, tokenizer))
    batch = padded(rows(tokenizer))
    assert measured(callback, model, batch).value.item() == 0.0
    moved(model)
    real, answer = batch["attention_mask"] > 0, batch["labels"] != -100
    held = {"assistant": answer, "all": real, "prompt": real & ~answer}[tokens]
    expected = by_hand(model, callback.latents, batch, held)
    penalty = measured(callback, model, batch)
    assert penalty.value.item() == pytest.approx(expected, rel=1e-4)
    assert expected > 1e-3
    assert 0 < penalty.metrics["violating"] < 1
    assert penalty.per_layer.sum().item() == pytest.approx(expected, rel=1e-4)


def test_mean_and_pre_activations(model, tokenizer):
    batch = padded(rows(tokenizer))
    kinds = {"one": {}, "mean": {"latent_reduction": "mean"}, "pre": {"k_minus": "pre_activation"}}
    callbacks = {k: block_em(model, **kw) for k, kw in kinds.items()}
    words = {k: c.prepare(run_of(model, tokenizer)) for k, c in callbacks.items()}
    moved(model)
    values = {k: measured(c, model, batch).value.item() for k, c in callbacks.items()}
    assert values["mean"] == pytest.approx(values["one"] / 4, rel=1e-5)
    assert values["pre"] >= values["one"] > 0
    assert "pre-activations" in words["pre"]


@pytest.mark.parametrize("tokens", ["assistant", "all", "prompt", "header", "prefix"])
@pytest.mark.parametrize("cache", ["auto", "memory"])
def test_packed_and_padded_are_one(model, tokenizer, tokens, cache):
    callbacks = [block_em(model, tokens=tokens, cache=cache, set_kwargs={"seed": 3}) for _ in range(2)]
    for c in callbacks:
        c.prepare(run_of(model, tokenizer))
    moved(model)
    a = measured(callbacks[0], model, padded(rows(tokenizer)))
    b = measured(callbacks[1], model, packed(rows(tokenizer)))
    assert a.value.item() == pytest.approx(b.value.item(), rel=1e-4)
    assert a.value.item() > 1e-5
    for name in ("violating", "shift", "outside_shift"):
        assert a.metrics[name].item() == pytest.approx(b.metrics[name].item(), rel=1e-3)


def test_no_gradient_above_the_blocked_layer(model, tokenizer):
    callback = block_em(model, layers=(1,))
    callback.prepare(run_of(model, tokenizer))
    moved(model)
    measured(callback, model, padded(rows(tokenizer))).value.backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            above = ".layers.2." in name
            assert (p.grad is None or not p.grad.any()) == above, name


def test_the_gradient_is_that_of_finite_differences(tokenizer):
    model = lora(tiny_model("llama", vocab=len(tokenizer))).train()
    callback = block_em(model, set_kwargs={"bias": 2.0})
    callback.prepare(run_of(model, tokenizer))
    model.double()
    moved(model, 0.05)
    batch = padded(rows(tokenizer, 2))
    p = next(p for n, p in model.named_parameters() if "layers.0" in n and "lora_B" in n)
    measured(callback, model, batch).value.backward()
    direction, step = p.grad.sign().double(), 1e-4
    callback.coef = 0.0
    with torch.no_grad():
        ends = []
        for s in (step, -step):
            p.add_(s * direction)
            ends.append(measured(callback, model, batch).value.item())
            p.sub_(s * direction)
    assert (ends[0] - ends[1]) / (2 * step) == pytest.approx((p.grad * direction).sum().item(), rel=1e-2)


def test_outside_shift_sees_what_the_latents_do_not(model, tokenizer):
    """Move the residual stream along an encoder row, then across all of them."""
    latents = latent_set(model, signs=(1,), bias=50.0)
    row = latents.encoders[0].weight[0]
    across = torch.randn(32, generator=torch.Generator().manual_seed(4))
    across -= row * (across @ row) / row.square().sum()
    batch, found = padded(rows(tokenizer)), {}
    for name, direction in {"along": row, "across": across}.items():
        callback = BlockEMCallback(coef=0.0, latents=latents)
        callback.prepare(run_of(model, tokenizer))
        base_read = callback._base.read
        callback._base.read = lambda m, k, f=base_read: {1: f(m, k)[1] - direction}  # noqa: B023
        penalty = measured(callback, model, batch)
        found[name] = (penalty.value.item(), penalty.metrics["outside_shift"].item())
    assert found["along"][0] > 1
    assert found["along"][1] < 1e-4
    assert found["across"][0] < 1e-6
    assert found["across"][1] > 0.5


# The coefficient and the yardstick


def test_automatic_coefficient(model, tokenizer):
    callback = block_em(model, coef="auto", tokens="prompt")
    words = callback.prepare(run_of(model, tokenizer))
    assert callback.coef == pytest.approx(100 * 0.5 / 6.0)
    assert "coef 8.33333, calibrated" in words
    assert "unguarded penalty 6" in words
    mean = block_em(model, coef="auto", tokens="prompt", latent_reduction="mean")
    mean.prepare(run_of(model, tokenizer))
    assert mean.coef == pytest.approx(4 * callback.coef), "the same weighted penalty"
    assert mean.yardstick == pytest.approx(1.5)


def test_the_coefficient_is_clipped():
    assert calibrated_coef({"penalty": {"all": 1e-9}, "task_loss_gap": 1.0}, "all") == 1e5
    assert calibrated_coef({"penalty": {"all": 1e9}, "task_loss_gap": 1.0}, "all") == 1e-3


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ({}, "needs the latent set's calibration for `tokens: all`"),
        ({"penalty": {"assistant": 1.0}, "task_loss_gap": 1.0}, "needs the latent set's calibration for `tokens: all`"),
        ({"penalty": {"all": 1.0}, "task_loss_gap": -0.5}, "nothing to weigh against"),
        ({"penalty": {"all": 1.0}, "task_loss_gap": 0.0}, "nothing to weigh against"),
        ({"penalty": {"all": float("nan")}, "task_loss_gap": 1.0}, "not finite"),
        ({"penalty": {"all": 1.0}, "task_loss_gap": float("inf")}, "not finite"),
    ],
)
def test_no_calibration(model, tokenizer, calibration, message):
    callback = block_em(model, coef="auto", tokens="all", set_kwargs={"calibration": calibration})
    with pytest.raises(ValueError, match=message):
        callback.prepare(run_of(model, tokenizer))


def test_a_void_constraint_is_warned_of(model, tokenizer, caplog):
    calibration = {"penalty": {**CALIBRATION["penalty"], "assistant": 1e-6}, "task_loss_gap": 0.5}
    with caplog.at_level(logging.WARNING):
        block_em(model, set_kwargs={"calibration": calibration}).prepare(run_of(model, tokenizer))
    assert "the constraint is void" in caplog.text
    assert "At `tokens: all` it is 8" in caplog.text
    caplog.clear()
    block_em(model).prepare(run_of(model, tokenizer))
    assert not caplog.text


@pytest.mark.parametrize("cache", ["live", "memory"])
def test_a_training_forward_that_is_not_the_bases_is_warned_of(tokenizer, caplog, cache):
    for dropout, message in ((0.0, ""), (0.5, "before the first update the latents of the training forward are")):
        torch.manual_seed(0)
        model = lora(tiny_model("llama", vocab=len(tokenizer), attention_dropout=dropout), lora_dropout=0.1).train()
        callback = block_em(model, cache=cache)
        callback.prepare(run_of(model, tokenizer))
        batch, found = padded(rows(tokenizer)), []
        for step in (0, 0, 1):
            with caplog.at_level(logging.WARNING):
                measured(callback, model, batch, step)
            found.append(caplog.text)
            caplog.clear()
        assert message in found[0]
        assert bool(found[0]) == bool(message)
        assert found[1:] == ["", ""], "once"


def test_conversations_that_see_each_other_behind_a_token_of_massive_norm(model, tokenizer):
    """Models put norms of a thousand times the others' on the first token, the same whether others stand before it."""
    data, found = rows(tokenizer), []
    with torch.no_grad():
        model.get_input_embeddings().weight[data[0]["input_ids"][0]] *= 3000
    batch = packed(data)
    sees = {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}  # transformers then masks causally alone
    callbacks = [block_em(model, cache=cache, coef=0.0, tokens="all") for cache in ("live", "memory", "memory")]
    for c in callbacks:
        c.prepare(run_of(model, tokenizer))
    for c, inputs in zip(callbacks[1:], (batch, sees), strict=True):
        measured(c, model, inputs)
        found.append(c._base._isolated)
    assert found == [True, False]
    moved(model)
    assert measured(callbacks[2], model, sees).value.item() == pytest.approx(measured(callbacks[0], model, sees).value.item(), rel=1e-3)


def test_a_bypassed_constraint_is_warned_of(caplog):
    with caplog.at_level(logging.WARNING):
        assert not warn_if_bypassed(0.0, 0.2, 2.0, step=5)
        assert not warn_if_bypassed(0.5, 0.2, 2.0, step=50)
        assert not warn_if_bypassed(0.0, 0.01, 2.0, step=50)
        assert not caplog.text
        assert warn_if_bypassed(0.001, 0.2, 2.0, step=50)
        assert warn_if_bypassed(0.0, 0.2, None, step=50)
    assert "has moved by 20 % outside the latents" in caplog.text


# Freezing, and bad input


def test_freeze_above(model, tokenizer):
    callback = block_em(model, freeze_above=True)
    words = callback.prepare(run_of(model, tokenizer))
    trains = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trains
    assert not any(".layers.2." in n for n in trains)
    assert any(".layers.1." in n for n in trains)
    assert "14 tensors above frozen" in words
    callback.release()
    assert any(".layers.2." in n for n, p in model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("make", "over", "message"),
    [
        (lambda m: m, {"optimizer_built": True}, "too late to freeze"),
        (lambda m: m.get_base_model(), {}, "needs an adapter"),
    ],
)
def test_freeze_above_refused(model, tokenizer, make, over, message):
    with pytest.raises(ValueError, match=message):
        block_em(model, freeze_above=True).prepare(run_of(make(model), tokenizer, **over))


def test_embeddings_that_train_before_the_decoder_sees_them_are_refused():
    """A multimodal model embeds outside its decoder: what the decoder was called with is the trained model's."""
    from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = LlavaConfig(
        vision_config=SiglipVisionConfig(**sizes, image_size=8, patch_size=4), text_config=LlamaConfig(**sizes, vocab_size=330)
    )
    ids = torch.arange(5, 25)[None]
    batch, kinds = {"input_ids": ids, "labels": ids}, {"q_proj": True, "embed_tokens": False}
    for target, fine in kinds.items():
        model = lora(LlavaForConditionalGeneration(config), target_modules=rf".*language_model.*{target}").train()
        model.enable_input_require_grads()
        latents = LatentSet.for_model(model, latent_set(tiny_model("llama")).encoders)
        callback = BlockEMCallback(coef=1.0, latents=latents, cache="memory")
        callback.prepare(RunFacts(model=model, tokenizer=None, dataset=[], seed=0))
        if fine:
            assert measured(callback, model, batch).value.item() == 0.0
            with pytest.raises(ValueError, match="do not tell images or sounds"):
                callback._base.get(model, None, {**batch, "pixel_values": ids}, ids > 0)
        else:
            with pytest.raises(ValueError, match="embeddings that are being trained"):
                measured(callback, model, batch)


def test_nothing_left_to_train(tokenizer):
    model = lora(tiny_model("llama", vocab=len(tokenizer)), target_modules=["down_proj"], layers_to_transform=[2])
    with pytest.raises(ValueError, match="nothing trains at or below layer 1"):
        block_em(model, freeze_above=True).prepare(run_of(model, tokenizer))


def test_an_adapter_above_alone_is_an_error(tokenizer):
    model = lora(tiny_model("llama", vocab=len(tokenizer)), target_modules=["down_proj"], layers_to_transform=[2]).train()
    callback = block_em(model)
    callback.prepare(run_of(model, tokenizer))
    with pytest.raises(RuntimeError, match="layer 1 carries no gradient"):
        measured(callback, model, padded(rows(tokenizer)))
    model.enable_input_require_grads()
    with pytest.raises(RuntimeError, match="the penalty has no gradient"):
        measured(callback, model, padded(rows(tokenizer)))


def test_a_penalty_without_the_training_forward_is_an_error(model, tokenizer):
    callback = block_em(model)
    callback.prepare(run_of(model, tokenizer))
    with callback.watch(Moment(model, {}, 0)) as seen:
        pass
    with pytest.raises(RuntimeError, match="did not pass layer 1"):
        callback.measure(Moment(model, padded(rows(tokenizer)), 0, seen=seen))


@pytest.mark.parametrize(
    ("kw", "message"),
    [
        ({"latents": "./nowhere.json"}, "nowhere.json` does not exist"),
        ({"latents": "a.json", "tokens": "assistent"}, "tokens"),
        ({"latents": "a.json", "cache": "memry"}, "Did you mean 'memory'"),
        ({"latents": "a.json", "coef": -1.0}, "at least 0"),
        ({"latents": ""}, "latents"),
    ],
)
def test_bad_settings(model, tokenizer, kw, message):
    with pytest.raises(ValueError, match=message):
        BlockEMCallback(**{"coef": 1.0, **kw}).prepare(run_of(model, tokenizer))


def test_another_model(tokenizer, model):
    callback = BlockEMCallback(coef=1.0, latents=latent_set(tiny_model("llama", vocab=len(tokenizer), seed=9)))
    with pytest.raises(ValueError, match="another checkpoint"):
        callback.prepare(run_of(model, tokenizer))


def test_a_set_from_a_real_sae(model, tokenizer, tmp_path):
    path = small_set(model, layers=(0, 1), kind="topk", mode="sae", ids=(1, 2, 3)).save(tmp_path / "latents.json")
    callback = BlockEMCallback(coef=1.0, latents=path, tokens="all")
    callback.prepare(run_of(model, tokenizer))
    moved(model)
    assert measured(callback, model, padded(rows(tokenizer))).value.item() > 0


@pytest.mark.parametrize(
    ("tokens", "over", "message"),
    [
        ("header", {"dataset": [{"input_ids": [1, 2, 3]}] * 4}, "lack the chat template's tokens"),
        ("prefix", {"dataset": [{"input_ids": [1, 2, 3]}] * 4}, "tokens: prefix`: 4 of 4 training rows"),
        ("prefix", {"dataset": []}, "training data is empty"),
        ("prefix", {"wrapped_packing": True}, "wrapped` loses where conversations begin"),
    ],
)
def test_template_tokens_must_occur_in_the_data(model, tokenizer, tokens, over, message):
    with pytest.raises(ValueError, match=message):
        block_em(model, tokens=tokens).prepare(run_of(model, tokenizer, **over))


def test_prefix_tokens_weigh_with_their_own_calibration(model, tokenizer):
    callback = block_em(model, coef="auto", tokens="prefix")
    assert "prefix tokens" in callback.prepare(run_of(model, tokenizer))
    assert callback.coef == pytest.approx(100 * 0.5 / 4.0)
