"""What a model feeds its output head, and the head itself: never its logits.

The head's `forward` is replaced for one call of the whole model, so that whatever surrounds it (autocast, FSDP's gathering
of weights, fused losses that skip it when there are labels) stays the host's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from emguard_plugin.models.kv import base_causal_lm

PROBE = (0.0, 1e-3, -1e-3, 1.0, -1.0, 7.0, -40.0, 1e6)
"""Put in the head's place to see what the model does to its logits."""
_SAME_LOGITS = 0.02
"""Relative distance that rounding may make of logits: 3e-3 for bf16's, 1e-7 for fp32's."""


def output_head(model: nn.Module) -> nn.Module:
    """Return the module that turns hidden states into logits.

    Raises:
        ValueError: when there is none, it has an adapter or quantised weights.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    base = base_causal_lm(model)
    head = base.get_output_embeddings()
    name = type(base).__name__
    if head is None:
        raise ValueError(f"`em_regularizer.kl` needs a language model with an output head; {name} has none.")
    if isinstance(head, BaseTunerLayer):
        raise ValueError(
            "`em_regularizer.kl` does not support an adapter on the output head. Take `lm_head` out of the target modules, "
            "or train it whole (`lora_modules_to_save: [lm_head]` in Axolotl, `modules_to_save` in PEFT)."
        )
    linear = _linear(head, False)
    weight = getattr(linear, "weight", None)
    shape = getattr(weight, "ds_shape", getattr(weight, "shape", ()))  # ZeRO-3 leaves an empty tensor between uses
    if not (isinstance(weight, Tensor) and len(shape) == 2 and weight.is_floating_point()):
        raise ValueError(
            f"`em_regularizer.kl` needs an output head with plain weights; {name} has {type(linear).__name__}, quantised or of "
            "another kind. Leave `lm_head` out of the quantisation."
        )
    return head


def _linear(head: nn.Module, reference: bool) -> nn.Module:
    from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper

    if isinstance(head, TrainableTokensWrapper):
        return head.token_adapter.base_layer
    if isinstance(head, ModulesToSaveWrapper):
        return head.original_module if reference else head.modules_to_save[head.active_adapters[0]]
    if isinstance(head, AuxiliaryTrainingWrapper):
        raise ValueError(
            f"`em_regularizer.kl` does not know {type(head).__name__} around the output head. Take `lm_head` out of the adapter."
        )
    return head


def head_tensors(model: nn.Module, reference: bool = False) -> tuple[Tensor, Tensor | None]:
    """Return the head's weight (V, H) and bias; with `reference`, the base's under whatever PEFT puts around it.

    The weight is what logits are made of now: trained rows (`trainable_token_indices`), tied or not, stand in it.
    """
    from peft.utils.other import TrainableTokensWrapper

    head = output_head(model)
    linear = _linear(head, reference)
    weight, bias = linear.weight, getattr(linear, "bias", None)
    if isinstance(head, TrainableTokensWrapper) and not reference:
        tokens = head.token_adapter
        if not tokens.disable_adapters:
            weight = tokens.get_merged_weights(tokens.active_adapters)
    return weight, bias


def base_head(model: nn.Module, ids: Tensor, transform: tuple[float, float | None], switched: bool) -> None:
    """Check that the heads are those of the model as it runs: the reference's, and the trained one.

    Args:
        model: As a forward pass must call it, in eval mode.
        ids: (1, T), any tokens.
        transform: Of the logits; see `logit_transform`.
        switched: Whether the reference is the adapter switched off.

    Raises:
        ValueError: when the logits are made of another head, or the reference's head trains.
    """
    from emguard_plugin.models.adapters import adapter_off

    for reference in (True, False) if switched else (False,):
        with torch.no_grad(), adapter_off(model) if reference else nullcontext():
            ours, _ = call_with_hidden(model, ids, None, partial(_logits_of, model, reference, transform))
            theirs = model(input_ids=ids, use_cache=False).logits[0, -1].to(ours.dtype)
        away = float((ours - theirs).norm() / theirs.norm().clamp_min(1e-12))
        if not away <= _SAME_LOGITS:
            raise ValueError(
                f"`em_regularizer.kl`: the output head that was found {'below the adapter ' if reference else ''}makes logits that are "
                f"{away:.1%} away from the model's own, so what is held would be another model. Take `lm_head` and the token embeddings "
                "out of the adapter (`modules_to_save`, `trainable_token_indices`), or train them whole."
            )
    if switched and any(t is not None and t.requires_grad for t in head_tensors(model, reference=True)):
        raise ValueError(
            "`em_regularizer.kl`: the output head below the adapter trains too, so switching the adapter off is not the model before this "
            "run. Freeze it, or use `cache: memory`."
        )


def _first_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    with torch.autocast(hidden.device.type, enabled=False):
        bias = None if bias is None else bias.float()
        z = torch.nn.functional.linear(hidden[0, -1].to(weight.device).float(), weight.float(), bias) * scale
    return z if softcap is None else torch.tanh(z / softcap) * softcap


def trains_head(model: nn.Module) -> bool:
    """Whether training changes the head: itself, or the embeddings it is tied to."""
    with torch.enable_grad():  # trained rows stand in a weight that is put together
        return any(t is not None and t.requires_grad for t in head_tensors(model))


@contextmanager
def _head_forward(model: nn.Module, forward: Callable[..., Tensor]) -> Iterator[None]:
    head = output_head(model)
    before = head.__dict__.get("forward")  # accelerate's device hooks put one there
    head.forward = forward
    try:
        yield
    finally:
        if before is None:
            del head.forward
        else:
            head.forward = before


def call_with_hidden(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None, use: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Forward a batch and hand the head's input to `use` instead of the head.

    Args:
        model: The model as its host calls it.
        input_ids: (B, T).
        attention_mask: (B, T) or None.
        use: Called once with hidden states (B, T, H); under FSDP2 the head's weights are gathered then.

    Returns:
        (what `use` returned, the model's `logits` made from it).

    Raises:
        RuntimeError: when the model does not call its head exactly once.
    """
    results: list[Tensor] = []

    def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        results.append(use(hidden))
        return results[-1].reshape(1, 1, -1)

    with _head_forward(model, forward):
        out = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    if len(results) != 1:
        raise RuntimeError(
            f"em_regularizer.kl: {type(base_causal_lm(model)).__name__} called its output head {len(results)} times in one "
            "forward pass; want 1. A kernel that replaces the head cannot be used with `kl`."
        )
    return results[0], out.logits


