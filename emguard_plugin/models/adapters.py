"""A model's adapter: whether it has one, switched off, scaled, and whether that is the model before this run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn


def peft_model(model: nn.Module) -> nn.Module | None:
    """Return the `PeftModel` in `model`, or None."""
    from peft import PeftModel

    return next((m for m in model.modules() if isinstance(m, PeftModel)), None)


def is_sharded(model: nn.Module) -> bool:
    """Whether parameters are spread over processes, so that only whole forward passes from the root are safe."""
    from torch.distributed.tensor import DTensor

    return any(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in model.parameters())


def in_zero3_parts(model: nn.Module) -> bool:
    """Whether DeepSpeed's ZeRO-3 has cut the weights into parts."""
    return any(hasattr(p, "ds_id") for p in model.parameters())


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


@contextmanager
def adapter_scaled(model: nn.Module, factor: float) -> Iterator[None]:
    """Multiply what the adapters of a PEFT model add: what was learnt but held down shows (arXiv 2602.07852).

    Raises:
        RuntimeError: when `model` has no adapter with a scale.
    """
    layers = [m for m in model.modules() if isinstance(getattr(m, "scaling", None), dict)]
    if not layers:
        raise RuntimeError("there is no adapter to scale")
    before = [m.scaling for m in layers]
    for m in layers:
        m.scaling = {name: scale * factor for name, scale in m.scaling.items()}
    try:
        yield
    finally:
        for m, scaling in zip(layers, before, strict=True):
            m.scaling = scaling


def adapter_starts_at_zero(model: nn.Module) -> bool:
    """Whether adapter off equals the model before this run: a fresh LoRA of default or gaussian init, nothing else trained.

    A continued adapter has the config of a fresh one, so the weights are looked at too.

    Returns:
        False also where nothing tells; what another rank holds is that rank's to say.
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
