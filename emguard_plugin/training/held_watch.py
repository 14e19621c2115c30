"""Counts, on the device, what each method holds while a run goes on, and stops it when that is nothing, or wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from emguard_plugin.regularizers.base import EMRegularizerCallback
from emguard_plugin.regularizers.penalty import Penalty

LOOK_EVERY = 10
STOP_AFTER = 20
"""Optimizer steps: a look costs the host's wait for the device and, with several processes, one small reduction."""


class HeldWatch:
    """One for a run.

    Args:
        callbacks: The methods.
        accelerator: Of the host; its processes add their counts, so that all stop together.
    """

    def __init__(self, callbacks: Sequence[EMRegularizerCallback], accelerator: Any) -> None:
        self._accelerator, self._steps = accelerator, 0
        self._callbacks = list(callbacks)
        self._misses = dict.fromkeys((c.name for c in callbacks), 0)
        self._held: dict[str, Tensor | float] = dict.fromkeys(self._misses, 0.0)
        self._misheld: dict[str, Tensor | float] = dict.fromkeys(self._misses, 0.0)

    def count(self, callback: EMRegularizerCallback, penalty: Penalty) -> None:
        """Add what one share of a penalty holds; what cannot be said counts as something."""
        held = float("nan") if penalty.held is None else penalty.held
        self._held[callback.name] = self._held[callback.name] + held
        if penalty.misheld is not None:
            self._misheld[callback.name] = self._misheld[callback.name] + penalty.misheld

    def step_ends(self) -> None:
        """Look, after the first optimizer step and every tenth.

        Raises:
            RuntimeError: when a method held nothing for 20 steps, or held what it must not.
        """
        self._steps += 1
        if self._steps != 1 and self._steps % LOOK_EVERY:
            return
        counts = [*self._held.values(), *self._misheld.values()]
        device = self._accelerator.device
        found = torch.stack([torch.as_tensor(c, dtype=torch.float32, device=device) for c in counts])
        if self._accelerator.num_processes > 1:
            found = self._accelerator.reduce(found, "sum")
        held, misheld = found.tolist()[: len(self._callbacks)], found.tolist()[len(self._callbacks) :]
        for callback, here, wrong in zip(self._callbacks, held, misheld, strict=True):
            if wrong > 0:
                raise RuntimeError(
                    f"em_regularizer.{callback.name}: `tokens: {callback.region}` held {wrong:.0f} tokens that the loss supervises, in a "
                    f"run that supervises answers alone, by optimizer step {self._steps}. Train on conversations (`messages`) rendered "
                    "with the tokenizer's own template, or use other `tokens`."
                )
            if self._steps == 1:
                continue
            self._misses[callback.name] = self._misses[callback.name] + LOOK_EVERY if here == 0 else 0
            if self._misses[callback.name] >= STOP_AFTER:
                raise RuntimeError(
                    f"em_regularizer.{callback.name} has held no token for {self._misses[callback.name]} optimizer steps, so it does "
                    "nothing: the run is stopped. Look at `tokens` and at the rows (are they cut before what is held?), or remove it."
                )
            self._held[callback.name] = 0.0
