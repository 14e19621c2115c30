"""A few columns must give what the whole SAE gives."""

import pytest
import torch

from emguard_plugin.latents import SubsetEncoder
from emguard_plugin.latents import sae as sl
from tests.latents.parts import LATENTS, WIDTH, by_hand, hidden, random_sae

IDS = [0, 5, 17, 30, LATENTS - 1]
SIGNS = [1, -1, 1, 1, -1]


def _registered():
    import sae_lens  # noqa: F401
    from sae_lens.registry import SAE_CLASS_REGISTRY

    return sorted(SAE_CLASS_REGISTRY)


def test_by_hand():
    z = by_hand().encode(torch.tensor([[3.0, 0.5], [0.0, -1.0]]))
    assert z.tolist() == [[2.0, 1.0], [0.0, 0.0]]
    assert by_hand().pre(torch.tensor([0.0, -1.0])).tolist() == [-1.0, -2.0]


@pytest.mark.parametrize("norm", ["none", "layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("kind", _registered())
def test_equal_to_sae_lens_or_refused_by_name(kind, norm):
    sae = random_sae(kind, normalize_activations=norm)
    if kind not in ("standard", "gated", "topk", "abstopk", "jumprelu"):
        with pytest.raises(ValueError, match=rf"kind {kind} cannot be used"):
            sl.subset(sae, IDS, SIGNS, "sae")
        return
    h = hidden(50, 7)
    encoder = sl.subset(sae, IDS, SIGNS, "sae")
    z, full = encoder.encode(h), sae.encode(h)
    torch.testing.assert_close(z, full[..., IDS], rtol=1e-4, atol=1e-5)
    assert 0 < (z != 0).float().mean() < 1
    assert bool(((z != 0) == (full[..., IDS] != 0)).all())
    torch.testing.assert_close(sl.encode_all(sae, h, "sae"), full)


@pytest.mark.parametrize("subtract", [True, False])
@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("kind", ["topk", "abstopk"])
def test_top_k_with_decoder_norms_and_ties_by_chunks(kind, rescale, subtract, monkeypatch):
    monkeypatch.setattr("emguard_plugin.latents.encoder.CUT_CHUNK", 7)
    sae = random_sae(kind, rescale_acts_by_decoder_norm=rescale, apply_b_dec_to_input=subtract)
    h = hidden(200)
    everything = sl.subset(sae, range(LATENTS), [1] * LATENTS, "sae").encode(h)
    torch.testing.assert_close(everything, sae.encode(h), rtol=1e-4, atol=1e-5)
    assert int((everything != 0).sum(-1).max()) <= 5


@pytest.mark.parametrize("kind", ["batchtopk", "matryoshka_batchtopk"])
def test_saved_batch_top_k_is_jumprelu(kind, tmp_path):
    from sae_lens.registry import get_sae_training_class
    from sae_lens.saes.sae import SAEMetadata

    cls, config = get_sae_training_class(kind)
    extra = {"matryoshka_widths": [24, LATENTS]} if "matryoshka" in kind else {}
    training = cls(config(d_in=WIDTH, d_sae=LATENTS, k=6, **extra))
    training.cfg.metadata = SAEMetadata(hook_name="blocks.2.hook_resid_post", model_name="tiny")
    with torch.no_grad():
        for p in training.parameters():
            p.copy_(torch.randn(p.shape) * 0.4)
        training.topk_threshold.fill_(0.7)
    training.save_inference_model(tmp_path)
    sae = sl.load_sae(str(tmp_path))
    encoder = sl.subset(sae, IDS, SIGNS, "sae")
    h = hidden(40)
    assert encoder.architecture == "jumprelu"
    assert encoder.layer == 2
    torch.testing.assert_close(encoder.encode(h), sae.encode(h)[..., IDS], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["standard", "gated", "topk", "jumprelu"])
def test_dense_relu_of_the_pre_activation(kind):
    sae, h = random_sae(kind), hidden(30)
    z = sl.subset(sae, IDS, SIGNS, "relu_pre").encode(h)
    a = h - sae.b_dec
    scale = sae.r_mag.exp() if kind == "gated" else 1
    p = a @ (sae.W_enc * scale) + (sae.b_mag if kind == "gated" else sae.b_enc)
    torch.testing.assert_close(z, p.relu()[..., IDS], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sl.encode_all(sae, h, "relu_pre")[..., IDS], z, rtol=1e-4, atol=1e-5)


def test_decoder_bias_is_folded_in_float64():
    sae = random_sae()
    with torch.no_grad():
        sae.b_dec.mul_(1e4)
    encoder = sl.subset(sae, IDS, SIGNS)
    exact = sae.b_enc[IDS].double() - sae.b_dec.double() @ sae.W_enc[:, IDS].double()
    assert torch.equal(encoder.bias, exact.float())


def test_gradient_is_that_of_sae_lens():
    for kind in ("standard", "gated", "topk", "jumprelu"):
        sae = random_sae(kind)
        grads = []
        for encode in (sl.subset(sae, IDS, SIGNS, "sae").encode, lambda x, s=sae: s.encode(x)[..., IDS]):
            h = hidden(20).requires_grad_()
            encode(h).square().sum().backward()
            grads.append(h.grad)
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


def test_fp32_whatever_the_model_computes_in():
    encoder, h = sl.subset(random_sae(), IDS, SIGNS), hidden(9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = encoder.encode(h.bfloat16())
    assert z.dtype == torch.float32
    assert torch.equal(z, encoder.encode(h.bfloat16().float()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": []}, "set K is empty"),
        ({"ids": [3, 3]}, "twice"),
        ({"signs": torch.tensor([1.0, 0.5])}, r"\+1 or -1"),
        ({"mode": "raw"}, "relu_pre, sae"),
        ({"architecture": "temporal"}, "temporal"),
        ({"mode": "sae", "architecture": "jumprelu"}, "needs threshold"),
        ({"mode": "sae", "architecture": "topk"}, "needs cut_weight"),
        ({"weight": torch.ones(3, 2)}, "encoder columns"),
    ],
)
def test_what_does_not_fit_together_is_refused(change, message):
    e = by_hand()
    with pytest.raises(ValueError, match=message):
        SubsetEncoder(**{**e.settings(), **e.tensors(), "signs": e.signs, **change})


def test_another_width_is_refused():
    with pytest.raises(ValueError, match="width of 2, the hidden states have 3"):
        by_hand().encode(torch.ones(4, 3))
