"""Checkpoint folders of a run: which are whole, which belong together, and where a state is found that one of them lost."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from emguard_plugin.files.state import Damaged

logger = logging.getLogger(__name__)
TRAINER_STATE = "trainer_state.json"
T = TypeVar("T")


def trainer_state(folder: Path) -> dict[str, Any] | None:
    """Return what the host writes last into a checkpoint, or None where it was cut before."""
    try:
        state = json.loads((folder / TRAINER_STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return state if isinstance(state, dict) and isinstance(state.get("log_history"), list) else None


def step_of(folder: Path) -> int | None:
    """Return N of `checkpoint-N`."""
    head, _, number = folder.name.rpartition("-")
    return int(number) if head == "checkpoint" and number.isdigit() else None


def siblings(folder: Path) -> list[Path]:
    """Return the other whole checkpoints of the same run, the nearest first.

    Of the same run means that one's log is the beginning of the other's, losses and gradient norms included.
    """
    mine, own = trainer_state(folder), step_of(folder)
    if mine is None or own is None or not folder.parent.is_dir():
        return []
    found = []
    for other in folder.parent.iterdir():
        step = step_of(other)
        if step is None or step == own or (state := trainer_state(other)) is None:
            continue
        a, b = sorted((mine["log_history"], state["log_history"]), key=len)
        if a and b[: len(a)] == a:
            found.append((abs(step - own), other))
    return [path for _, path in sorted(found)]


def find_state(folder: Path, name: str, read: Callable[[Path, bool], T]) -> T | None:
    """Read a state that is the same all through a run, from this checkpoint or, where that lost it, from another of the run.

    Args:
        folder: The checkpoint that the run continues.
        name: Of the file.
        read: Called with a path and whether it is this very checkpoint's; raises `Damaged` for a file that cannot be used, any other
            ValueError for one that belongs to something else.

    Returns:
        What `read` returned, or None when no checkpoint has the file.

    Raises:
        ValueError: from `read` of this checkpoint's own file, when no other one can stand in.
    """
    lost: Damaged | None = None
    own = folder / name
    if own.exists():
        try:
            return read(own, True)
        except Damaged as exc:
            lost = exc
    for other in siblings(folder):
        path = other / name
        if not path.is_file():
            continue
        try:
            found = read(path, False)
        except ValueError:
            continue
        logger.warning("%s: using %s of the same run instead", lost or f"{folder} holds no {name}", path)
        return found
    if lost is not None:
        raise lost
    return None


def whole_checkpoint(folder: Path) -> Path | None:
    """Return `folder`, or the newest whole checkpoint before it when the host's own files in it were cut while it was written.

    The host writes `trainer_state.json` last. Without it, it resumes from nothing, or from weights without their optimizer.

    Returns:
        None when there is no whole one.
    """
    if not folder.is_dir() or trainer_state(folder) is not None:
        return folder
    real = folder.resolve()  # `latest` may be a link
    own = step_of(real)
    if own is None:
        return folder
    before = [(n, p) for p in real.parent.iterdir() if (n := step_of(p)) is not None and n < own and trainer_state(p) is not None]
    return max(before)[1] if before else None
