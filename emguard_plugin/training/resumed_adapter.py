"""A resumed run goes on from its checkpoint's adapter, also where the host leaves it out or loads a part of it.

Under FSDP2 with `state_dict_type: FULL_STATE_DICT` accelerate gives a LoRA's weights to rank 0 alone (seen up to accelerate 1.15), and
of a checkpoint with two adapters that TRL made of one `PeftModel`, the host loads TRL's copy alone (seen up to TRL 1.16).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

WEIGHTS = "adapter_model.safetensors"


@contextmanager
def restored_adapter(trainer: Any, folder: Path) -> Iterator[None]:
    """Look at the adapter of a resumed run when the host has loaded it, and say what was put right.

    Args:
        trainer: The host's.
        folder: The checkpoint that it goes on from.
    """

    class Restored(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            if done := restore_adapter(trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False), folder):
                trainer.accelerator.print(f"em_regularizer: {done}")

    callback = Restored()
    trainer.add_callback(callback)
    try:
        yield
    finally:
        trainer.remove_callback(callback)


def restore_adapter(model: Any, folder: Path) -> str | None:
    """Put a checkpoint's adapter into the model where the model holds another one. Every process calls it.

    Args:
        model: Any; without an adapter nothing is done.
        folder: The checkpoint. A file for each process, as sharded checkpoints have, is none that the host gets wrong.

    Returns:
        What was done, for a line to the user; None where the model holds the checkpoint's adapter.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors.torch import load_file

    if not isinstance(model, PeftModel) or not (folder / WEIGHTS).is_file():
        return None
    stored = load_file(folder / WEIGHTS)
    held = get_peft_model_state_dict(model, adapter_name=model.active_adapter, save_embedding_layers=False)
    wrong = [n for n, w in stored.items() if n in held and not _same(held[n], w)]
    with torch.no_grad():
        for name in wrong:
            held[name].copy_(_like(stored[name], held[name]))
    if not wrong:
        return None
    return f"{len(wrong)} of the {len(stored)} tensors of {folder / WEIGHTS} were not loaded by the host, and are now"


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
