"""What stands behind a value in the autograd graph."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


def _nodes(value: Tensor) -> Iterator[Any]:
    """Yield every node behind a value once."""
    seen, stack = set(), [value.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        stack += [n for n, _ in node.next_functions]


def trained_behind(value: Tensor) -> nn.Parameter | None:
    """Return a trainable parameter that `value` was computed from, as the autograd graph shows, or None."""
    if value.grad_fn is None and value.requires_grad and isinstance(value, nn.Parameter):
        return value
    found = (getattr(node, "variable", None) for node in _nodes(value))
    return next((p for p in found if isinstance(p, nn.Parameter)), None)


def may_train(value: Tensor) -> bool:
    """Return whether a trainable parameter stands behind `value`, as far as the autograd graph shows.

    `requires_grad` alone proves nothing: `enable_input_require_grads`, which hosts call for adapters, makes the output of
    frozen embeddings require grad. A custom function that runs code of its own in backward (reentrant checkpointing,
    offloading, tiled MLPs) can hide parameters, so it counts as training.
    """
    return any(isinstance(getattr(node, "variable", None), nn.Parameter) or _runs_code(node) for node in _nodes(value))


def _runs_code(node: Any) -> bool:
    if not isinstance(node, torch.autograd.function.BackwardCFunction):
        return False
    return any(callable(v) and not isinstance(v, type) for v in vars(node).values())
