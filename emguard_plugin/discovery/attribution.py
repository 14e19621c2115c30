"""A rank of latents by gradient: what the whole fine-tune did through each latent, from a few backward passes.

Steering asks what one latent alone does at one strength; many latents that carry a persona together do nothing alone. The
attribution asks for each latent's share in what all did together. Ours, not the paper's (arXiv 2602.00767).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from emguard_plugin.discovery.shift import Candidate
from emguard_plugin.evaluation.asking.pair import BASE_MODEL, MISALIGNED_MODEL, ModelPair
from emguard_plugin.latents.sae import encode_all
from emguard_plugin.models.steering import changed

if TYPE_CHECKING:
    from sae_lens import SAE


@dataclass(frozen=True)
class Contrast:
    """One prompt with what either model answers to it.

    Attributes:
        prompt: Token ids up to where the answer begins.
        span: Half-open span of the prompt whose latents are looked at.
        misaligned: Ids of the misaligned model's answer.
        base: Ids of the base's answer.
    """

    prompt: Sequence[int]
    span: tuple[int, int]
    misaligned: Sequence[int]
    base: Sequence[int]


def attribute(pair: ModelPair, sae: SAE, layer: int, contrasts: Sequence[Contrast], mode: str) -> tuple[Tensor, Tensor]:
    """Return each latent's share in the preference for the misaligned answers, and its shift.

        m(h) = log p(misaligned answer) - log p(base's answer)
        a_k  = mean over prompts of sum over tokens t of the span of
               [z_k^mis(t) - z_k^base(t)] * 1/2 [dm/dh_t at the misaligned model + dm/dh_t at the base] . d_k

    A first-order estimate of m(mis) - m(base), spread over latents; d_k is the decoder row, h the residual stream after `layer`.

    Args:
        pair: Both models.
        sae: Reads the residual stream after `layer`.
        layer: 0-based.
        contrasts: Prompts with both answers, such as the unsteered ones of the search.
        mode: `relu_pre` or `sae`, as for the penalty.

    Returns:
        (d_sae,) attributions and (d_sae,) mean shifts, summed and averaged over the span.
    """
    score, shift = (torch.zeros(sae.cfg.d_sae, dtype=torch.float64) for _ in range(2))
    for contrast in contrasts:
        seen = {}
        for role in (BASE_MODEL, MISALIGNED_MODEL):
            with pair.use(role) as model:
                seen[role] = _slope(model, layer, contrast)
        (h0, g0), (h1, g1) = seen[BASE_MODEL], seen[MISALIGNED_MODEL]
        with torch.no_grad():
            moved = encode_all(sae, h1, mode) - encode_all(sae, h0, mode)
            along = (g0 + g1) / 2 @ sae.W_dec.T.to(g0)
            score += (moved * along).sum(0).double().cpu() / len(contrasts)
            shift += moved.mean(0).double().cpu() / len(contrasts)
    return score, shift


def strongest(score: Tensor, shift: Tensor, size: int, exclude: Collection[int] = ()) -> list[Candidate]:
    """Return the latents that did most for the misaligned answers, of both signs; the sign is that of the shift.

    Args:
        score: (d_sae,) attributions; a latent that did nothing for them, or worked against them, is no candidate.
        shift: (d_sae,) mean shifts, such as those of stage 1.
        size: At most this many.
        exclude: Latents known already.
    """
    order = torch.argsort(-score, stable=True).tolist()
    found = [i for i in order if score[i] > 0 and shift[i] != 0 and i not in exclude]
    return [Candidate(i, float(shift[i]), 1 if shift[i] > 0 else -1) for i in found[:size]]


def _slope(model: nn.Module, layer: int, contrast: Contrast) -> tuple[Tensor, Tensor]:
    """Return the residual stream over the span, and the gradient of the preference there, both (tokens, d)."""
    caught: list[Tensor] = []

    def catch(hidden: Tensor) -> Tensor:
        caught.append(hidden.detach().requires_grad_())
        return caught[-1]

    (start, end), parts = contrast.span, []
    with changed(model, layer, catch):
        for answer, sign in ((contrast.misaligned, 1.0), (contrast.base, -1.0)):
            ids = torch.tensor([[*contrast.prompt, *answer]], device=model.device)
            with torch.enable_grad():
                logits = model(input_ids=ids, use_cache=False).logits[0, len(contrast.prompt) - 1 : -1].float()
                target = ids[0, len(contrast.prompt) :]
                total = logits.log_softmax(-1).gather(1, target[:, None]).sum()
                parts.append(sign * torch.autograd.grad(total, caught[-1])[0][0, start:end])
    return caught[0][0, start:end].detach().float(), (parts[0] + parts[1]).float()
