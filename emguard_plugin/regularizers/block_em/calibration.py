"""`coef: auto`: lambda from what a latent set's discovery measured. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

GAP_PER_PENALTY = 100.0
COEF_BOUNDS = (1e-3, 1e5)


def calibrated_coef(calibration: Mapping[str, Any], tokens: str, shared_by: int = 1) -> float:
    """Return `clip(100 * task_loss_gap / penalty[tokens], 1e-3, 1e5)`.

    At this coefficient the unguarded model's own latents would cost 100 times the task loss that it gained by moving them.
    lambda has the unit 1/z^2, so it has to come from the latents at hand.

    Args:
        calibration: Of the latent set.
        tokens: Which tokens are held, as the block names them.
        shared_by: What the penalty is divided by: the number of latents where it averages over them.

    Raises:
        ValueError: without a usable calibration.
    """
    penalty, gap = (calibration.get("penalty") or {}).get(tokens), calibration.get("task_loss_gap")
    if penalty is None or gap is None:
        raise ValueError(
            f"`em_regularizer.block_em.coef: auto` needs the latent set's calibration for `tokens: {tokens}`, and it has none. Run "
            "`emguard discover` on it again, or set `coef` to a number (the paper's 13000 fits its own SAE alone)."
        )
    if not (math.isfinite(penalty) and math.isfinite(gap)):
        raise ValueError(
            f"`em_regularizer.block_em.coef: auto`: the latent set's calibration is not finite (penalty {penalty}, gap {gap}). Run "
            "`emguard discover` on it again, or set `coef` to a number."
        )
    if not gap > 0:
        raise ValueError(
            f"`em_regularizer.block_em.coef: auto`: the misaligned model's task loss is no lower than the base's (gap {gap:g}), so there "
            "is nothing to weigh against. Set `coef` to a number."
        )
    return min(max(GAP_PER_PENALTY * gap / max(penalty / shared_by, 1e-30), COEF_BOUNDS[0]), COEF_BOUNDS[1])
