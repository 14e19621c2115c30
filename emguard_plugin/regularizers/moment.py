"""The moment that a penalty is asked for at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Moment:
    """One micro-batch of one process, as `EMRegularizerCallback.penalty` and `watch` get it.

    Attributes:
        model: The model as a forward pass must call it (wrapped under FSDP2, unwrapped otherwise).
        inputs: The batch as the host's loss saw it.
        step: Optimizer steps taken so far.
        micro_batch: Which micro-batch of the optimizer step this is, from 0.
        micro_batches: Of how many.
        tokens: What a sum over this micro-batch is to be divided by, as the host divides its loss: supervised tokens of the
            optimizer step, per micro-batch and process.
        seen: What the method's own `watch` gave for the host's forward pass; None before it.
    """

    model: nn.Module
    inputs: Mapping[str, Any]
    step: int
    micro_batch: int = 0
    micro_batches: int = 1
    tokens: Tensor | float = 1.0
    seen: Any = None

    @property
    def device(self) -> torch.device:
        """Where the batch lies, or the model where the batch has no ids."""
        ids = self.inputs.get("input_ids")
        return ids.device if ids is not None else next(self.model.parameters()).device
