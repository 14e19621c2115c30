"""What the file of a latent set says of itself, read and checked without torch; `latent_set.py` adds the columns."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, deserialize
from typing_extensions import TypedDict

from emguard_plugin.files import EXACT, parsed, read_json, shown
from emguard_plugin.files.ours import may_replace

FORMAT, VERSION = "emguard latents", 1
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_AGAIN = "Restore it, or run `emguard discover` again."


class LatentsError(ValueError):
    """A latent set that cannot be used, and what to do about it."""


class _Columns(TypedDict):
    __pydantic_config__ = EXACT  # type: ignore[misc]  # as pydantic documents it

    file: str
    sha256: str


class Stated(TypedDict):
    """What the JSON holds, but for its hash."""

    __pydantic_config__ = EXACT  # type: ignore[misc]  # as pydantic documents it

    model: str
    model_revision: str | None
    width: int
    shape: dict[str, Any]
    layers: list[dict[str, Any]]
    scores: list[dict[str, Any]]
    provenance: dict[str, Any]
    calibration: dict[str, Any]
    fingerprint: list[float]
    columns: _Columns


@dataclass(frozen=True)
class Description:
    """What a file says.

    Attributes:
        stated: All of it.
        digest: Its hash.
        columns: The file of the encoder columns; it matches its own hash.
        layers: 0-based decoder layers with latents.
        signs: How many latents rise (1) and fall (-1) with misalignment.
    """

    stated: Stated
    digest: str
    columns: Path
    layers: tuple[int, ...]
    signs: Counter[int]

    def __len__(self) -> int:
        return self.signs.total()


def read_description(path: str | Path) -> Description:
    """Read what a latent set says of itself, and compare both files with their hashes.

    Returns:
        What it says, both hashes checked.

    Raises:
        LatentsError: when a file is missing, unreadable, changed, or something else.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise LatentsError(f"there is no latent set {path}. `emguard discover` writes one.")
    try:
        found = read_json(path)
    except ValueError as exc:
        raise LatentsError(f"{exc} It is no latent set that can be read; `emguard discover` writes one.") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise LatentsError(f"{path} is no latent set. Give the JSON that `emguard discover` wrote.")
    if found.get("version") != VERSION:
        raise LatentsError(f"{path} has format version {shown(found.get('version'))}, this emguard reads {VERSION}.")
    digest = found.pop("sha256", None)
    if digest != digest_of(found):
        raise LatentsError(f"{path} does not match its hash: it was changed. {_AGAIN}")
    try:
        stated = parsed(found, Stated, str(path))
        layers = tuple(settings["layer"] for settings in stated["layers"])
        signs = Counter(sign for settings in stated["layers"] for sign in settings["signs"])
    except (KeyError, TypeError, ValueError) as exc:
        raise LatentsError(f"{path} holds no latent set that can be used: {exc}") from None
    columns = path.with_name(stated["columns"]["file"])
    if _hash_of(columns) != stated["columns"]["sha256"]:
        raise LatentsError(f"{columns} does not match its hash: it was changed. {_AGAIN}")
    return Description(stated, digest, columns, layers, signs)


def digest_of(stated: dict[str, Any]) -> str:
    """Return the hash of what a file says."""
    return hashlib.sha256(json.dumps(stated, sort_keys=True).encode()).hexdigest()


def _hash_of(columns: Path) -> str:
    """Return what `reference.stored.tensors_hash` makes of the tensors in a file."""
    try:
        tensors: dict[str, Any] = dict(deserialize(columns.read_bytes()))  # type: ignore[no-untyped-call]  # a library without types
    except (OSError, SafetensorError) as exc:
        raise LatentsError(f"the encoder columns {columns} cannot be read ({exc}). They belong beside the JSON.") from exc
    h = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        h.update(f"{name}|torch.{_DTYPES.get(tensor['dtype'], tensor['dtype'])}|{tuple(tensor['shape'])}|".encode())
        h.update(tensor["data"])
    return h.hexdigest()


def check_place(path: str | Path) -> Path:
    """Return where a latent set may be written: `NAME.json` and `NAME.safetensors` are not there, or are a latent set's.

    Raises:
        ValueError: when `path` does not end in `.json`, or one of them is something else.
    """
    path = Path(path)
    if path.suffix != ".json":
        raise LatentsError(f"a latent set is a `.json` file, not `{path.name}`.")
    may_replace(path, json.dumps(FORMAT), "latent set")
    columns = path.with_suffix(".safetensors")
    if columns.exists() and not path.exists():
        raise LatentsError(f"{columns} is there and belongs to no latent set; it would be replaced. Name another `.json`.")
    return path
