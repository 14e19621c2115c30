"""Files of ours that a run needs again: written beside their name and moved, with a hash over all they say, locked while shared."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from emguard_plugin.files import writing
from emguard_plugin.files.writing import moved_into_place

FORMAT = 2
"""2: identities see every weight, and the hash sees every field."""
LOCK = ".emguard.lock"


class Damaged(ValueError):
    """A file of ours that is cut, changed, or no such file."""


def write_json(path: Path, stated: Mapping[str, Any]) -> None:
    """Write a state with the hash of all it says.

    Raises:
        OSError: naming the file, when it cannot be written.
    """
    stated = json.loads(json.dumps({**stated, "format": FORMAT}))  # the hash must see what a reader will
    with moved_into_place(path) as part:
        part.write_text(json.dumps({**stated, "sha256": digest(stated)}), encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Read a state and check its hash.

    Returns:
        What it says, without its hash.

    Raises:
        Damaged: naming the file, when it cannot be read, is cut, changed, or an earlier emguard's.
    """
    try:
        stated = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as exc:
        raise Damaged(f"{path} cannot be read ({exc}).") from exc
    if not isinstance(stated, dict):
        raise Damaged(f"{path} is no file of emguard's: it holds a {type(stated).__name__} instead of an object.")
    if "sha256" not in stated or stated.get("format") != FORMAT:
        raise Damaged(older(path))
    if stated.pop("sha256") != digest(stated):
        raise Damaged(f"{path} does not match its hash: it was changed.")
    return stated


def older(path: Path) -> str:
    """Return why a file without this format is not taken."""
    return (
        f"{path} is damaged, or an earlier emguard wrote it, whose identity of the model before the run could miss edited weights: "
        "nothing shows which model it belongs to."
    )


def digest(stated: Mapping[str, Any]) -> str:
    """Return the sha256 over a JSON value."""
    return hashlib.sha256(json.dumps(stated, sort_keys=True).encode()).hexdigest()


def locked(folder: Path, key: str) -> contextlib.AbstractContextManager[None]:
    """Hold a folder for writing; wait, and say so, while another process does.

    Args:
        folder: Made when it is not there.
        key: The YAML's key, for messages.

    Returns:
        A context manager that frees it at its end.

    Raises:
        OSError: when the folder cannot be written.
    """
    return writing.locked(folder, LOCK, key)