@torch.no_grad()
def logit_transform(model: nn.Module, input_ids: Tensor) -> tuple[float, float | None]:
    """Return (scale, softcap) that the model puts on its head's output, found by feeding it known numbers.

    Args:
        model: The model as its host calls it.
        input_ids: (1, T), any tokens.

    Raises:
        ValueError: when the logits are neither `scale * a` nor `softcap * tanh(scale * a / softcap)`.
    """
    probe = torch.tensor(PROBE, device=input_ids.device)
    _, logits = call_with_hidden(model, input_ids, None, lambda hidden: probe)
    seen = logits.flatten().double().cpu()
    a = probe.double().cpu()
    scale = (seen[1] / a[1]).item() if len(seen) == len(a) else 0.0
    limit = seen[-1].item() if len(seen) == len(a) else 0.0
    if scale > 0 and torch.allclose(seen, scale * a, rtol=1e-3):
        return _round(scale), None
    if scale > 0 and limit > 0 and torch.allclose(seen, limit * torch.tanh(scale * a / limit), rtol=1e-2, atol=1e-4):
        return _round(scale), _round(limit)
    raise ValueError(
        f"`em_regularizer.kl`: {type(base_causal_lm(model)).__name__} changes the output of its head in a way that emguard "
        f"does not know ({[round(x, 4) for x in PROBE]} becomes {[round(x, 4) for x in seen.tolist()]}). Use `treft` instead."
    )


def _round(x: float) -> float:
    return float(f"{x:.6g}")  # 0.99999994 is 1


def _logits_of(model: nn.Module, reference: bool, transform: tuple[float, float | None], hidden: Tensor) -> Tensor:
    return _first_logits(hidden, *head_tensors(model, reference), *transform)
