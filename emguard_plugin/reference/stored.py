"""The reference model: the model as it was before this run.

A run that starts fresh records its reference from the live model before the first update, so a continued adapter,
PiSSA, LoftQ and full fine-tuning are right without a special case. Every checkpoint carries it; a resumed run loads it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from emguard_plugin.files.state import FORMAT, Damaged, digest, older
from emguard_plugin.files.writing import moved_into_place


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

    Returns:
        The tensors by name, and what the file says of them.

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
