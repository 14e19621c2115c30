"""What emguard may replace or remove: only what it made, which it marks. Everything else is refused by name."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path

MARK = ".emguard"
"""File in a folder that emguard made; says for what."""


def our_folder(path: str | Path, what: str) -> Path:
    """Make a folder of ours, or find one.

    Args:
        path: Where; it is made if need be.
        what: The folder's purpose, one word or two; one made for something else is not taken.

    Returns:
        The folder, marked.

    Raises:
        ValueError: When something stands there that emguard did not make for this.
    """
    folder = Path(path)
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise ValueError(f"{folder} is {'a link' if folder.is_symlink() else 'a file'}, not a folder that emguard made. Move it away.")
    if not is_ours(folder, what):
        if folder.is_dir() and (there := sorted(p.name for p in folder.iterdir())):
            shown = ", ".join(there[:3]) + (" ..." if len(there) > 3 else "")
            raise ValueError(
                f"{folder.absolute()} holds files that emguard did not make ({shown}); nothing of it was changed. Move or remove it, or "
                "work in another folder."
            )
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MARK).write_text(f"{what}\n", encoding="utf-8")
    return folder


def is_ours(folder: Path, what: str) -> bool:
    """Return whether emguard made a folder for this purpose."""
    try:
        return not folder.is_symlink() and (folder / MARK).read_text(encoding="utf-8").strip() == what
    except (OSError, UnicodeDecodeError):
        return False


def clear(folder: Path, what: str, names: Collection[str]) -> None:
    """Remove what emguard made in a folder of its own, by name; links are removed, not followed, and anything else stays.

    Args:
        folder: From `our_folder`.
        what: Its purpose.
        names: Of what may be removed.

    Raises:
        ValueError: When the folder is not ours.
    """
    if not is_ours(folder, what):
        raise ValueError(f"{folder} is no folder that emguard made for its {what}; nothing was removed.")
    for name in names:
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def may_replace(path: str | Path, mark: str, what: str) -> Path:
    """Return a path that may be written: nothing stands there, or a file of ours.

    Args:
        path: Where to write.
        mark: What every such file of ours holds.
        what: The file in words, for the message.

    Raises:
        ValueError: When another file, or a folder, stands there.
    """
    path = Path(path)
    if not path.exists():
        return path
    try:
        ours = mark.encode() in path.read_bytes()
    except OSError:
        ours = False
    if not ours:
        raise ValueError(f"{path} is there and is no {what} that emguard wrote; it was left as it is. Name another file.")
    return path
