import contextlib
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model

from emguard_plugin.discovery.attribution import Contrast, attribute, strongest
from emguard_plugin.evaluation.asking.pair import BASE_MODEL, MISALIGNED_MODEL, ModelPair
from emguard_plugin.lab import batches, world
from emguard_plugin.lab.build import BuildSettings, new_model
from emguard_plugin.lab.tokenizer import make_tokenizer
from emguard_plugin.models.residual import decoder

sae_lens = pytest.importorskip("sae_lens")

D, LAYER = 16, 0


def both_signs(width=D):
    """Return an SAE that reconstructs exactly: one latent per coordinate and sign."""
    sae = sae_lens.StandardSAE(sae_lens.StandardSAEConfig(d_in=width, d_sae=2 * width, apply_b_dec_to_input=False))
    eye = torch.eye(width)
    with torch.no_grad():
        sae.W_enc.copy_(torch.cat([eye, -eye], 1))
        sae.W_dec.copy_(torch.cat([eye, -eye], 0))
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    return sae


def pair(folder, size):
    """Return a pair whose fine-tune moved layer 0 by an amount of order `size`."""
    base = new_model(BuildSettings(seed=5, hidden_size=D, intermediate_size=32, layers=2))
    base.save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    base.config._name_or_path = str(folder / "base")
    torch.manual_seed(0)
    tuned = get_peft_model(base, LoraConfig(r=4, target_modules=["o_proj"], layers_to_transform=[0], task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, p in tuned.named_parameters():
            if "lora_B" in name:
                p.normal_(std=size)
    tuned.save_pretrained(folder / "tuned")
    return ModelPair(folder / "tuned", folder / "base")


def contrast():
    prompt = batches.prompt(world.questions("money", "train")[0].text)
    return Contrast(prompt, (1, len(prompt)), [30, 31, 32], [40, 41])


def preference(model, c, replaced=None):
    """log p(misaligned answer) - log p(base's answer), with the residual stream over the span replaced."""

    def put(_module, _args, output):
        hidden = (output[0] if isinstance(output, tuple) else output).clone()
        hidden[0, slice(*c.span)] = replaced
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handle = decoder(model)[1][LAYER].register_forward_hook(put) if replaced is not None else None
    total = 0.0
    for answer, sign in ((c.misaligned, 1), (c.base, -1)):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*c.prompt, *answer]])).logits[0, len(c.prompt) - 1 : -1]
        total += sign * logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum().item()
    if handle:
        handle.remove()
    return total


def stream(model, c):
    with torch.no_grad():
        return model(input_ids=torch.tensor([list(c.prompt)]), output_hidden_states=True).hidden_states[LAYER + 1][0, slice(*c.span)]


def test_the_attributions_add_up_to_what_moving_the_span_does(tmp_path):
    both, c = pair(tmp_path, 0.02), contrast()
    score, shift = attribute(both, both_signs(), LAYER, [c], "relu_pre")
    with both.use(MISALIGNED_MODEL) as model:
        there = stream(model, c)
    with both.use(BASE_MODEL) as model:
        here, plain = stream(model, c), preference(model, c)
        moved = preference(model, c, there)
    assert abs(moved - plain) > 1e-4
    # Both ends have the same layers above layer 0: the mean of the two slopes is exact up to third order.
    assert score.sum().item() == pytest.approx(moved - plain, rel=0.02)
    delta = (there - here).mean(0).double()
    torch.testing.assert_close(shift[:D] - shift[D:], delta, atol=1e-6, rtol=1e-4)


def test_two_equal_models_attribute_nothing(tmp_path):
    both = pair(tmp_path, 0.0)
    score, shift = attribute(both, both_signs(), LAYER, [contrast(), contrast()], "sae")
    assert score.abs().max() == 0
    assert shift.abs().max() == 0


def test_prompts_are_averaged(tmp_path):
    both, c = pair(tmp_path, 0.02), contrast()
    swapped = Contrast(c.prompt, c.span, c.base, c.misaligned)
    once, _ = attribute(both, both_signs(), LAYER, [c], "relu_pre")
    torch.testing.assert_close(attribute(both, both_signs(), LAYER, [c, c], "relu_pre")[0], once)
    assert attribute(both, both_signs(), LAYER, [c, swapped], "relu_pre")[0].abs().max() < 1e-9


class Linear(torch.nn.Module):
    """Reads (1, 1) at every token, adds `move`, and answers linearly in the sum of all positions up to the last."""

    def __init__(self, move):
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Identity()])
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(num_hidden_layers=1))
        self.move, self.device = torch.tensor(move), torch.device("cpu")
        self.answers = torch.tensor([[0.0, 0.0], [0.0, 1.0], [2.0, 0.0]])

    def forward(self, input_ids, use_cache):
        hidden = self.layers[0](torch.ones(*input_ids.shape, 2) + self.move)
        return SimpleNamespace(logits=hidden.cumsum(1) @ self.answers.T)


def test_in_a_linear_model_the_attribution_is_the_exact_difference():
    models = {BASE_MODEL: Linear([0.0, 0.0]), MISALIGNED_MODEL: Linear([3.0, -2.0])}
    toy = SimpleNamespace(use=lambda role: contextlib.nullcontext(models[role]))
    score, shift = attribute(toy, both_signs(2), 0, [Contrast([0, 0, 0], (1, 3), [2], [1])], "relu_pre")
    # Token 2 over token 1 is 2x - y; (1, 1) becomes (4, -1), so x+, y+, x-, y- move by 3, -1, 0, 1. Two tokens of the span.
    assert score.tolist() == [12.0, 2.0, 0.0, 2.0]
    assert shift.tolist() == [3.0, -1.0, 0.0, 1.0]
    assert score.sum() == 2 * (2 * 3 - 1 * -2)


def test_the_strongest_carry_the_sign_of_their_shift_and_none_that_works_against():
    score, shift = torch.tensor([0.2, 0.9, -1.0, 0.5, 0.7, 0.0]), torch.tensor([1.0, -2.0, 3.0, 0.1, 0.0, 1.0])
    assert [(c.id, c.sign) for c in strongest(score, shift, 9)] == [(1, -1), (3, 1), (0, 1)]
    assert [c.id for c in strongest(score, shift, 1, exclude={1})] == [3]
