"""The random numbers of an answer, and the token that one of them picks."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import torch


class AnswerKey(NamedTuple):
    """What names one answer of one model."""

    suite: str
    question: str
    paraphrase: int
    draw: int


def uniforms(seed: int, key: AnswerKey, steps: int) -> np.ndarray:
    """Return the random numbers of one answer: float64, shape (steps,), in [0, 1)."""
    digest = hashlib.sha256(json.dumps([seed, *key]).encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little"))).random(steps)


def inverse_cdf(scores: torch.Tensor, uniform: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """Pick one token per row: the smallest k with sum_{j<=k} softmax(scores / temperature)_j > uniform.

    Args:
        scores: Logits, shape (B, V), any float dtype; computed in fp64.
        uniform: Shape (B,), in [0, 1).
        temperature: Shape (B,), >= 0; rows with 0 take the argmax.

    Returns:
        Token ids, shape (B,), int64.

    Raises:
        RuntimeError: If a row holds NaN: the model is broken, and no token would be a draw from it.
    """
    import torch

    greedy = temperature == 0
    scaled = scores.double() / torch.where(greedy, 1.0, temperature).unsqueeze(1)
    cdf = torch.softmax(scaled, dim=-1).cumsum(-1)
    total = cdf[:, -1:]
    if torch.isnan(total).any():
        raise RuntimeError("the model returned NaN logits, so no answer can be drawn from it. Check its weights.")
    # The sum is 1 up to rounding; a target below it guarantees a token of positive probability.
    picked = torch.searchsorted(cdf, uniform.unsqueeze(1) * total, right=True).squeeze(1)
    return torch.where(greedy, scores.argmax(-1), picked.clamp(max=scores.shape[-1] - 1))
