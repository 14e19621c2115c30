"""The reference model: the model as it was before this run.

A run that starts fresh records its reference from the live model before the first update, so a continued adapter,
PiSSA, LoftQ and full fine-tuning are right without a special case. Every checkpoint carries it; a resumed run loads it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from emguard_plugin.state_files import FORMAT, Damaged, digest, moved_into_place, older


def peft_model(model: nn.Module) -> nn.Module | None:
    """Return the `PeftModel` in `model`, or None."""
    from peft import PeftModel

    return next((m for m in model.modules() if isinstance(m, PeftModel)), None)


def is_sharded(model: nn.Module) -> bool:
    """Whether parameters are spread over processes, so that only whole forward passes from the root are safe."""
    from torch.distributed.tensor import DTensor

    return any(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in model.parameters())


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """Run the base model of a PEFT model.

    Sets the layers' flag alone. `PeftModel.disable_adapter` also flips `requires_grad` of every adapter weight and back,
    which takes 60 times as long, every step, and thaws what was frozen.

    Raises:
        RuntimeError: when `model` has no adapter.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    peft = peft_model(model)
    if peft is None:
        raise RuntimeError("there is no adapter to switch off")
    kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    layers = [m for m in peft.modules() if isinstance(m, kinds) and not m.disable_adapters]
    for m in layers:
        m._disable_adapters = True
    try:
        yield
    finally:
        for m in layers:
            m._disable_adapters = False


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
    active = set(peft.active_adapters)
    return fresh and all(_allows_off(n, p, active) for n, p in peft.named_parameters())


def _allows_off(name: str, p: Tensor, active: set[str]) -> bool:
    if _is_factor(name):  # a frozen adapter below the new one is switched off with it
        return not (p.requires_grad or active & set(name.split("."))) or _zero(p)
    return not p.requires_grad or _is_switched(name)


def _is_factor(name: str) -> bool:
    return "lora_B." in name or "lora_embedding_A." in name


def _is_switched(name: str) -> bool:
    return any(part in name for part in ("lora_", "modules_to_save.", "trainable_tokens_"))


def _zero(p: Tensor) -> bool:
    return p.is_meta or not bool(p.detach().any())  # on the meta device another rank holds the values


_REPACKS = "support_avx512bf16_for_cpu"
"""bitsandbytes, on CPUs with bf16 instructions: a 4-bit layer in eval mode rounds and reorders its weights for
another kernel, and training goes on with what is left of them. A pass beside the training must not touch the weights."""


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put every module in eval mode and restore exactly those that trained.

    Without dropout the penalty is 0 at step 0; without gradient checkpointing the cache is returned.
    """
    training = [m for m in model.modules() if m.training]
    repacking = [m for m in training if m.__dict__.get(_REPACKS)]
    for m in training:
        m.__dict__["training"] = False  # nn.Module.__setattr__ is 20x slower, and this runs every step
    for m in repacking:
        m.__dict__[_REPACKS] = False
    try:
        yield
    finally:
        for m in training:
            m.__dict__["training"] = True
        for m in repacking:
            m.__dict__[_REPACKS] = True


@contextmanager
def checkpointed_eval_mode(model: nn.Module) -> Iterator[None]:
    """`eval_mode`, with gradient checkpointing where the host has it on.

    Transformers checkpoints in training mode alone. Here the layers are told to, without dropout and without reentrance,
    and the recomputation in the backward pass, after this context has ended, is in eval mode as well.
    """
    layers = [
        m for m in model.modules() if isinstance(m, GradientCheckpointingLayer) and m.gradient_checkpointing and m.training
    ]
    theirs = [m._gradient_checkpointing_func for m in layers]
    with eval_mode(model):
        for m in layers:
            m.__dict__["training"] = True  # what `__call__` asks; the forward pass itself sees False
            m._gradient_checkpointing_func = partial(_checkpoint, m)
        try:
            yield
        finally:
            for m, function in zip(layers, theirs, strict=True):
                m._gradient_checkpointing_func = function


def _checkpoint(layer: nn.Module, forward: Callable[..., Any], *args: Any) -> Any:
    def in_eval_mode(*tensors: Any) -> Any:
        with eval_mode(layer):
            return forward(*tensors)

    return checkpoint(in_eval_mode, *args, use_reentrant=False, preserve_rng_state=False)


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """Return the sha256 over names, dtypes, shapes and bytes."""
    h = hashlib.sha256()
    for name in sorted(tensors):
        t = tensors[name].detach().cpu().contiguous()
        h.update(f"{name}|{t.dtype}|{tuple(t.shape)}|".encode())
        h.update(t.flatten().view(torch.uint8).numpy().tobytes())
    return h.hexdigest()


def save_reference(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> None:
    """Write a reference with a hash over all it says; `about` describes what it belongs to and is compared on load.

    Raises:
        OSError: naming the file, when it cannot be written.
    """
    cpu = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    about = {**about, "format": str(FORMAT)}
    with moved_into_place(path) as part:
        try:
            save_file(cpu, str(part), metadata={**about, "sha256": _whole_hash(cpu, about)})
        except SafetensorError as exc:
            raise OSError(exc) from exc


def _whole_hash(tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> str:
    return digest({"tensors": tensors_hash(tensors), "about": dict(about)})


def load_reference(path: Path, about: Mapping[str, str], advice: str = " Restore the checkpoint.") -> dict[str, Tensor]:
    """Load a reference; see `read_reference`."""
    return read_reference(path, about, advice)[0]


def read_reference(
    path: Path, about: Mapping[str, str], advice: str = " Restore the checkpoint."
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Load a reference and all that it says about itself; `advice` ends the error of a damaged one.

    Raises:
        Damaged: when the file is cut, changed, or an earlier emguard's.
        ValueError: when it belongs to another model or other settings.
    """
    try:
        with safe_open(str(path), framework="pt") as f:
            meta = f.metadata() or {}
            tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError, ValueError, RuntimeError) as exc:
        raise Damaged(f"the stored reference {path} cannot be read ({exc}).{advice}") from exc
    stored = {key: value for key, value in meta.items() if key != "sha256"}
    if stored.get("format") != str(FORMAT):
        raise Damaged(older(path))
    if meta.get("sha256") != _whole_hash(tensors, stored):
        raise Damaged(f"the stored reference {path} does not match its hash: it was changed.{advice}")
    for key, value in about.items():
        if stored.get(key) != value:
            raise ValueError(
                f"the stored reference {path} was recorded for another `{key}`. Resume with the data and settings of the "
                "first run, or start afresh without `resume_from_checkpoint`."
            )
    return tensors, stored
