"""A run has the whole adapter of the checkpoint that the host loaded, also where that leaves it out or loads a part of it.

Under FSDP2 with `state_dict_type: FULL_STATE_DICT` accelerate gives a LoRA's weights to rank 0 alone (seen up to accelerate 1.15), when
it resumes and when it takes the best checkpoint in the end. Of a checkpoint with two adapters that TRL made of one `PeftModel`, the host
resumes with TRL's copy alone (seen up to TRL 1.16).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

WEIGHTS = "adapter_model.safetensors"


@contextmanager
def whole_adapter(trainer: Any, resumed_from: Path | None) -> Iterator[None]:
    """Look at the adapter each time when the host has loaded a checkpoint, and say what was put right.

    Args:
        trainer: The host's.
        resumed_from: The checkpoint that the run goes on from.
    """

    def look(folder: Path) -> None:
        if done := restore_adapter(trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False), folder):
            trainer.accelerator.print(f"em_regularizer: {done}")

    class Looking(TrainerCallback):
        def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
            if resumed_from is not None:
                look(resumed_from)

        def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
            if args.load_best_model_at_end and state.best_model_checkpoint is not None:
                look(Path(state.best_model_checkpoint))

    callback = Looking()
    trainer.add_callback(callback)
    try:
        yield
    finally:
        trainer.remove_callback(callback)


def restore_adapter(model: Any, folder: Path) -> str | None:
    """Put a checkpoint's adapter into the model where the model holds another one. Every process calls it.

    Args:
        model: Any; without an adapter of weights nothing is done.
        folder: The checkpoint; without the adapter's file, as with shards, nothing is done.

    Returns:
        What was done, for a line to the user; None where the model holds the checkpoint's adapter.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors.torch import load_file

    if not isinstance(model, PeftModel) or model.active_peft_config.is_prompt_learning or not (folder / WEIGHTS).is_file():
        return None
    stored = load_file(folder / WEIGHTS)
    held = get_peft_model_state_dict(model, adapter_name=model.active_adapter, save_embedding_layers=False)
    wrong = [n for n, w in stored.items() if n in held and not _same(held[n], w)]
    with torch.no_grad():
        for name in wrong:
            held[name].copy_(_like(stored[name], held[name]))
    if not wrong:
        return None
    return f"{len(wrong)} of the {len(stored)} tensors of {folder / WEIGHTS} were not loaded by the trainer, and are now"


def _same(held: Tensor, stored: Tensor) -> bool:
    """Return whether two tensors are one as far as the narrower of their types goes."""
    whole = held.full_tensor() if hasattr(held, "full_tensor") else held
    if whole.shape != stored.shape:
        return True  # another layout of the host's own, which is no loss
    whole = whole.to(stored.device)
    return torch.equal(whole.to(stored.dtype), stored) or torch.equal(stored.to(whole.dtype), whole)


def _like(stored: Tensor, held: Tensor) -> Tensor:
    """Return a whole tensor cut as another is."""
    if not hasattr(held, "full_tensor"):
        return stored
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(stored.to(device=held.device, dtype=held.dtype), held.device_mesh, held.placements)
