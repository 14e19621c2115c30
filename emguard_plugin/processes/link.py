"""A failure on one process of a run reaches the others, although the failed one no longer joins their collectives.

What is told goes through the store of the process group, beside its collectives: a collective that one rank leaves out
holds the others until the group's timeout, half an hour by default.
"""

from __future__ import annotations

import json
import os
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from emguard_plugin.exit_codes import EXIT_ERROR
from emguard_plugin.files.secrets import redact

T = TypeVar("T")

GRACE = 4.0
"""Seconds in which ranks that fail alike, or finish, are expected to have said so."""
VAIN = 10.0
"""Seconds for which a rank may wait in a collective for one that has left."""
# The one text of others that is read: torch raises the same RuntimeError for a peer that is gone as for a wrong shape. Where a new
# torch says it in other words, a rank reports the failure as its own, and the run ends all the same.
_COLLECTIVE = re.compile(r"gloo|nccl|process ?group|connection (closed|reset|refused)|broken pipe|socket|distnetwork", re.IGNORECASE)
_counts: Counter[str] = Counter()


class Torn(RuntimeError):
    """Another rank failed, or this one did while the others go on: the run cannot go on."""


class _Board:
    """What every rank says of one piece of work that all do."""

    def __init__(self, what: str) -> None:
        import torch.distributed as dist

        _counts[what] += 1
        self.what, self.rank, self.ranks = what, dist.get_rank(), dist.get_world_size()
        self._key = f"emguard/{what}/{_counts[what]}"
        self._store = dist.distributed_c10d._get_default_store()

    def copy(self) -> Any:
        """Return a connection of its own for another thread: one that waits would hold this one."""
        return self._store.clone() if hasattr(self._store, "clone") else self._store

    def say(self, state: str, error: BaseException | None = None) -> None:
        """Tell the others: `done`, `failed` (and ready to go on), or `gone`."""
        text = None if error is None else redact(f"{type(error).__name__}: {error}")[:1000]
        self._store.set(f"{self._key}/{self.rank}/{state}", json.dumps(text))
        self._store.add(f"{self._key}/{state}", 1)

    def count(self, *states: str, store: Any = None) -> int:
        """Return how many ranks said one of these, this one included."""
        return sum((store or self._store).add(f"{self._key}/{state}", 0) for state in states)

    def heard(self, state: str, store: Any = None) -> dict[int, str | None]:
        """Return the other ranks that said so, each with its error."""
        store, found = store or self._store, {}
        for rank in range(self.ranks) if self.count(state, store=store) else ():
            key = f"{self._key}/{rank}/{state}"
            if rank != self.rank and store.check([key]):
                found[rank] = json.loads(store.get(key))
        return found

    def torn(self, said: dict[int, str | None]) -> Torn:
        """Return the error of a rank that hears of others' failures."""
        told = "; ".join(f"rank {rank} failed with {error}" for rank, error in said.items())
        return Torn(f"{self.what}: {told}. The run ends on all ranks.")


def agree(work: Callable[[], T], what: str, patience: float = 1800.0) -> T:
    """Do a piece of work on every rank, and return its result if it went well on all of them.

    Args:
        work: May use collectives.
        what: What it is, for messages; every rank calls with the same.
        patience: Seconds to wait for a rank that says nothing.

    Returns:
        What `work` returned on this rank.

    Raises:
        Torn: If a rank failed while others were inside the work, so that no collective can be trusted any more.
        RuntimeError: If it failed on another rank, and all are ready to go on.
        Exception: What `work` raised here, if all ranks are ready to go on.
    """
    board = _board(what)
    if board is None:
        return work()
    with _watched(board):
        try:
            result = work()
        except BaseException as error:
            _left(board, error)
            raise
        board.say("done")
        until = time.monotonic() + patience
        while True:
            if gone := board.heard("gone"):
                raise board.torn(gone)
            if failed := board.heard("failed"):
                told = "; ".join(f"rank {rank}: {error}" for rank, error in failed.items())
                raise RuntimeError(f"{what} failed on another process. {told}")
            if board.count("done") == board.ranks:
                return result
            if time.monotonic() > until:
                raise Torn(f"{what}: no word from the other ranks for {patience:g} s.")
            time.sleep(0.05)


def _left(board: _Board, error: BaseException) -> None:
    """Say that the work failed here; raise if the others cannot go on with this rank.

    Raises:
        Torn: See `agree`.
    """
    if _COLLECTIVE.search(str(error)):
        _because(board, error)
    board.say("failed", error)
    until = time.monotonic() + GRACE
    while time.monotonic() < until:
        if board.count("done", "failed", "gone") >= board.ranks:
            break
        time.sleep(0.05)
    else:
        board.say("gone", error)
        raise Torn(
            f"{board.what} failed on rank {board.rank} while other ranks go on with it, so the run ends on all: "
            f"{type(error).__name__}: {error}"
        ) from error
    if gone := board.heard("gone"):
        raise board.torn(gone) from error


def _because(board: _Board, error: BaseException) -> None:
    """Raise what another rank said, if a collective failed here because that rank had left."""
    until = time.monotonic() + 2.0
    while time.monotonic() < until:
        if said := board.heard("gone") or board.heard("failed"):
            board.say("gone", error)
            raise board.torn(said) from error
        time.sleep(0.05)


@contextmanager
def linked(what: str) -> Iterator[None]:
    """Tell the other ranks when this one leaves by an exception, and turn a collective that fails for it into a reason.

    Raises:
        Torn: In place of a broken collective, with the rank and the error that broke it.
    """
    board = _board(what)
    if board is None:
        yield
        return
    with _watched(board):
        try:
            yield
        except Torn as error:
            board.say("gone", error)
            raise
        except BaseException as error:
            if _COLLECTIVE.search(str(error)):
                _because(board, error)
            board.say("gone", error)
            raise


def _board(what: str) -> _Board | None:
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return None
    return _Board(what)


@contextmanager
def _watched(board: _Board) -> Iterator[None]:
    """End this process if it waits in vain for a rank that has left: nothing interrupts a collective from inside.

    A launcher does so when the failed process ends; this is for one that lives on, in a notebook or a hung clean-up.
    """
    over, inside = threading.Event(), threading.get_ident()

    def watch() -> None:
        store, still, since = board.copy(), None, 0.0
        while not over.wait(1.0):
            try:
                gone = board.heard("gone", store)
            except Exception:  # the store went with the process that held it: the collectives fail by themselves
                return
            frame = sys._current_frames().get(inside)
            now = None if frame is None else (id(frame), frame.f_lasti)
            if not gone or now != still:
                still, since = now, time.monotonic()
            elif time.monotonic() - since > VAIN:
                print(f"emguard: {board.torn(gone)} Rank {board.rank} waits for it in vain and ends.", file=sys.stderr, flush=True)
                os._exit(EXIT_ERROR)

    thread = threading.Thread(target=watch, daemon=True, name="emguard-ranks")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(VAIN)  # one that is inside the store's C++ while Python ends aborts the process
