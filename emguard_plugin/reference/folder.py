"""Hidden states of the reference model at the held anchor positions, recorded once: 2 H bytes per token, not 2 V.

With the output head they give the reference distribution exactly. In memory, or memory-mapped from a folder that says what
it belongs to: tokenizer, anchors, base model. A folder that belongs to something else is an error, never used or replaced.
It is written by one process at a time (`state_files.locked`), beside the names that count, and read without a right to write.
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
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from emguard_plugin.files.state import (
    LOCK,
    Damaged,
    read_json,
    write_json,
)
from emguard_plugin.files.writing import CannotWrite, moved_into_place, sync_folder

META, HIDDEN, HEAD = "reference.json", "hidden.bin", "head.safetensors"
RECORDING = HIDDEN + ".recording"
BELONGS_TO = {
    "tokenizer": "another tokenizer",
    "anchors": "other anchors, `tokens`, or another chat template",
    "model": "another base model",
    "precision": "another precision",
}
_DTYPES = {str(t).removeprefix("torch."): t for t in (torch.float32, torch.bfloat16, torch.float16, torch.float64)}
_FIELDS = {"dtype": str, "tokens": int, "width": int, "head": bool, "files": dict}


def tokenizer_identity(tokenizer: Any) -> str:
    """Return a hash over the vocabulary."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


class ReferenceCache:
    """Hidden states of every anchor, and the output head of that time when training changes it.

    Args:
        sizes: Held positions per anchor.
        folder: Where to record the hidden states to, or None for memory. The caller holds its lock.
    """

    def __init__(self, sizes: Sequence[int], folder: Path | None = None) -> None:
        self.ends = [0, *accumulate(sizes)]
        self.folder = folder
        self.head: tuple[Tensor, Tensor | None] | None = None
        self._hidden: Tensor | None = None
        self._recording: tuple[int, torch.dtype] | None = None

    def put(self, row: int, hidden: Tensor, write: bool = True) -> None:
        """Store the hidden states (held positions, H) of one anchor; `write` is for one process of several.

        Raises:
            OSError: naming the folder, when the disk is full or cannot be written.
        """
        hidden = hidden.detach().cpu().contiguous()
        if self.folder is not None:
            if write:
                self._write(row, hidden)
            return
        if self._hidden is None:
            self._hidden = torch.empty((self.ends[-1], hidden.shape[-1]), dtype=hidden.dtype)
        self._hidden[self.ends[row] : self.ends[row + 1]] = hidden

    def _write(self, row: int, hidden: Tensor) -> None:
        """Write at the row's place: a full disk is an error here, where writing into mapped memory would kill the process."""
        assert self.folder is not None
        path = self.folder / RECORDING
        try:
            if self._recording is None:
                self.folder.mkdir(parents=True, exist_ok=True)
                path.write_bytes(b"")
                self._recording = (hidden.shape[-1], hidden.dtype)
            with path.open("r+b") as file:
                file.seek(self.ends[row] * hidden.shape[-1] * hidden.element_size())
                file.write(hidden.view(torch.uint8).numpy().tobytes())
        except OSError as exc:
            raise CannotWrite(path, exc) from exc

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
            The hash of all of it, description included.

        Raises:
            OSError: naming the file, when it cannot be written.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise CannotWrite(folder, exc) from exc
        if self._recording is not None:
            width, kind = self._recording
            try:
                (folder / RECORDING).replace(folder / HIDDEN)
            except OSError as exc:
                raise CannotWrite(folder / HIDDEN, exc) from exc
        else:
            assert self._hidden is not None
            (width, kind), hidden = (self._hidden.shape[1], self._hidden.dtype), self._hidden
            with moved_into_place(folder / HIDDEN) as part, part.open("wb") as file:
                for at in range(0, len(hidden), 4096):
                    file.write(hidden[at : at + 4096].view(torch.uint8).numpy().tobytes())
        if self.head is not None:
            named = dict(zip(("weight", "bias"), self.head, strict=True))
            with moved_into_place(folder / HEAD) as part:
                try:
                    save_file({k: t.cpu().contiguous() for k, t in named.items() if t is not None}, str(part))
                except SafetensorError as exc:
                    raise OSError(exc) from exc
        dtype, head = str(kind).removeprefix("torch."), self.head is not None
        files = _hashes(folder, head)
        write_json(folder / META, {**about, "dtype": dtype, "tokens": self.ends[-1], "width": width, "head": head, "files": files})
        sync_folder(folder)
        self._recording = None
        self._open(folder, width, kind)
        return contents_hash(folder)

    def load(self, folder: Path, about: Mapping[str, str], key: str = "em_regularizer.kl.cache", advice: str = "Delete the folder") -> str:
        """Map a stored cache and check that it belongs to this run.

        Args:
            folder: Where it lies.
            about: What it must belong to.
            key: Of the YAML, for messages.
            advice: What to do about a damaged one.

        Returns:
            The hash of all of it.

        Raises:
            ValueError: when it is damaged, or of another tokenizer, anchor set, base model or precision.
        """
        try:
            meta = read_json(folder / META)
        except Damaged as exc:
            raise Damaged(f"`{key}`: {folder} holds no readable cache ({exc}). {advice}.") from exc
        for name, value in about.items():
            if meta.get(name) != value:
                raise ValueError(
                    f"`{key}`: the cache in {folder} was recorded with {BELONGS_TO.get(name, name)}. Delete the folder, or name "
                    "another one."
                )
        changed = f"`{key}`: the cache in {folder} does not match its hash: it was changed. {advice}."
        if any(type(meta.get(name)) is not kind for name, kind in _FIELDS.items()) or meta["dtype"] not in _DTYPES:
            raise Damaged(changed)
        kind, width = _DTYPES[meta["dtype"]], meta["width"]
        try:
            if meta["tokens"] != self.ends[-1] or _hashes(folder, meta["head"]) != meta["files"]:
                raise Damaged(changed)
            self._open(folder, width, kind)
            if meta["head"]:
                stored = load_file(str(folder / HEAD))
                self.head = (stored["weight"], stored.get("bias"))
        except (OSError, SafetensorError, KeyError, RuntimeError) as exc:
            raise Damaged(f"`{key}`: the cache in {folder} cannot be read ({exc}). {advice}.") from exc
        return contents_hash(folder)

    def _open(self, folder: Path, width: int, dtype: torch.dtype) -> None:
        path, size = folder / HIDDEN, self.ends[-1] * width
        if path.stat().st_size != size * dtype.itemsize:
            raise Damaged(f"{path} has {path.stat().st_size} bytes, and its description says {size * dtype.itemsize}.")
        # Not shared: mapped for reading alone, from a folder that may be read-only.
        self._hidden = torch.from_file(str(path), shared=False, size=size, dtype=dtype).view(self.ends[-1], width)
        self.folder = folder


