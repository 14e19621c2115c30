"""Reading the residual stream: every family, checkpointing kind, and the last layer before its norm."""

import pytest
import torch

from emguard_plugin.models.modes import eval_mode
from emguard_plugin.models.residual import decoder, keep_residual, read_residual
from tests.tiny import lora, perturb, tiny_model

IDS = torch.arange(5, 29).reshape(2, 12)


def test_every_family_is_what_transformers_reports(family):
    model = tiny_model(family).eval()
    with keep_residual(model, [0, 1, 2]) as kept:
        out = model(IDS, output_hidden_states=True)
    hidden = kept.take([0, 1, 2], with_gradient=True)
    for n in (0, 1):
        torch.testing.assert_close(hidden[n], out.hidden_states[n + 1])
    read = read_residual(model, [0, 2], kwargs={"input_ids": IDS})
    assert sorted(read) == [0, 2]
    assert all(torch.equal(read[n], hidden[n]) for n in read)
    assert not read[2].requires_grad


@pytest.mark.parametrize("tower", ["CLIPVisionConfig", "SiglipVisionConfig"])
def test_an_image_tower_with_as_many_layers_is_not_the_decoder(tower):
    import transformers
    from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    vision = getattr(transformers, tower)(**sizes, image_size=8, patch_size=4)
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=LlamaConfig(**sizes, vocab_size=330)))
    for m in (model, lora(model, target_modules=["q_proj"])):
        assert {type(layer).__name__ for layer in decoder(m)[1]} == {"LlamaDecoderLayer"}


def test_the_last_layer_is_read_before_the_final_norm():
    model = tiny_model("llama").eval()
    with torch.no_grad():
        model.model.norm.weight.fill_(3.0)
    with keep_residual(model, [2]) as kept:
        out = model(IDS, output_hidden_states=True)
    last = kept.take([2], with_gradient=False)[2]
    torch.testing.assert_close(model.model.norm(last), out.hidden_states[-1])
    assert not torch.allclose(last, out.hidden_states[-1])


def test_layers_above_are_not_run():
    model, ran = lora(tiny_model("llama")).eval(), []
    for n, layer in enumerate(decoder(model)[1]):
        layer.register_forward_hook(lambda *_, n=n: ran.append(n))
    read_residual(model, [1], kwargs={"input_ids": IDS, "labels": IDS, "use_cache": True})
    assert ran == [0, 1]
    model(IDS)
    assert ran == [0, 1, 0, 1, 2], "and nothing of it is left behind"


def _offloading(function, *args, **kwargs):
    """What Axolotl's offloading does to gradient checkpointing, on the CPU: the forward pass runs without gradient."""

    class Offloaded(torch.autograd.Function):
        @staticmethod
        def forward(ctx, run, hidden):
            ctx.run = run
            ctx.save_for_backward(hidden)
            with torch.no_grad():
                return run(hidden)

        @staticmethod
        def backward(ctx, grad):
            (hidden,) = ctx.saved_tensors
            hidden = hidden.detach().requires_grad_()
            with torch.enable_grad():
                out = ctx.run(hidden)
            torch.autograd.backward(out, grad)
            return None, hidden.grad

    return Offloaded.apply(function, *args)


def _gradients(kind):
    model = perturb(lora(tiny_model("llama"))).train()
    if kind != "off":
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": kind == "reentrant"})
    if kind == "offloading":
        for layer in decoder(model)[1]:
            layer._gradient_checkpointing_func = _offloading
    theirs = [layer.__dict__.get("_gradient_checkpointing_func") for layer in decoder(model)[1]]
    with keep_residual(model, [1, 2]) as kept:
        loss = model(IDS, labels=IDS).loss
    assert [layer.__dict__.get("_gradient_checkpointing_func") for layer in decoder(model)[1]] == theirs
    hidden = kept.take([1, 2], with_gradient=True)
    (loss + hidden[1].square().mean() + hidden[2].square().mean()).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", ["reentrant", "non_reentrant", "offloading"])
def test_gradients_under_checkpointing(kind):
    expected, got = _gradients("off"), _gradients(kind)
    for n, g in expected.items():
        torch.testing.assert_close(got[n], g, rtol=1e-4, atol=1e-6)


def test_a_checkpoint_wrapper_around_the_layer():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper

    for impl in (CheckpointImpl.REENTRANT, CheckpointImpl.NO_REENTRANT):
        model = perturb(lora(tiny_model("llama"))).train()
        model.enable_input_require_grads()
        layers = decoder(model)[1]
        for i, layer in enumerate(layers):
            layers[i] = checkpoint_wrapper(layer, checkpoint_impl=impl)
        with keep_residual(model, [1]) as kept:
            model(IDS, use_cache=False)
        assert kept.take([1], with_gradient=True)[1].grad_fn is not None


def test_nothing_captured_or_no_gradient_is_an_error():
    model = lora(tiny_model("llama"), target_modules=["down_proj"], layers_to_transform=[2])
    with keep_residual(model, [1]) as kept:
        pass
    with pytest.raises(RuntimeError, match="did not pass layer 1"):
        kept.take([1], with_gradient=True)
    with keep_residual(model, [1]) as kept:
        model(IDS)
    with pytest.raises(RuntimeError, match="layer 1 carries no gradient"):
        kept.take([1], with_gradient=True)
    assert kept.take([1], with_gradient=False)
    with pytest.raises(RuntimeError, match="did not pass"):
        kept.take([1], with_gradient=False)


def test_the_first_forward_counts():
    model = tiny_model("llama").eval()
    with keep_residual(model, [0]) as kept:
        model(IDS)
        model(IDS + 1)
    assert torch.equal(kept.take([0], False)[0], read_residual(model, [0], kwargs={"input_ids": IDS})[0])


def test_a_change_in_place_is_found_out():
    model = tiny_model("llama").eval()
    decoder(model)[1][1].register_forward_pre_hook(lambda module, args: args[0].mul_(2))
    with torch.no_grad(), keep_residual(model, [0]) as kept:
        model(IDS)
    with pytest.raises(RuntimeError, match="in place"):
        kept.take([0], False)


def test_what_the_decoder_was_called_with():
    model = lora(tiny_model("llama"))
    with keep_residual(model, [0]) as kept:
        model(input_ids=IDS, position_ids=torch.arange(12)[None].expand(2, -1), labels=IDS)
    assert torch.equal(kept.kwargs["input_ids"], IDS)
    assert "labels" not in kept.kwargs
    with eval_mode(model):
        again = read_residual(model, [0], kept.args, kept.kwargs)[0]
    assert torch.equal(again, kept.hidden[0])
