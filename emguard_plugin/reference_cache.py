"""Hidden states of the reference model at the held anchor positions, recorded once: 2 H bytes per token, not 2 V.

With the output head they give the reference distribution exactly. In memory, or memory-mapped from a folder that says what
it belongs to: tokenizer, anchors, base model. A folder that belongs to something else is an error, never used or replaced.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from emguard_plugin.reference import adapter_starts_at_zero, peft_model

META, HIDDEN, HEAD = "reference.json", "hidden.bin", "head.safetensors"
SAMPLES = 64
"""Elements of each weight that identify a model."""
BELONGS_TO = {
    "tokenizer": "another tokenizer",
    "anchors": "other anchors, `tokens`, or another chat template",
    "model": "another base model",
    "precision": "another precision",
}
_COMPUTES = ("rope", "sliding", "layer_types", "scal", "softcap", "eps", "hidden_act", "multiplier")
"""Parts of the names of config keys that change hidden states without changing a weight."""
_DTYPES = {str(t).removeprefix("torch."): t for t in (torch.float32, torch.bfloat16, torch.float16, torch.float64)}


def model_identity(model: nn.Module) -> str:
    """Return a hash over names, shapes and 64 spread elements of every weight, and the settings that weights do not show."""
    h = hashlib.sha256(_settings(model).encode())
    peft = peft_model(model)
    skip = getattr(getattr(peft, "base_model", None), "prefix", None) if adapter_starts_at_zero(model) else None
    for name, p in sorted(model.named_parameters()):
        if skip and (skip in name or "modules_to_save" in name):
            continue
        plain = name.removeprefix("base_model.model.")
        for layer in (".base_layer", ".original_module"):
            plain = plain.replace(layer, "")
        h.update(f"{plain}|{tuple(p.shape)}|{p.dtype}|".encode())
        if p.is_meta or not p.numel():
            continue
        flat = p.detach().flatten()
        at = torch.linspace(0, flat.numel() - 1, min(SAMPLES, flat.numel()), dtype=torch.float64, device=p.device).long()
        h.update(flat[at].double().cpu().numpy().tobytes())
    return h.hexdigest()


def _settings(model: nn.Module) -> str:
    peft = peft_model(model)
    config = getattr(model if peft is None else peft.get_base_model(), "config", None)
    if config is None:
        return ""
    stated = config.get_text_config().to_dict()
    return json.dumps({k: v for k, v in stated.items() if any(part in k for part in _COMPUTES)}, sort_keys=True, default=str)


def tokenizer_identity(tokenizer: Any) -> str:
    """Return a hash over the vocabulary."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


