"""What `emguard check` finds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Report:
    """What `emguard check` prints.

    Attributes:
        active: What will be held or measured.
        notes: What could not be checked here.
        problems: What must change before the run does what it says.
    """

    active: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def note(self, line: str) -> None:
        """Add a note, once."""
        if line not in self.notes:
            self.notes.append(line)


def is_trl(cfg: Mapping[str, Any]) -> bool:
    """Whether a YAML is one for `emguard sft`."""
    return "model_name_or_path" in cfg


def has_adapter(cfg: Mapping[str, Any]) -> bool:
    """Whether an adapter is trained."""
    return bool(cfg.get("use_peft") if is_trl(cfg) else cfg.get("adapter"))
