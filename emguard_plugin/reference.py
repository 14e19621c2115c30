"""The reference model: the model as it was before this run.

A run that starts fresh records its reference from the live model before the first update, so a continued adapter,
PiSSA, LoftQ and full fine-tuning are right without a special case. Every checkpoint carries it; a resumed run loads it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn


def peft_model(model: nn.Module) -> nn.Module | None:
    """Return the `PeftModel` in `model`, or None."""
    from peft import PeftModel

    return next((m for m in model.modules() if isinstance(m, PeftModel)), None)


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """Run the base model of a PEFT model. PEFT makes every adapter weight trainable afterwards; frozen ones stay frozen.

    Raises:
        RuntimeError: when `model` has no adapter.
    """
    peft = peft_model(model)
    if peft is None:
        raise RuntimeError("there is no adapter to switch off")
    trainable = {p: p.requires_grad for p in peft.parameters()}
    try:
        with peft.disable_adapter():
            yield
    finally:
        for p, requires_grad in trainable.items():
            if p.requires_grad != requires_grad:
                p.requires_grad_(requires_grad)


def adapter_starts_at_zero(model: nn.Module) -> bool:
    """Whether adapter off equals the model before this run: a fresh LoRA of default or gaussian init, nothing else trained.

    A continued adapter has the config of a fresh one, so the weights are looked at too.
    """
    peft = peft_model(model)
    if peft is None:
        return False
    fresh = all(
        getattr(c, "init_lora_weights", None) in (True, "gaussian")
        and getattr(c, "bias", "none") == "none"
        and not getattr(c, "loftq_config", None)
        for c in peft.peft_config.values()
    )
    return fresh and all(_zero(p) if _is_factor(n) else _is_switched(n) for n, p in peft.named_parameters() if p.requires_grad)


def _is_factor(name: str) -> bool:
    return "lora_B." in name or "lora_embedding_A." in name


def _is_switched(name: str) -> bool:
    return any(part in name for part in ("lora_", "modules_to_save.", "trainable_tokens_"))


def _zero(p: Tensor) -> bool:
    return p.is_meta or not bool(p.detach().any())  # on the meta device another rank holds the values


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put every module in eval mode and restore exactly those that trained.

    Without dropout the penalty is 0 at step 0; without gradient checkpointing the cache is returned.
    """
    training = [m for m in model.modules() if m.training]
    for m in training:
        m.__dict__["training"] = False  # nn.Module.__setattr__ is 20x slower, and this runs every step
    try:
        yield
    finally:
        for m in training:
            m.__dict__["training"] = True


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """Return the sha256 over names, dtypes, shapes and bytes."""
    h = hashlib.sha256()
    for name in sorted(tensors):
        t = tensors[name].detach().cpu().contiguous()
        h.update(f"{name}|{t.dtype}|{tuple(t.shape)}|".encode())
        h.update(t.flatten().view(torch.uint8).numpy().tobytes())
    return h.hexdigest()


def save_reference(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> None:
    """Write a reference with its hash; `about` describes what it belongs to and is compared on load.

    Raises:
        OSError: naming the file, when it cannot be written.
    """
    cpu = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    try:
        save_file(cpu, str(path), metadata={**about, "sha256": tensors_hash(cpu)})
    except SafetensorError as exc:
        raise OSError(f"{path} cannot be written ({exc}): the checkpoint would lack the model before this run.") from exc


def load_reference(path: Path, about: Mapping[str, str]) -> dict[str, Tensor]:
    """Load a reference.

    Raises:
        ValueError: when the file is damaged, or belongs to other settings.
    """
    try:
        with safe_open(str(path), framework="pt") as f:
            meta = f.metadata() or {}
            tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError) as exc:
        raise ValueError(f"the stored reference {path} cannot be read ({exc}). Restore the checkpoint.") from exc
    if meta.get("sha256") != tensors_hash(tensors):
        raise ValueError(f"the stored reference {path} does not match its hash: it was changed. Restore the checkpoint.")
    for key, value in about.items():
        if meta.get(key) != value:
            raise ValueError(
                f"the stored reference {path} was recorded for another `{key}`. Resume with the data and settings of the "
                "first run, or start afresh without `resume_from_checkpoint`."
            )
    return tensors
