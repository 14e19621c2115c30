"""Keys and values of a few tokens, read from the cache that the model returns. No hooks.

Attention is causal, so the prefix's keys and values depend on the weights alone: this forward sees what every training
row sees, and is indifferent to packing, fused kernels and checkpointing of the main pass.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from emguard_plugin.models.adapters import is_sharded, peft_model
from emguard_plugin.models.modes import eval_mode


class KV(NamedTuple):
    """Keys and values per layer, each (B, T, kv_heads * head_dim), and a zero that ties the output head to the graph."""

    keys: list[Tensor]
    values: list[Tensor]
    tie: Tensor


def base_causal_lm(model: nn.Module) -> nn.Module:
    """Return the transformers model under a PEFT wrapper, or `model`."""
    peft = peft_model(model)
    return peft.get_base_model() if peft is not None else model


def _text_config(model: nn.Module) -> Any:
    return base_causal_lm(model).config.get_text_config()


def num_layers(model: nn.Module) -> int:
    """Return the number of decoder layers."""
    return int(_text_config(model).num_hidden_layers)


def has_rotary_positions(model: nn.Module) -> bool:
    """Whether shifting all positions by a constant leaves attention unchanged."""
    config = _text_config(model)
    return bool(getattr(config, "rope_parameters", None)) or getattr(config, "rope_theta", None) is not None


def _new_cache(model: nn.Module) -> Any:
    from transformers import DynamicCache

    kinds = set(getattr(_text_config(model), "layer_types", None) or ["full_attention"])
    # A cache without config keeps all positions of sliding-window layers. Hybrid models need their own kind.
    return DynamicCache() if kinds <= {"full_attention", "sliding_attention", "chunked_attention"} else None


def _head_kwargs(model: nn.Module) -> dict[str, Any]:
    params = inspect.signature(type(base_causal_lm(model)).forward).parameters
    return {"logits_to_keep": 1} if "logits_to_keep" in params else {}


def _flat(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)  # (B, H, T, D) -> (B, T, H * D)


def _tie(model: nn.Module, out: Any) -> Tensor:
    if is_sharded(model):
        # FSDP2 gathers a layer for backward only when an output of the root depends on it; ZeRO-3 counts modules that ran and waits
        # for the backward pass of each.
        return out.logits.float().sum() * 0.0
    return out.logits.new_zeros((), dtype=torch.float32)


def read_kv(
    model: nn.Module,
    input_ids: Tensor,
    layers: Sequence[int],
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> KV:
    """Forward `input_ids` in eval mode and read the cache.

    Keys are those that attention sees: after `k_norm` where a model has one, after RoPE. RoPE is a rotation, so a
    relative L2 drift is the same before and after it.

    Args:
        model: The model as its host calls it.
        input_ids: (B, T).
        layers: 0-based decoder layers to read.
        attention_mask: (B, T), default all ones.
        position_ids: (B, T), default 0..T-1.

    Returns:
        Keys and values of each layer, (B, T, heads x head size) each.

    Raises:
        ValueError: when a layer returns no keys and values of T tokens.
    """
    cache = _new_cache(model)
    kwargs: dict[str, Any] = _head_kwargs(model)
    if cache is not None:
        kwargs["past_key_values"] = cache
    if position_ids is not None:
        kwargs["position_ids"] = position_ids
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    with eval_mode(model):
        out = model(input_ids=input_ids, attention_mask=mask, use_cache=True, **kwargs)
    cached = getattr(getattr(out, "past_key_values", None), "layers", [])
    keys, values = [], []
    for i in layers:
        k, v = (getattr(cached[i], n, None) if i < len(cached) else None for n in ("keys", "values"))
        if not (isinstance(k, Tensor) and k.ndim == 4 and k.shape[-2] == input_ids.shape[1]):
            raise ValueError(
                f"layer {i} of {type(base_causal_lm(model)).__name__} keeps no keys and values for all {input_ids.shape[1]} "
                "tokens (linear attention, Mamba, shared or windowed cache). Leave it out: list the attention layers in "
                "`em_regularizer.treft.layers`."
            )
        keys.append(_flat(k))
        values.append(_flat(v))
    return KV(keys, values, _tie(model, out))


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """Return the decoder's `ModuleList`.

    Raises:
        ValueError: for an unknown model layout.
    """
    backbone = base_causal_lm(model).base_model
    for name in ("layers", "h", "blocks"):
        found = getattr(backbone, name, None)
        if isinstance(found, nn.ModuleList):
            return found
    raise ValueError(f"{type(base_causal_lm(model)).__name__} has no list of decoder layers that emguard knows.")


def read_residual_projections(model: nn.Module, input_ids: Tensor, layers: Sequence[int]) -> KV:
    """Project the un-normalised residual stream with k_proj and v_proj, as TReFT's released code does.

    These are not attention's keys and values: the layer's input norm and RoPE are missing. For replication only.

    Returns:
        Projections of each layer, (B, T, heads x head size) each.

    Raises:
        ValueError: for models with fused projections.
    """
    projections = residual_projections(model, layers)
    with eval_mode(model):
        out = model(input_ids=input_ids, output_hidden_states=True, use_cache=False, **_head_kwargs(model))
        keys = [k(out.hidden_states[i]) for i, (k, _) in zip(layers, projections, strict=True)]
        values = [v(out.hidden_states[i]) for i, (_, v) in zip(layers, projections, strict=True)]
    return KV(keys, values, _tie(model, out))


def residual_projections(model: nn.Module, layers: Sequence[int]) -> list[tuple[nn.Module, nn.Module]]:
    """Return k_proj and v_proj of each layer.

    Raises:
        ValueError: for models with fused projections.
    """
    blocks = decoder_layers(model)
    projections = []
    for i in layers:
        attn = getattr(blocks[i], "self_attn", None)
        k, v = getattr(attn, "k_proj", None), getattr(attn, "v_proj", None)
        if k is None or v is None:
            where = type(blocks[i] if attn is None else attn).__name__
            raise ValueError(
                f"`treft.compat: true` needs separate k_proj and v_proj modules; {where} of layer {i} has none. Set `compat: false`."
            )
        projections.append((k, v))
    return projections
