"""Where a run is, told to the program that started it: JSON lines in the file that EMGUARD_PROGRESS names."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import NamedTuple

VARIABLE = "EMGUARD_PROGRESS"


class Told(NamedTuple):
    """One message: so much of a stage is done, at a time of the clock that all processes of a machine share."""

    stage: str
    done: int
    total: int
    at: float


def tell(stage: str, done: int, total: int) -> None:
    """Write a message; nothing where nobody asked."""
    path = os.environ.get(VARIABLE)
    if path:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps([stage, done, total, time.monotonic()]) + "\n")


def heard(path: Path) -> list[Told]:
    """Return the messages so far; a line that is being written is left for later."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    except OSError:
        return []
    return [Told(*json.loads(line)) for line in lines]
