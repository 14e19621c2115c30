"""Which model a reference belongs to: a checksum over every element of every weight, and the settings that weights do not show.

Of a tensor's words w_i (4 bytes where its rows allow, else 2 or 1) at index i the checksum is, twice with different numbers,

    sum_i w_i * m_i mod 2^64,    m_i = M[i mod 65536] * K[i div 65536], all odd and fixed.

An odd number has an inverse mod 2^64, so one edited word always changes it; a set of edits goes unseen with a probability of
about 2^-64 (multilinear hashing: the low 32 bits of such sums are the weak ones, hence two). Sums over shards add up, a chunk at
a time is in memory, and nothing but the bytes counts: not the device, not how the work is split.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from emguard_plugin.models.adapters import adapter_starts_at_zero, is_sharded, peft_model

CHUNK = 2**16
"""Words with multipliers of their own; part of the definition."""
ROWS_AT_ONCE = 64
"""Chunks per kernel on an accelerator: 32 MiB of int64."""
THREADS = 8
_COMPUTES = (
    "rope", "rotary", "alibi", "sliding", "window", "layer_types", "scal", "softcap", "eps", "activation", "hidden_act", "multiplier", "head",
    "expert", "topk", "n_group", "scoring", "norm", "parallel", "position_embedding_type", "attention_chunk", "bidirectional", "attn_config",
)  # fmt: skip
"""Parts of the names of config keys that change hidden states without changing a weight: four heads read other numbers than eight
from the same projections."""
_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


class Identity(NamedTuple):
    """What tells a model from any other.

    Attributes:
        reference: Hash of the model before this run: base weights, and an adapter unless it starts at zero.
        base: Hash of the base weights alone, which a resumed run has in its hands too.
        name: What the model is called, for messages.
    """

    reference: str
    base: str
    name: str

    def in_words(self) -> str:
        """Return name and the first digits of the base's hash."""
        return named(self.name, self.base)


def named(name: str, digest: str) -> str:
    """Return a model's name with the first digits of its hash."""
    return f"`{name}` ({str(digest)[:8]})"


def check_base(path: Any, stored: Any, here: Identity) -> None:
    """Refuse a file that came from another base model than the one at hand.

    Args:
        path: The file.
        stored: What it says of itself: `base` and `name`.
        here: The model that this run starts from, before a checkpoint's weights are loaded.

    Raises:
        ValueError: naming file and both models.
    """
    if stored["base"] == here.base:
        return
    raise ValueError(
        f"{path} belongs to the model {named(stored['name'], stored['base'])}, and this run starts from {here.in_words()}, whose "
        "weights or settings differ: the guard would pull towards another model. Load the model that the first run started from "
        "(the same precision, and the same rows where its embeddings were resized), or start afresh without `resume_from_checkpoint`."
    )


def identify(model: nn.Module, processes: int = 1, rank: int = 0) -> Identity:
    """Return the identity of a model before training; on several processes every one calls it and gets the first one's.

    Weights that only the first process has loaded count as loaded; shards (FSDP2) are summed up, ZeRO-3's are gathered one by one.

    Args:
        model: Unwrapped; of a PEFT model the same as of its plain base, unless the adapter starts elsewhere.
        processes: Number of processes.
        rank: Which of them this is.
    """
    found: Identity | None = None
    if rank == 0 or is_sharded(model):
        found = _identify(model)
    if processes > 1:
        box = [found]
        torch.distributed.broadcast_object_list(box, src=0)
        found = box[0]
    assert found is not None
    return found


