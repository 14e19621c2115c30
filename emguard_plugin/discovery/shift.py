"""Stage 1: how far the fine-tune moved each latent on the prompts, and which latents are worth steering."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from emguard_plugin.latents.sae import encode_all, reconstruction_error
from emguard_plugin.models.residual import decoder, row_residuals

if TYPE_CHECKING:
    from sae_lens import SAE
    from transformers import PreTrainedModel

Row = tuple[Sequence[int], int, int]
"""Token ids of a conversation, and the half-open span of it that is read."""

MAX_RECONSTRUCTION_ERROR = 0.5
"""The unexplained share of the residual stream's variance above which an SAE is refused. Published residual SAEs leave 0.1
to 0.35 on the model and layer that they were trained on; one of another model is about as bad as the mean (1) or worse."""
NEIGHBOUR = 0.5
"""Blocks in a row share most of their stream: in the lab an SAE leaves 0.06 to 0.9 on the block beside its own, and 0.001 to
0.016 on its own. So it is also refused where a neighbouring block is explained with less than this share of the error."""


@dataclass(frozen=True)
class Candidate:
    """A latent that may carry misalignment.

    Attributes:
        id: Its number in the SAE.
        delta: How far the fine-tune moved it on average.
        sign: +1 if it rose, -1 if it fell.
    """

    id: int
    delta: float
    sign: int


def check_reconstruction(sae: SAE, model: PreTrainedModel, layer: int, rows: Sequence[Row], batch_size: int) -> float:
    """Return the SAE's unexplained variance on the user's base model, and refuse an SAE that does not read it.

    Raises:
        ValueError: If it is above `MAX_RECONSTRUCTION_ERROR`, or much smaller at a neighbouring block.
    """
    error, named = _error(sae, model, layer, rows, batch_size), sae.cfg.metadata.model_name or "no model"
    if not error <= MAX_RECONSTRUCTION_ERROR:
        raise ValueError(
            f"the SAE leaves {error:.3g} of the variance behind block {layer} of this base model unexplained (at most "
            f"{MAX_RECONSTRUCTION_ERROR:g} is accepted; 1 is as bad as the mean). It names {named}: is it an SAE of this very model "
            "and layer? Give another `--sae`."
        )
    for other in (layer - 1, layer + 1):
        if 0 <= other < len(decoder(model)[1]) and _error(sae, model, other, rows, batch_size) < NEIGHBOUR * error:
            raise ValueError(
                f"the SAE says that it reads block {layer}, where it leaves {error:.2f} of the variance unexplained, but it explains "
                f"block {other} of this base model far better: is it an SAE of this very model and layer? It names {named}. Blocks "
                "count from 0, and block N is what `blocks.N.hook_resid_post` reads."
            )
    return error


def _error(sae: SAE, model: PreTrainedModel, layer: int, rows: Sequence[Row], batch_size: int) -> float:
    spans = {index: (start, end) for index, (_, start, end) in enumerate(rows)}
    found = row_residuals(model, layer, [ids for ids, _, _ in rows], batch_size)
    return reconstruction_error(sae, torch.cat([hidden[slice(*spans[index])] for index, hidden in found]))


def residual_scale(model: PreTrainedModel, layer: int, rows: Sequence[Row], batch_size: int) -> float:
    """Return s, the median of ||h_t||_2 over the tokens of all spans. Strengths of steering are in units of it."""
    found = row_residuals(model, layer, [ids for ids, _, _ in rows], batch_size)
    norms = [hidden[slice(*rows[index][1:])].norm(dim=-1) for index, hidden in found]
    return float(torch.cat(norms).median())


@torch.no_grad()
def mean_activations(model: PreTrainedModel, sae: SAE, layer: int, rows: Sequence[Row], mode: str, batch_size: int) -> Tensor:
    """Return the mean activation of every latent: over the tokens of a row's span first, then over rows.

    Returns:
        Shape (d_sae,), fp64, on the CPU.
    """
    total = torch.zeros(sae.cfg.d_sae, dtype=torch.float64)
    for index, hidden in row_residuals(model, layer, [ids for ids, _, _ in rows], batch_size):
        _, start, end = rows[index]
        total += encode_all(sae, hidden[start:end], mode).double().mean(0).cpu()
    return total / len(rows)


def candidates(delta: Tensor, per_sign: int, exclude: Collection[int] = ()) -> list[Candidate]:
    """Return the latents that moved most, the largest shifts first, `per_sign` that rose and `per_sign` that fell.

        Delta_k = E_x[ zbar_k^mis(x) ] - E_x[ zbar_k^base(x) ]                        (arXiv 2602.00767)

    Args:
        delta: Shape (d_sae,).
        per_sign: At most this many of each sign.
        exclude: Latents known already.
    """
    found = []
    for sign in (1, -1):
        order = torch.argsort(-sign * delta, stable=True).tolist()
        moved = [i for i in order if sign * float(delta[i]) > 0 and i not in exclude]
        found += [Candidate(i, float(delta[i]), sign) for i in moved[:per_sign]]
    return sorted(found, key=lambda c: (-abs(c.delta), c.id))
