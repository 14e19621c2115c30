"""Answers of a model that is steered while it answers, each request along a vector of its own."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from emguard_plugin.evaluation.asking.sampler import Answer, Request, TransformersSampler
from emguard_plugin.models.steering import steered


class SteeredSampler(TransformersSampler):
    """A sampler whose batches mix latents: row i is moved along the vector of its own request.

    Args:
        vector: Gives the vector (d,) of a request.
        layer: Block behind which it is added.
        span: Gives the half-open span of its prompt where it is added; None for all positions, generated ones too.
    """

    def __init__(
        self,
        *args: Any,
        vector: Callable[[Any], Tensor],
        layer: int,
        span: Callable[[Any], tuple[int, int]] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._vector, self._layer, self._span = vector, layer, span
        self.prompt_ids = functools.lru_cache(maxsize=None)(self.prompt_ids)  # type: ignore[method-assign]  # the same, remembered

    def _generate(self, batch: list[Request], prompts: list[list[int]]) -> list[Answer]:
        vectors = torch.stack([self._vector(request) for request in batch]).to(self.model.device, self.model.dtype)
        if not vectors.any():
            return super()._generate(batch, prompts)
        mask = None if self._span is None else self._mask(batch, prompts, self._span).to(self.model.device)
        with steered(self.model, self._layer, vectors, mask):
            return super()._generate(batch, prompts)

    def _mask(self, batch: list[Request], prompts: list[list[int]], span: Callable[[Any], tuple[int, int]]) -> Tensor:
        # The sampler pads on the left.
        width = max(map(len, prompts))
        mask = torch.zeros(len(batch), width, dtype=torch.bool)
        for row, (request, prompt) in enumerate(zip(batch, prompts, strict=True)):
            start, end = span(request)
            mask[row, width - len(prompt) + start : width - len(prompt) + end] = True
        return mask
