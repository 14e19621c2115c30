"""Reads and moves the residual stream behind one block, each row of a batch along its own vector."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from emguard_plugin.discovery.prompts import Prompt
from emguard_plugin.models.modes import eval_mode
from emguard_plugin.models.residual import decoder, read_residual

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def _hidden(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


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

    def add(module: nn.Module, args: Any, output: Any) -> Any:
        nonlocal passed
        hidden = _hidden(output)
        if len(hidden) != len(vectors):
            raise RuntimeError(f"{len(vectors)} steering vectors for a batch of {len(hidden)} rows")
        push = vectors.to(hidden.device, hidden.dtype).unsqueeze(1)
        if prompt_mask is not None:
            mask = prompt_mask[:, passed : passed + hidden.shape[1]]
            passed += hidden.shape[1]
            if not mask.shape[1]:
                return output
            push = push * nn.functional.pad(mask.to(hidden), (0, hidden.shape[1] - mask.shape[1])).unsqueeze(-1)
        moved = hidden + push
        return (moved, *output[1:]) if isinstance(output, tuple) else moved

    handle = decoder(model)[1][layer].register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


def residuals(model: PreTrainedModel, layer: int, rows: Sequence[Sequence[int]], batch_size: int) -> Iterator[tuple[int, Tensor]]:
    """Yield (index, residual stream behind block `layer`) per row; fp32, shape (T, d), in the model's device.

    Rows are padded on the right, where causal attention does not see the padding.
    """
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
    with eval_mode(model):
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            ids = nn.utils.rnn.pad_sequence([torch.tensor(list(rows[i])) for i in batch], batch_first=True)
            lengths = torch.tensor([len(rows[i]) for i in batch])
            mask = (torch.arange(ids.shape[1]) < lengths.unsqueeze(1)).long()
            fed = {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device), "use_cache": False}
            hidden = read_residual(model, [layer], kwargs=fed)[layer]
            for row, index in enumerate(batch):
                yield index, hidden[row, : len(rows[index])].float()


def residual_scale(model: PreTrainedModel, layer: int, prompts: Sequence[Prompt], batch_size: int) -> float:
    """Return s, the median of ||h_t||_2 over the tokens behind the system part. Strengths are in units of it."""
    found = residuals(model, layer, [prompt.ids for prompt in prompts], batch_size)
    norms = [hidden[prompts[index].start :].norm(dim=-1) for index, hidden in found]
    return float(torch.cat(norms).median())
