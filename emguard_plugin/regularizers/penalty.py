"""What a regularizer returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

Every = Literal["optimizer_step", "micro_batch"]
"""What one penalty belongs to."""


@dataclass(frozen=True)
class Penalty:
    """What `EMRegularizerCallback.penalty` returns.

    Attributes:
        value: Scalar fp32 tensor with gradient, before `coef`.
        metrics: Detached scalars by short name; logged as `em_regularizer/<method>/<name>`.
        per_layer: (layers,) detached contributions, used to name the layer of a non-finite penalty.
        away: How far the model is from its reference, in the unit of `EMRegularizerCallback.floors`; default `value`.
        held: How many tokens this share of the penalty holds; the trainer stops a run in which a method holds none for 20
            optimizer steps. None where it cannot be said.
        misheld: How many of them are what they must not be, answers that the loss supervises; one stops the run.
    """

    value: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    per_layer: Tensor | None = None
    away: Tensor | None = None
    held: Tensor | int | None = None
    misheld: Tensor | None = None
