"""SAEs of every kind that sae-lens registers, small and random, and latent sets cut out of them."""

import torch

from emguard_plugin.latents import LatentSet, SubsetEncoder
from emguard_plugin.latents.sae import subset

WIDTH, LATENTS = 16, 48
SPECIFIC = {
    "topk": {"k": 5},
    "abstopk": {"k": 5},
    "transcoder": {"d_out": WIDTH, "apply_b_dec_to_input": False},
    "skip_transcoder": {"d_out": WIDTH, "apply_b_dec_to_input": False},
    "jumprelu_transcoder": {"d_out": WIDTH, "apply_b_dec_to_input": False},
    "jumprelu_skip_transcoder": {"d_out": WIDTH, "apply_b_dec_to_input": False},
    "temporal": {"n_heads": 2, "bottleneck_factor": 4, "kval_topk": 5, "tied_weights": False},
    "matching_pursuit": {"residual_threshold": 0.1},
}


def random_sae(kind="standard", width=WIDTH, latents=LATENTS, hook="blocks.1.hook_resid_post", seed=0, **config):
    """Return a sae-lens SAE with every parameter random: zero biases would hide what is forgotten."""
    from sae_lens.registry import get_sae_class
    from sae_lens.saes.sae import SAEMetadata

    cls, config_cls = get_sae_class(kind)
    sae = cls(config_cls(d_in=width, d_sae=latents, **{**SPECIFIC.get(kind, {}), **config}))
    sae.cfg.metadata = SAEMetadata(hook_name=hook, model_name="tiny")
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in sae.named_parameters():
            p.copy_(torch.randn(p.shape, generator=g) * 0.4)
            if name == "threshold":
                p.abs_()
    return sae


def hidden(*shape, seed=1):
    return torch.randn(*(shape or (3, 7)), WIDTH, generator=torch.Generator().manual_seed(seed)) * 2 + 0.5


def small_set(model, layers=(1,), ids=(3, 11, 20), signs=(1, -1, 1), mode="relu_pre", kind="standard", **about):
    """Return latents of random SAEs as wide as `model`."""
    width = model.config.get_text_config().hidden_size
    encoders = [subset(random_sae(kind, width, hook=f"blocks.{n}.hook_resid_post", seed=n), ids, signs, mode) for n in layers]
    return LatentSet.for_model(model, encoders, **about)


def by_hand(signs=(1, -1), layer=1):
    """Return two latents of width 2 whose activations one can work out: z = ReLU(x - 1), ReLU(2 y)."""
    return SubsetEncoder(
        layer, [0, 1], torch.tensor(signs), "standard", "relu_pre", torch.tensor([[1.0, 0.0], [0.0, 2.0]]),
        torch.tensor([-1.0, 0.0]), torch.eye(2),
    )  # fmt: skip
