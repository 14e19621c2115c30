"""What must hold before the first update: the model is its own reference, and nothing that trains stands behind that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from emguard_plugin.models.adapters import adapter_off, is_sharded
from emguard_plugin.models.graph import trained_behind

QUANTISED = "quantised weights"


@dataclass(frozen=True)
class Floors:
    """The most that rounding makes of a model's distance from itself, by the lowest precision that it computes in.

    Attributes:
        fp32: In fp32 (fp64 is taken for it).
        fp16: In fp16.
        bf16: In bf16.
        quantised: With weights in 8 bits or less, which activations may be rounded for batch by batch.
    """

    fp32: float
    fp16: float
    bf16: float
    quantised: float

    def of(self, precision: str) -> float:
        """Return the floor of a precision as `precision_of` names it."""
        return {QUANTISED: self.quantised, "bfloat16": self.bf16, "float16": self.fp16}.get(precision, self.fp32)


class Start(NamedTuple):
    """What the first step saw: the mean distance from the reference, and the precision."""

    away: Tensor
    precision: str


def precision_of(model: nn.Module, autocast: str = "no") -> str:
    """Return the lowest precision that a model computes in: quantised weights, bfloat16, float16 or float32.

    Args:
        model: The model.
        autocast: What the host runs its forward passes in, as accelerate names it: `no`, `bf16`, `fp16` or `fp8`.
    """
    weights = {p.dtype for p in model.parameters()}
    if autocast == "fp8" or any(not t.is_floating_point or t.itemsize == 1 for t in weights):
        return QUANTISED
    weights |= {"bf16": {torch.bfloat16}, "fp16": {torch.float16}}.get(autocast, set())
    lowest = next((t for t in (torch.bfloat16, torch.float16) if t in weights), torch.float32)
    return str(lowest).removeprefix("torch.")


@torch.no_grad()
def state_of_weights(model: Any, steps_early: bool) -> str:
    """Return one sentence, true of the weights as they are, for a run that stops before a step is taken.

    Args:
        model: With the weights, or None.
        steps_early: Whether the host has stepped already.
    """
    for name, p in [] if model is None else model.named_parameters():
        p = getattr(p, "ds_tensor", p)
        p = p.to_local() if hasattr(p, "to_local") else p
        if p.is_floating_point() and p.requires_grad and not bool(torch.isfinite(p).all()):
            return (
                f"The weights are not finite any more ({name}): an earlier step of the host's own loss broke them, or this one. Go back "
                "to the last checkpoint."
            )
    if steps_early:
        return "DeepSpeed has taken this step already. Go back to the last checkpoint."
    return "The weights before this step are unharmed."


def check_switched_off(model: nn.Module, ids: Tensor, key: str) -> None:
    """Refuse an adapter whose switching off leaves something that trains: a reference of it would move with the training.

    One forward pass with gradient over a few tokens. Where weights are spread over processes it is left out: their gathering
    expects a backward pass.

    Args:
        model: As a forward pass must call it, in eval mode.
        ids: (1, T).
        key: Of the YAML, for the message.

    Raises:
        ValueError: naming what trains.
    """
    if is_sharded(model):
        return
    with torch.enable_grad(), adapter_off(model):
        found = trained_behind(model(input_ids=ids, use_cache=False).logits)
    if found is None:
        return
    name = next((n for n, p in model.named_parameters() if p is found), "a parameter")
    raise ValueError(
        f"`{key}`: with the adapter switched off the model still runs through {name}, which trains, so it would not be the model before "
        "this run. Leave that layer out of the adapter, or use `cache: memory`."
    )