class ReferenceCache:
    """Hidden states of every anchor, and the output head of that time when training changes it.

    Args:
        sizes: Held positions per anchor.
        folder: Where to map the hidden states from, or None for memory.
    """

    def __init__(self, sizes: Sequence[int], folder: Path | None = None) -> None:
        self.ends = [0, *accumulate(sizes)]
        self.folder = folder
        self.head: tuple[Tensor, Tensor | None] | None = None
        self._hidden: Tensor | None = None

    def put(self, row: int, hidden: Tensor, write: bool = True) -> None:
        """Store the hidden states (held positions, H) of one anchor; `write` is for one process of several."""
        if self._hidden is None:
            self._hidden = self._allocate(hidden.shape[-1], hidden.dtype, write)
        if write or self.folder is None:
            self._hidden[self.ends[row] : self.ends[row + 1]] = hidden.detach().cpu()

    def _allocate(self, width: int, dtype: torch.dtype, write: bool) -> Tensor:
        if self.folder is None or not write:
            return torch.empty((self.ends[-1] if self.folder is None else 0, width), dtype=dtype)
        self.folder.mkdir(parents=True, exist_ok=True)
        return _mapped(self.folder / HIDDEN, self.ends[-1], width, dtype)

    def take(self, rows: Sequence[int], device: torch.device) -> Tensor:
        """Return the hidden states of these anchors, one after the other: (held positions, H)."""
        assert self._hidden is not None
        return torch.cat([self._hidden[self.ends[i] : self.ends[i + 1]] for i in rows]).to(device)

    def keep_head(self, weight: Tensor, bias: Tensor | None) -> None:
        """Copy the head, which training is about to change."""
        self.head = (weight.detach().clone(), None if bias is None else bias.detach().clone())

    @property
    def nbytes(self) -> int:
        """Bytes of hidden states and head."""
        tensors = [self._hidden, *(self.head or ())]
        return sum(t.nbytes for t in tensors if t is not None)

    def save(self, folder: Path, about: Mapping[str, str]) -> str:
        """Write hidden states, head and what they belong to; the description last, so half a cache is none.

        Returns:
            The hash of the contents.
        """
        assert self._hidden is not None
        folder.mkdir(parents=True, exist_ok=True)
        width, dtype = self._hidden.shape[1], str(self._hidden.dtype).removeprefix("torch.")
        if self.folder is None:
            _mapped(folder / HIDDEN, self.ends[-1], width, self._hidden.dtype).copy_(self._hidden)
        if self.head is not None:
            named = dict(zip(("weight", "bias"), self.head, strict=True))
            save_file({k: t.cpu().contiguous() for k, t in named.items() if t is not None}, str(folder / HEAD))
        content = contents_hash(folder)
        meta = {**about, "dtype": dtype, "tokens": self.ends[-1], "width": width, "head": self.head is not None}
        part = folder / (META + ".part")
        part.write_text(json.dumps({**meta, "sha256": content}, indent=1), encoding="utf-8")
        part.replace(folder / META)
        return content

    def load(self, folder: Path, about: Mapping[str, str], key: str = "em_regularizer.kl.cache") -> str:
        """Map a stored cache and check that it belongs to this run.

        Returns:
            The hash of the contents.

        Raises:
            ValueError: when it is damaged, or of another tokenizer, anchor set, base model or precision.
        """
        try:
            meta = json.loads((folder / META).read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError) as exc:
            raise ValueError(f"`{key}`: {folder} holds no readable cache ({exc}). Delete the folder.") from exc
        for name, value in about.items():
            if meta.get(name) != value:
                raise ValueError(
                    f"`{key}`: the cache in {folder} was recorded with {BELONGS_TO.get(name, name)}. Delete the folder, or name "
                    "another one."
                )
        content = contents_hash(folder)
        if content != meta.get("sha256") or meta.get("tokens") != self.ends[-1]:
            raise ValueError(f"`{key}`: the cache in {folder} does not match its hash: it was changed. Delete the folder.")
        self.folder = folder
        self._hidden = _mapped(folder / HIDDEN, self.ends[-1], meta["width"], _DTYPES[meta["dtype"]])
        if meta["head"]:
            stored = load_file(str(folder / HEAD))
            self.head = (stored["weight"], stored.get("bias"))
        return content


def _mapped(path: Path, tokens: int, width: int, dtype: torch.dtype) -> Tensor:
    return torch.from_file(str(path), shared=True, size=tokens * width, dtype=dtype).view(tokens, width)


def contents_hash(folder: Path) -> str:
    """Return the sha256 over hidden states and head."""
    h = hashlib.sha256()
    for name in (HIDDEN, HEAD):
        path = folder / name
        if path.is_file():
            with path.open("rb") as file:
                h.update(hashlib.file_digest(file, "sha256").digest())
    return h.hexdigest()


def is_cache(folder: Path) -> bool:
    """Whether `folder` holds a finished cache."""
    return (folder / META).is_file()


def discard_unfinished(folder: Path) -> None:
    """Remove what an interrupted recording left behind, and nothing else.

    Raises:
        ValueError: when the folder holds other files.
    """
    if not folder.is_dir():
        return
    strange = [p.name for p in folder.iterdir() if p.name not in (HIDDEN, HEAD, META + ".part")]
    if strange:
        raise ValueError(
            f"`em_regularizer.kl.cache`: {folder} holds other files ({', '.join(sorted(strange)[:3])}). Name an empty or new "
            "folder."
        )
    shutil.rmtree(folder)