def _identify(model: nn.Module) -> Identity:
    starts_at_zero = adapter_starts_at_zero(model)
    peft = peft_model(model)
    config = getattr(model if peft is None else peft.get_base_model(), "config", None)
    base, reference = hashlib.sha256(_settings(config)), hashlib.sha256(_settings(config))
    tensors = sorted(_named_tensors(model), key=lambda x: x[0])
    for (name, of_adapter, t), sums in zip(tensors, _all_checksums([t for _, _, t in tensors]), strict=True):
        line = f"{name}|{_shape(t)}|{t.dtype}|{sums}\n".encode()
        if not of_adapter:
            base.update(line)
        if not (of_adapter and starts_at_zero):
            reference.update(line)
    name = getattr(config, "_name_or_path", None) or type(model if peft is None else peft.get_base_model()).__name__
    return Identity(reference.hexdigest(), base.hexdigest(), str(name))


def _settings(config: Any) -> bytes:
    if config is None:
        return b""
    stated = config.get_text_config().to_dict()
    return json.dumps({k: v for k, v in stated.items() if any(p in k for p in _COMPUTES)}, sort_keys=True, default=str).encode()


# What counts


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, bool, Tensor]]:
    """Yield (name as in the plain model, whether it is the adapter's, tensor) for parameters and stored buffers."""
    modules = dict(model.named_modules())
    yield from ((*_plain_name(name, modules), p) for name, p in model.named_parameters())
    for path, module in modules.items():
        for name, b in module._buffers.items():
            if b is not None and name not in module._non_persistent_buffers_set:
                yield (*_plain_name(f"{path}.{name}".lstrip("."), modules), b)
        for name, p in module._parameters.items():
            for part, t in _quantisation(p):
                plain, of_adapter = _plain_name(f"{path}.{name}".lstrip("."), modules)
                yield f"{plain}.{part}", of_adapter, t


def _plain_name(name: str, modules: dict[str, nn.Module]) -> tuple[str, bool]:
    """Return the name without PEFT's layers, and whether what it names is an adapter's own."""
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    at, plain, of_adapter = "", [], False
    for part in name.split("."):
        owner = modules.get(at)
        at = f"{at}.{part}".lstrip(".")
        if (isinstance(owner, PeftModel) and part == "base_model") or (isinstance(owner, BaseTuner) and part == "model"):
            continue
        if (isinstance(owner, BaseTunerLayer) and part == "base_layer") or part in _WRAPPERS:
            continue
        if isinstance(owner, AuxiliaryTrainingWrapper) and part in ("original_module", "token_adapter"):
            continue
        of_adapter |= isinstance(owner, BaseTunerLayer | AuxiliaryTrainingWrapper | PeftModel | BaseTuner)
        plain.append(part)
    return ".".join(plain), of_adapter


def _quantisation(p: Tensor | None) -> Iterator[tuple[str, Tensor]]:
    """Yield what bitsandbytes keeps beside the packed bytes of a weight."""
    state, path = getattr(p, "quant_state", None), "quant_state"
    while state is not None:
        for name in ("absmax", "code", "offset"):
            if isinstance(t := getattr(state, name, None), Tensor):
                yield f"{path}.{name}", t
        state, path = getattr(state, "state2", None), f"{path}.state2"
    for name in ("CB", "SCB"):
        part = getattr(p, name, None)
        if p is not None and isinstance(part, Tensor) and part.data_ptr() != p.data_ptr():
            yield name, part


def _shape(t: Tensor) -> tuple[int, ...]:
    return tuple(getattr(t, "ds_shape", t.shape))


# Checksums


def _all_checksums(tensors: list[Tensor]) -> list[tuple[int, int]]:
    if any(hasattr(t, "ds_id") or hasattr(t, "device_mesh") or t.is_cuda for t in tensors):
        return [checksum(t) for t in tensors]  # collectives need their order, and a GPU needs no threads
    with ThreadPoolExecutor(min(THREADS, torch.get_num_threads())) as pool:
        return list(pool.map(checksum, tensors))


