"""Which versions of the hosts the tests have run with. The locks in `constraints/` are those runs; a test compares."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version
from typing import Any

TESTED = {
    "axolotl": ((0, 19), (0, 21)),
    "trl": ((1, 9), (1, 14)),
    "transformers": ((5, 16), (5, 20)),
    "peft": ((0, 20), (0, 21)),
    "accelerate": ((1, 13), (1, 15)),
}
"""By package the oldest and the newest (major, minor)."""
NEEDED = ("callback_handler", "accelerator", "model_accepts_loss_kwargs", "compute_loss_func")
"""What a penalty reads of a trainer to know by what it is multiplied."""


def untested() -> list[str]:
    """Return a sentence's part for each installed host outside the tested range, such as `trl 2.0.1 (tested: 1.9 to 1.14)`."""
    found = []
    for package, (oldest, newest) in TESTED.items():
        try:
            installed = version(package)
        except PackageNotFoundError:
            continue
        number = re.match(r"(\d+)\.(\d+)", installed)
        if number is None or not oldest <= (int(number[1]), int(number[2])) <= newest:
            found.append(f"{package} {installed} (tested: {_written(oldest)} to {_written(newest)})")
    return found


def check_host(trainer: Any) -> str | None:
    """Return a warning about hosts that the tests have not run with, or None.

    Raises:
        RuntimeError: when the trainer lacks what a penalty needs, whatever its version.
    """
    found = untested()
    if missing := [name for name in NEEDED if not hasattr(trainer, name)]:
        raise RuntimeError(
            f"em_regularizer: {type(trainer).__name__} has no {', '.join(f'`{name}`' for name in missing)}, so a penalty cannot be scaled "
            f"as its loss is. Installed: {', '.join(found) or 'tested versions'}. Install versions that were tested."
        )
    if not found:
        return None
    return (
        f"em_regularizer: not tested with {', '.join(found)}. What the penalty needs of the trainer is there, so the run goes on; compare "
        "`em_regularizer/*` in the log with an earlier run."
    )


def _written(number: tuple[int, int]) -> str:
    return f"{number[0]}.{number[1]}"
