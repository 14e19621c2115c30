"""The papers' equations as pure tensor functions. Imports torch alone; every reduction is in fp32."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

EPS = 1e-12


def relative_squared_l2(x: Tensor, ref: Tensor) -> Tensor:
    """Return `||x - ref||^2 / ||ref||^2` over the last dimension.

    Written without a square root, so that the gradient at `x == ref` is exactly 0 and finite.

    Args:
        x: (..., D), any float dtype.
        ref: (..., D), broadcastable to `x`; no gradient flows into it.

    Returns:
        (...), fp32. The denominator is clamped at 1e-12.
    """
    ref = ref.detach().float()
    return (x.float() - ref).square().sum(-1) / ref.square().sum(-1).clamp_min(EPS)


def kv_drift(
    keys: Sequence[Tensor], values: Sequence[Tensor], ref_keys: Sequence[Tensor], ref_values: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Return the per-layer drifts of keys and values (TReFT, Eq. 2).

    Layer l: `L_K = (1/|T|) sum_t ||k_t - k_t_ref||^2 / ||k_t_ref||^2`, `L_V` likewise. All KV heads of a layer form one
    vector, as in the authors' code; a mean of per-head ratios is another number.

    Args:
        keys: One tensor per layer, (..., T, D) with D = kv_heads * head_dim; leading dimensions are averaged too.
        values: As `keys`.
        ref_keys: The reference model's keys, same shapes or broadcastable.
        ref_values: The reference model's values.

    Returns:
        (L_K, L_V), each (layers,), fp32.

    Raises:
        ValueError: when the numbers of layers differ or are zero.
    """
    if not keys or not len(keys) == len(values) == len(ref_keys) == len(ref_values):
        raise ValueError(f"kv_drift: {len(keys)} key, {len(values)} value, {len(ref_keys)} and {len(ref_values)} reference layers")
    k = torch.stack([relative_squared_l2(x, r).mean() for x, r in zip(keys, ref_keys, strict=True)])
    v = torch.stack([relative_squared_l2(x, r).mean() for x, r in zip(values, ref_values, strict=True)])
    return k, v


def treft_penalty(key_drift: Tensor, value_drift: Tensor) -> Tensor:
    """Return `L_KV = (1/L) sum_l (L_K + L_V)` (TReFT, Eq. 3): keys and values added, layers averaged.

    Args:
        key_drift: (layers,) from `kv_drift`.
        value_drift: (layers,) from `kv_drift`.

    Returns:
        A scalar, fp32.
    """
    return (key_drift + value_drift).mean()


def token_kl(logits: Tensor, ref_logits: Tensor, direction: str = "base||model") -> Tensor:
    """Return the exact KL divergence of next-token distributions, in nats, summed over the vocabulary.

    `base||model`: `KL(p_base || p_model) = sum_v p_base(v) (log p_base(v) - log p_model(v))`
    `model||base`: `KL(p_model || p_base) = sum_v p_model(v) (log p_model(v) - log p_base(v))`

    Args:
        logits: (..., V) of the model in training.
        ref_logits: (..., V) of the base model; no gradient flows into them.
        direction: `base||model` or `model||base`.

    Returns:
        (...), nats per token, fp32 or wider. Never a mean over the vocabulary: the coefficient would then depend on V.

    Raises:
        ValueError: for another direction.
    """
    log_q, log_p = _log_softmax(logits), _log_softmax(ref_logits.detach())
    if direction == "base||model":
        return (log_p.exp() * (log_p - log_q)).sum(-1)
    if direction == "model||base":
        return (log_q.exp() * (log_q - log_p)).sum(-1)
    raise ValueError(f"direction {direction!r} is neither `base||model` nor `model||base`")


def _log_softmax(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def block_em_violation(
    z: Tensor,
    base: Tensor,
    signs: Tensor,
    pre: Tensor | None = None,
    base_pre: Tensor | None = None,
) -> Tensor:
    """Return each latent's squared move in the bad direction (BLOCK-EM, arXiv 2602.00767, Eq. 1).

    K+ (sign +1): `ReLU(z - z_base)^2`. K- (sign -1): `ReLU(z_base - z)^2`. The latter has no gradient once z is 0: a latent
    that was switched off cannot be pulled back. With pre-activations p, K- has `ReLU(p_base - p)^2` where z_base > 0, else 0.

    Args:
        z: (..., K) activations of the model in training.
        base: (..., K) activations of the base model; no gradient flows into them.
        signs: (K,) of +1 and -1.
        pre: (..., K) pre-activations, for the other form of K-.
        base_pre: (..., K) the base model's.

    Returns:
        (..., K), fp32 or wider.
    """
    dtype = torch.promote_types(z.dtype, torch.float32)
    shift = signs.to(dtype) * (z.to(dtype) - base.detach().to(dtype))
    bad = shift.relu()
    if pre is not None and base_pre is not None:
        fall = (base_pre.detach().to(dtype) - pre.to(dtype)).relu() * (base.detach() > 0)
        bad = torch.where(signs < 0, fall, bad)
    return bad.square()


def block_em_penalty(violation: Tensor, latent_reduction: str = "sum") -> Tensor:
    """Return each token's penalty: `block_em_violation` summed (the paper's) or averaged over the latents.

    Args:
        violation: (..., K).
        latent_reduction: `sum` or `mean`; with `mean` a coefficient means the same for K times as many latents.

    Returns:
        (...), in squared units of the activations.

    Raises:
        ValueError: for another reduction.
    """
    if latent_reduction not in ("sum", "mean"):
        raise ValueError(f"latent_reduction {latent_reduction!r} is neither `sum` nor `mean`")
    return violation.sum(-1) if latent_reduction == "sum" else violation.mean(-1)
