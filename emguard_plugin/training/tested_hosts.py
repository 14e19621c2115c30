"""Which versions of the hosts the tests have run with. The locks in `constraints/` are those runs; a test compares."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

TESTED = {
    "axolotl": ((0, 19), (0, 21)),
    "trl": ((1, 9), (1, 16)),
    "transformers": ((5, 16), (5, 24)),
    "peft": ((0, 20), (0, 21)),
    "accelerate": ((1, 13), (1, 15)),
}
"""By package the oldest and the newest (major, minor)."""
ASKED_FOR = (*TESTED, "torch")
"""What the hosts' own requirements are compared on."""
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


def mixed() -> list[str]:
    """Return a sentence's part for each host beside one that it does not go with, as its own requirements say."""
    from packaging.requirements import Requirement
    from packaging.version import InvalidVersion

    found = []
    for package in TESTED:
        try:
            asked = requires(package) or []
        except PackageNotFoundError:
            continue
        for line in asked:
            requirement = Requirement(line)
            if requirement.name not in ASKED_FOR or (requirement.marker is not None and not requirement.marker.evaluate({"extra": ""})):
                continue
            try:
                installed = version(requirement.name)
                fits = requirement.specifier.contains(installed, prereleases=True)
            except (PackageNotFoundError, InvalidVersion):
                continue
            if not fits:
                found.append(f"{package} {version(package)} asks for {requirement.name}{requirement.specifier} and finds {installed}")
    return found


def host_warnings() -> list[str]:
    """Return what is wrong with the installed hosts, each as a sentence."""
    found = []
    if together := mixed():
        found.append(
            f"these hosts do not go together: {'; '.join(together)}. Install one stack whole: a file of `constraints/`, or "
            "`pip install 'emguard-plugin[axolotl]'` into an empty environment."
        )
    if untried := untested():
        found.append(
            f"not tested with {', '.join(untried)}. What the penalty needs of the trainer is looked for before the first step; compare "
            "`em_regularizer/*` in the log with an earlier run."
        )
    return found


def check_host(trainer: Any) -> str | None:
    """Return what is to be said about hosts that the tests have not run with, or that do not go together, or None.

    Raises:
        RuntimeError: when the trainer lacks what a penalty needs, whatever its version.
    """
    found = untested()
    if missing := [name for name in NEEDED if not hasattr(trainer, name)]:
        raise RuntimeError(
            f"em_regularizer: {type(trainer).__name__} has no {', '.join(f'`{name}`' for name in missing)}, so a penalty cannot be scaled "
            f"as its loss is. Installed: {', '.join(found) or 'tested versions'}. Install versions that were tested."
        )
    return "\n".join(f"em_regularizer: {warning}" for warning in host_warnings()) or None


def _written(number: tuple[int, int]) -> str:
    return f"{number[0]}.{number[1]}"
