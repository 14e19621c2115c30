"""The mode that a pass beside the training runs in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

_REPACKS = "support_avx512bf16_for_cpu"
"""bitsandbytes, on CPUs with bf16 instructions: a 4-bit layer in eval mode rounds and reorders its weights for
another kernel, and training goes on with what is left of them. A pass beside the training must not touch the weights."""


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put every module in eval mode and restore exactly those that trained.

    Without dropout the penalty is 0 at step 0; without gradient checkpointing the cache is returned.
    """
    training = [m for m in model.modules() if m.training]
    repacking = [m for m in training if m.__dict__.get(_REPACKS)]
    for m in training:
        m.__dict__["training"] = False  # nn.Module.__setattr__ is 20x slower, and this runs every step
    for m in repacking:
        m.__dict__[_REPACKS] = False
    try:
        yield
    finally:
        for m in training:
            m.__dict__["training"] = True
        for m in repacking:
            m.__dict__[_REPACKS] = True


@contextmanager
def checkpointed_eval_mode(model: nn.Module) -> Iterator[None]:
    """`eval_mode`, with gradient checkpointing where the host has it on.

    Transformers checkpoints in training mode alone. Here the layers are told to, without dropout and without reentrance,
    and the recomputation in the backward pass, after this context has ended, is in eval mode as well.
    """
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer) and m.gradient_checkpointing and m.training]
    theirs = [m._gradient_checkpointing_func for m in layers]
    with eval_mode(model):
        for m in layers:
            m.__dict__["training"] = True  # what `__call__` asks; the forward pass itself sees False
            m._gradient_checkpointing_func = partial(_checkpoint, m)
        try:
            yield
        finally:
            for m, function in zip(layers, theirs, strict=True):
                m._gradient_checkpointing_func = function


def _checkpoint(layer: nn.Module, forward: Callable[..., Any], *args: Any) -> Any:
    def in_eval_mode(*tensors: Any) -> Any:
        with eval_mode(layer):
            return forward(*tensors)

    return checkpoint(in_eval_mode, *args, use_reentrant=False, preserve_rng_state=False)
