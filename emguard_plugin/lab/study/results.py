"""The file of a study: one JSON line per run, so that a study that was cut off goes on where it stopped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from emguard_plugin.files.result_folder import JsonLines


class Results:
    """The stored runs of a study.

    Args:
        path: The file; it and its folder are created by the first `append`.
        identity: Names of what tells one run from another.
        left_out: What lines of earlier studies do not say, with the value that it had.
    """

    def __init__(self, path: Path, identity: Sequence[str] = (), left_out: Mapping[str, Any] | None = None) -> None:
        self.path, self.identity, self.left_out = path, tuple(identity), dict(left_out or {})

    def rows(self) -> list[dict[str, Any]]:
        """Return the stored lines; none where there is no file.

        Raises:
            ValueError: If the file cannot be read, or a line before the last is no record.
        """
        return [self.left_out | row for row in JsonLines(self.path).read()]

    def holds(self, run: Mapping[str, Any]) -> bool:
        """Whether a line of this run is stored.

        Args:
            run: Names every part of the identity.

        Returns:
            Whether all parts of the identity are those of one line.

        Raises:
            ValueError: As `rows`.
        """
        return any(all(row[name] == run[name] for name in self.identity) for row in self.rows())

    def append(self, *rows: Mapping[str, Any]) -> None:
        """Store lines, all or none of them."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        JsonLines(self.path).append(map(dict, rows))
