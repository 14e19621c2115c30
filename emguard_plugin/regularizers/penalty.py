"""What a regularizer returns, and whether it can train anything."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

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


def may_train(value: Tensor) -> bool:
    """Whether a trainable parameter stands behind `value`, as far as the autograd graph shows.

    `requires_grad` alone proves nothing: `enable_input_require_grads`, which hosts call for adapters, makes the output of
    frozen embeddings require grad. A custom function that runs code of its own in backward (reentrant checkpointing,
    offloading, tiled MLPs) can hide parameters, so it counts as training.
    """
    seen, stack = set(), [value.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(getattr(node, "variable", None), nn.Parameter) or _runs_code(node):
            return True
        stack += [n for n, _ in node.next_functions]
    return False


def _runs_code(node: Any) -> bool:
    if not isinstance(node, torch.autograd.function.BackwardCFunction):
        return False
    return any(callable(v) and not isinstance(v, type) for v in vars(node).values())