@torch.no_grad()
def checksum(t: Tensor) -> tuple[int, int]:
    """Return the two sums of the module's formula. Of a sharded tensor every process gets the whole's.

    Args:
        t: Any tensor: plain, quantised, sharded. On the meta device, another process's: (0, 0).
    """
    from torch.distributed.tensor import DTensor

    if hasattr(t, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([t]):
            return _of_part(t.data, 0)
    if isinstance(t, DTensor):
        return _of_shards(t)
    t = t.detach()
    if type(t) not in (Tensor, nn.Parameter) and hasattr(t, "__tensor_flatten__"):
        parts = [checksum(getattr(t, name)) for name in t.__tensor_flatten__()[0]]
        return tuple(sum(p[k] * (2 * i + 1) for i, p in enumerate(parts)) % 2**64 for k in (0, 1))
    return _of_part(t, 0)


def _of_shards(t: Any) -> tuple[int, int]:
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if any(not isinstance(p, Replicate) and not (type(p) is Shard and p.dim == 0) for p in t.placements):
        return _of_part(t.full_tensor(), 0)
    _, offset = compute_local_shape_and_global_offset(t.shape, t.device_mesh, t.placements)
    local = t.to_local()
    counts = all(at == 0 for p, at in zip(t.placements, t.device_mesh.get_coordinate(), strict=True) if isinstance(p, Replicate))
    row = t.shape[1:].numel() if t.ndim else 1
    sums = _of_part(local, offset[0] * row if t.ndim else 0) if counts else (0, 0)
    signed = [s - 2**64 if s >= 2**63 else s for s in sums]
    whole = torch.tensor(signed, dtype=torch.int64, device=local.device)
    for dim in range(t.device_mesh.ndim):
        torch.distributed.all_reduce(whole, group=t.device_mesh.get_group(dim))
    first, second = (int(s) % 2**64 for s in whole.tolist())
    return first, second


def _of_part(t: Tensor, first: int) -> tuple[int, int]:
    """Return the share of elements `first` to `first + numel` of a tensor in its sums."""
    if t.is_meta or not t.numel():
        return 0, 0
    row = t.element_size() * (t.shape[1:].numel() if t.ndim > 1 else 1)
    unit = next(u for u in (4, 2, 1) if row % u == 0)
    words = t.contiguous().reshape(-1).view({4: torch.int32, 2: torch.int16, 1: torch.uint8}[unit])
    at = first * t.element_size() // unit
    totals = [0, 0]
    while len(words):
        start = at % CHUNK
        rows = 1 if start or len(words) < CHUNK else min(len(words) // CHUNK, 1 if words.device.type == "cpu" else ROWS_AT_ONCE)
        size = min(CHUNK - start, len(words)) if rows == 1 else rows * CHUNK
        part = words[:size].reshape(rows, -1).long()
        keys = _multipliers(np.arange(at // CHUNK, at // CHUNK + rows, dtype=np.uint64), 2)
        for k in (0, 1):
            m = _within(k, str(words.device))[start : start + part.shape[1]]
            found = [torch.dot(part[0], m).item()] if words.device.type == "cpu" else (part * m).sum(1).tolist()
            totals[k] += sum(int(s) * int(key) for s, key in zip(found, keys[k], strict=True))
        words, at = words[size:], at + size
    return totals[0] % 2**64, totals[1] % 2**64


@cache
def _within(which: int, device: str) -> Tensor:
    numbers = _multipliers(np.arange(CHUNK, dtype=np.uint64), 0)[which]
    return torch.from_numpy(numbers.view(np.int64)).to(device)


def _multipliers(index: np.ndarray, stream: int) -> tuple[np.ndarray, np.ndarray]:
    """Return two sequences of odd 64-bit numbers: splitmix64 (Steele et al., 2014) of the index."""
    made = []
    with np.errstate(over="ignore"):
        for which in (0, 1):
            x = index * np.uint64(0x9E3779B97F4A7C15) + np.uint64((stream + which + 1) * 0xD1B54A32D192ED03 % 2**64)
            x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            made.append((x ^ (x >> np.uint64(31))) | np.uint64(1))
    return made[0], made[1]
