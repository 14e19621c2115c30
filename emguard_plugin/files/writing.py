"""The one way in which a file of ours is written: beside its name, then moved there; and the one lock on a folder."""

from __future__ import annotations

import contextlib
import glob
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows: its users write a folder from one process at a time, on their own care
    fcntl = None  # type: ignore[assignment]  # asked for below

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turn what the operating system says while a file is written into a sentence that names it.

    Raises:
        CannotWrite: naming `path` and why.
    """
    try:
        yield
    except OSError as exc:
        raise CannotWrite(path, exc) from exc


@contextlib.contextmanager
def moved_into_place(path: Path) -> Iterator[Path]:
    """Yield a name to write to; move it to `path` when the block ends, remove it when it raises.

    A reader sees the old file or the new one. What a killed writer of the same file left behind is removed.

    Raises:
        CannotWrite: naming `path` and why.
    """
    # A folder of our own: libraries write beside the name that they are given (safetensors: `.tmpXXXXXX`).
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    with naming(path), contextlib.ExitStack() as at_last:
        for left in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
            if not _lives(left.name.split(".")[-2]):
                shutil.rmtree(left, ignore_errors=True)
        beside.mkdir(exist_ok=True)
        at_last.callback(shutil.rmtree, beside, ignore_errors=True)
        part = beside / path.name
        yield part
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)


def write_text(path: Path, text: str) -> None:
    """Write a text file in one piece.

    Raises:
        CannotWrite: naming `path` and why.
    """
    with moved_into_place(path) as part:
        # A lone surrogate has no UTF-8; its escape is valid JSON.
        part.write_text(text, encoding="utf-8", errors="backslashreplace")


class CannotWrite(OSError):
    """A path that cannot be written.

    Args:
        path: Stands in `filename`; the operating system names none where a disk is full.
        why: What was raised; its number stands in `errno`.
    """

    def __init__(self, path: Path, why: Any) -> None:
        said = getattr(why, "strerror", None) or str(why)
        super().__init__(f"{path} cannot be written ({said}). Free space or permissions there, or name another folder.")
        self.filename, self.errno = str(path), getattr(why, "errno", None)

    def __str__(self) -> str:
        """Return the sentence; an OSError with a file name has one of its own."""
        return str(self.args[0])


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power cut, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def locked(folder: Path, name: str, key: str, taken: str | None = None) -> Iterator[None]:
    """Hold a folder for this process. The system frees it when the process dies, however it dies.

    Args:
        folder: Made when it is not there.
        name: Of the lock's file in it.
        key: The YAML's key, for messages.
        taken: What to say where another process holds the folder; without it this one waits.

    Raises:
        OSError: when the folder cannot be written or locked.
        RuntimeError: with `taken`.
    """
    with naming(folder):
        folder.mkdir(parents=True, exist_ok=True)
        handle = (folder / name).open("a")
    with handle:
        if fcntl is not None:
            _hold(handle, folder, key, taken)
        yield


def _hold(handle: Any, folder: Path, key: str, taken: str | None) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if taken is not None:
            raise RuntimeError(taken) from None
        logger.warning("%s: another run is writing %s; waiting for it", key, folder)
        fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError as exc:  # a file system without locks
        raise OSError(f"`{key}`: {folder} cannot be locked ({exc.strerror}). Name a folder on another disk.") from exc


def _lives(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except PermissionError:
        return True
    except (OSError, ValueError, OverflowError):
        return False
    return True