def _hashes(folder: Path, head: bool) -> dict[str, str]:
    found = {}
    for name in (HIDDEN, HEAD)[: 1 + head]:
        with (folder / name).open("rb") as file:
            found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def contents_hash(folder: Path) -> str:
    """Return the hash of a finished cache: of its description, which holds those of the other files."""
    return hashlib.sha256((folder / META).read_bytes()).hexdigest()


def is_cache(folder: Path) -> bool:
    """Whether `folder` holds a finished cache."""
    return (folder / META).is_file()


def check_ours(folder: Path) -> None:
    """Refuse a folder that holds no finished cache, and files that are none of an unfinished one.

    Raises:
        ValueError: naming them.
    """
    if is_cache(folder):
        return
    if strange := sorted(set(_names(folder)) - set(_ours(folder)) - {META + ".part"}):
        raise ValueError(f"`em_regularizer.kl.cache`: {folder} holds other files ({', '.join(strange[:3])}). Name an empty or new folder.")


def discard_unfinished(folder: Path) -> None:
    """Remove what an interrupted recording left behind, and nothing else. The caller holds the lock.

    Raises:
        ValueError: when the folder holds other files.
    """
    check_ours(folder)
    discard(folder)


def discard(folder: Path) -> None:
    """Remove the files of a cache, the description first, and leave what is not one of them."""
    for name in sorted(_ours(folder), key=lambda n: n != META):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _names(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir() if p.name != LOCK] if folder.is_dir() else []


def _ours(folder: Path) -> list[str]:
    parts = tuple(f".{n}." for n in (META, HIDDEN, HEAD))
    return [n for n in _names(folder) if n in (META, HIDDEN, HEAD, RECORDING) or (n.startswith(parts) and n.endswith(".part"))]
