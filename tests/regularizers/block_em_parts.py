"""What the tests of BLOCK-EM's training half share."""

import torch

from emguard_plugin import BlockEMCallback
from emguard_plugin.latents import LatentSet, SubsetEncoder

LOG = "em_regularizer/block_em"
CALIBRATION = {"penalty": {"assistant": 2.0, "all": 8.0, "prompt": 6.0, "header": 1.0, "prefix": 4.0}, "task_loss_gap": 0.5}


def latent_set(model, layers=(1,), signs=(1, -1, 1, -1), calibration=CALIBRATION, seed=0, bias=0.5, scale=1.0):
    """Return latents that are on at most tokens, so that both signs have something to hold. Built without sae-lens."""
    width, g = model.config.get_text_config().hidden_size, torch.Generator().manual_seed(seed)
    encoders = []
    for n in layers:
        weight = torch.randn(len(signs), width, generator=g) * scale
        encoders.append(
            SubsetEncoder(
                n, [7 * i + n for i in range(len(signs))], torch.tensor(signs).float(), "standard", "relu_pre", weight,
                torch.full((len(signs),), bias), weight / weight.norm(dim=-1, keepdim=True),
            )
        )  # fmt: skip
    return LatentSet.for_model(model, encoders, calibration=dict(calibration or {}))


def block_em(model, coef=3.0, layers=(1,), set_kwargs=None, **kw):
    return BlockEMCallback(coef=coef, latents=latent_set(model, layers, **(set_kwargs or {})), **kw)
