"""Files of ours that a run needs again: written beside their name and moved, with a hash over all they say, locked while shared."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)
FORMAT = 2
"""2: identities see every weight, and the hash sees every field."""
LOCK = ".emguard.lock"


class Damaged(ValueError):
    """A file of ours that is cut, changed, or no such file."""


@contextlib.contextmanager
def moved_into_place(path: Path) -> Iterator[Path]:
    """Yield a name beside `path` to write to; move it there when the block ends, remove it when it raises.

    Raises:
        OSError: naming `path` and why, when it cannot be written.
    """
    # A folder of our own: libraries write beside the name that they are given (safetensors: `.tmpXXXXXX`).
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        beside.mkdir(exist_ok=True)
        part = beside / path.name
        yield part
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as exc:
        raise cannot_write(path, exc) from exc
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def cannot_write(path: Path, why: Any) -> OSError:
    """Return the error for a path that cannot be written."""
    said = getattr(why, "strerror", None) or str(why)
    return OSError(f"{path} cannot be written ({said}). Free space or permissions there, or name another folder.")


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


@contextlib.contextmanager
def locked(folder: Path, key: str) -> Iterator[None]:
    """Hold a folder for writing; wait, and say so, while another process does. The system frees it when a process dies.

    Args:
        folder: Made when it is not there.
        key: The YAML's key, for messages.

    Raises:
        OSError: when the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = (folder / LOCK).open("a")
    except OSError as exc:
        raise cannot_write(folder, exc) from exc
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.warning("%s: another run is writing %s; waiting for it", key, folder)
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as exc:  # a file system without locks
            raise OSError(f"`{key}`: {folder} cannot be locked ({exc.strerror}). Name a folder on another disk.") from exc
        yield


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power cut, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
