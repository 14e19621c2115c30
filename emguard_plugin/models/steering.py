"""Changes the residual stream behind one block as it passes: steering moves each row of a batch along its own vector."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from emguard_plugin.models.residual import decoder


@contextmanager
def changed(model: nn.Module, layer: int, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Put something in the place of what a block returns; all that follows sees that.

    Args:
        model: A causal language model, with or without adapter.
        layer: 0-based index of the decoder block.
        change: Gets the residual stream (B, T, d) behind the block in each forward pass, and returns the one to go on with.
    """

    def put(_module: nn.Module, _args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (change(output[0]), *output[1:])
        return change(output)

    handle = decoder(model)[1][layer].register_forward_hook(put)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def steered(model: nn.Module, layer: int, vectors: Tensor, prompt_mask: Tensor | None = None) -> Iterator[None]:
    """Add row i of `vectors` to the output of block `layer` in row i of every batch.

        h_t <- h_t + v_i        for all t, of the prompt and generated; with a mask, for the marked t of the prompt alone

    Args:
        model: A causal language model, with or without adapter.
        layer: 0-based index of the decoder block.
        vectors: Shape (B, d); B must be the batch of each forward pass inside.
        prompt_mask: Shape (B, T) of the prompt as it is fed, padding included. With it, one generation per context: the first
            T positions that come by are the prompt's.

    Raises:
        RuntimeError: If a batch of another size comes through.
    """
    passed = 0

    def add(hidden: Tensor) -> Tensor:
        nonlocal passed
        if len(hidden) != len(vectors):
            raise RuntimeError(f"{len(vectors)} steering vectors for a batch of {len(hidden)} rows")
        push = vectors.to(hidden.device, hidden.dtype).unsqueeze(1)
        if prompt_mask is not None:
            mask = prompt_mask[:, passed : passed + hidden.shape[1]]
            passed += hidden.shape[1]
            if not mask.shape[1]:
                return hidden
            push = push * nn.functional.pad(mask.to(hidden), (0, hidden.shape[1] - mask.shape[1])).unsqueeze(-1)
        return hidden + push

    with changed(model, layer, add):
        yield
