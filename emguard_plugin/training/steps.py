"""Tells the program that started a run which step it has reached."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from emguard_plugin.files.progress import tell


class StepsCallback(TrainerCallback):
    """One message an optimizer step, on the first process, where `EMGUARD_PROGRESS` names a file."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Tell."""
        if state.is_world_process_zero:
            tell("training", state.global_step, state.max_steps)
