"""What runs of several studies train with: KL on anchors of the lab, a regularizer that ends early, measures on the way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from emguard_plugin.lab.export import anchor_rows, write_jsonl
from emguard_plugin.lab.study.settings import ANCHORS
from emguard_plugin.regularizers.base import EMRegularizerCallback
from emguard_plugin.regularizers.kl.callback import KLCallback


class SwitchOff(TrainerCallback):
    """Takes the weight of a regularizer away.

    Args:
        regularizer: Stands before this one among the callbacks.
        step: The first step without it; need not be whole.
    """

    def __init__(self, regularizer: EMRegularizerCallback, step: float) -> None:
        self.regularizer, self.step = regularizer, step

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Set the coefficient to 0 once the step has come."""
        if state.global_step >= self.step:
            self.regularizer.coef = 0.0


class EverySteps(TrainerCallback):
    """Calls a function with the number of steps done and the model.

    Args:
        steps: After so many steps, again and again.
        call: Must leave the model and torch's generators as they are; `measures` does.
    """

    def __init__(self, steps: int, call: Callable[[int, nn.Module], None]) -> None:
        self.steps, self.call = steps, call

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        """Call it where a multiple of the steps is reached."""
        if state.global_step % self.steps == 0:
            self.call(state.global_step, model)


def kl_on_anchors(coef: float, seed: int, folder: Path) -> KLCallback:
    """Return KL on anchors drawn afresh for a seed, from two domains that are neither trained on nor asked about.

    Args:
        coef: Nats per token.
        seed: Of the run.
        folder: Receives the anchors.
    """
    folder.mkdir(parents=True, exist_ok=True)
    return KLCallback(coef=coef, anchors=str(write_jsonl(folder / f"anchors-{seed}.jsonl", anchor_rows(seed, ANCHORS))))
