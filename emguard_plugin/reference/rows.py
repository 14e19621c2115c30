"""Rows of recorded activations, known by the hash of their ids, in memory or in a folder that says what it belongs to.

Several runs may write to one folder: a file never changes, and its name is its own.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from emguard_plugin.files.state import Damaged
from emguard_plugin.files.writing import CannotWrite
from emguard_plugin.reference.stored import load_reference, save_reference

KEY = "em_regularizer.block_em.cache"
ROWS_PER_FILE = 512


def row_key(ids: Sequence[int], before: Sequence[int] = ()) -> str:
    """Return the hash that a conversation is known by: its ids, and those before it in its row where it sees them."""
    return hashlib.sha256(f"{list(before)}|{list(ids)}".encode()).hexdigest()


class RowStore:
    """Recorded rows by content hash, in memory, and in a folder if one is named.

    Args:
        folder: Where to keep them.
        about: What they belong to; compared on load.
        rank: Of the process, which writes files of its own.
    """

    def __init__(self, folder: Path | None, about: Mapping[str, str], rank: int = 0) -> None:
        self.folder, self.about, self.rank = folder, dict(about), rank
        self.rows: dict[str, Tensor] = {}
        self._new: list[str] = []
        if folder is not None and folder.is_dir():
            self.load(folder)

    def load(self, folder: Path, advice: str = "Delete the folder, or name another one") -> None:
        """Read every file of a folder.

        Args:
            folder: Where they lie.
            advice: What to do about a damaged one.

        Raises:
            ValueError: when one is damaged or belongs to another model or latent set.
        """
        for path in sorted(folder.glob("rows-*.safetensors")):
            try:
                self.rows |= load_reference(path, self.about, advice="")
            except Damaged as exc:
                raise Damaged(f"`{KEY}`: a file in {folder} was cut, or was changed ({exc}). {advice}.") from exc
            except ValueError as exc:
                raise ValueError(
                    f"`{KEY}`: {folder} holds latents of another base model, precision or latent set ({exc}). Delete the folder, or name "
                    "another one."
                ) from exc

    def put(self, key: str, latents: Tensor) -> None:
        """Keep one row (tokens, columns)."""
        if key not in self.rows:
            self.rows[key] = latents.detach().cpu().clone()
            self._new.append(key)
        if self.folder is not None and len(self._new) >= ROWS_PER_FILE:
            self.flush()

    def flush(self, folder: Path | None = None) -> None:
        """Write what is new; with `folder`, everything, there.

        Raises:
            OSError: naming the file, when it cannot be written.
        """
        names = list(self.rows) if folder is not None else self._new
        folder = folder or self.folder
        if folder is None or not names:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise CannotWrite(folder, exc) from exc
        at = sum(1 for _ in folder.glob(f"rows-{self.rank}-*.safetensors"))
        path = folder / f"rows-{self.rank}-{at:05d}-{uuid.uuid4().hex[:12]}.safetensors"
        save_reference(path, {n: self.rows[n] for n in names}, self.about)
        self._new = []
