"""Loading through sae-lens, and what is refused there."""

import pytest
import torch

from emguard_plugin.latents import sae as sl
from tests.latents.parts import LATENTS, hidden, random_sae


def test_a_folder(tmp_path):
    sae = random_sae("jumprelu")
    sae.save_model(tmp_path)
    loaded = sl.load_sae(str(tmp_path))
    assert torch.equal(loaded.W_enc, sae.W_enc)
    assert not loaded.W_enc.requires_grad
    assert sl.layer_of(loaded) == 1


@pytest.mark.parametrize("norm", ["expected_average_only_in", "covariance_whitening"])
def test_an_unfolded_normalisation_is_refused(norm, tmp_path):
    random_sae(normalize_activations=norm).save_model(tmp_path)
    with pytest.raises(ValueError, match=f"normalize_activations: {norm}"):
        sl.load_sae(str(tmp_path))


def test_folded_normalisations_are_exact(tmp_path):
    sae, h = random_sae("gated", normalize_activations="expected_average_only_in"), hidden(40)
    before = sae.encode(h * 0.3)  # what the trainer fed it
    sae.fold_activation_norm_scaling_factor(0.3)
    sae.save_model(tmp_path)
    torch.testing.assert_close(sl.subset(sl.load_sae(str(tmp_path)), [3, 4], [1, 1], "sae").encode(h), before[..., [3, 4]])

    sae = random_sae("jumprelu", normalize_activations="covariance_whitening", apply_b_dec_to_input=False)
    mean, matrix = torch.randn(16), torch.eye(16) + 0.1 * torch.randn(16, 16)
    before = sae.encode((h - mean) @ matrix)
    sae.fold_activation_whitening(mean, matrix, torch.linalg.inv(matrix))
    z = sl.subset(sae, [3, 4], [1, 1], "sae").encode(h)
    torch.testing.assert_close(z, before[..., [3, 4]], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("./nowhere", "no folder with an SAE"),
        ("goodfire-llama-3.1-8b-instruct/layer_9", "has no SAE 'layer_9'.*goodfire-llama-3.1-8b-instruct/layer_19"),
        ("goodfire-llama-3.1-8b-instruc", "Did you mean .*goodfire-llama-3.1-8b-instruct"),
    ],
)
def test_no_such_sae(source, message):
    with pytest.raises(ValueError, match=message):
        sl.load_sae(source)


@pytest.mark.parametrize(
    ("hook", "layer"),
    [("blocks.19.hook_resid_post", 19), ("blocks.20.hook_resid_pre", 19), ("model.layers.7", 7)],
)
def test_layer(hook, layer):
    assert sl.layer_of(random_sae(hook=hook)) == layer


@pytest.mark.parametrize("hook", ["blocks.3.hook_mlp_out", "blocks.0.hook_resid_pre", "blocks.3.attn.hook_z", None])
def test_other_places_are_refused(hook):
    with pytest.raises(ValueError, match="only the residual stream after a block"):
        sl.layer_of(random_sae(hook=hook))


def test_ids_out_of_range():
    with pytest.raises(ValueError, match=f"latents 0 to {LATENTS - 1}; there is no 48, -1"):
        sl.subset(random_sae(), [1, LATENTS, -1], [1, 1, 1])


def test_abstopk_has_no_relu_of_the_pre_activation():
    with pytest.raises(ValueError, match="mode `sae`"):
        sl.subset(random_sae("abstopk"), [1], [1], "relu_pre")


def test_reconstruction_error():
    sae = random_sae(latents=16)
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(16))
        sae.W_dec.copy_(torch.eye(16))
        sae.b_enc.fill_(100.0)
        sae.b_dec.fill_(-100.0)
    sae.cfg.apply_b_dec_to_input = False
    h = hidden(100)
    assert sl.reconstruction_error(sae, h) < 1e-8
    with torch.no_grad():
        sae.W_dec.zero_()
        sae.b_dec.copy_(h.reshape(-1, 16).mean(0))
    assert sl.reconstruction_error(sae, h) == pytest.approx(1, abs=1e-5)
