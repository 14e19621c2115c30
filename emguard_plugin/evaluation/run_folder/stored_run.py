"""What a run folder says of the run in it: the schema of `protocol.json`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict  # pydantic reads no other TypedDict on Python 3.11

from emguard_plugin.files import EXACT, read_record
from emguard_plugin.files import result_folder as store


class StoredRun(TypedDict):
    """What `protocol.json` says about a run."""

    __pydantic_config__ = EXACT  # type: ignore[misc]  # as pydantic documents it
    created: str
    run: NotRequired[str]
    protocol: dict[str, Any]
    models: dict[Literal["base", "tuned"], Any]
    versions: dict[str, str]
    example_prompt: str


def stored_run(folder: Path) -> dict[str, Any]:
    """Return what an earlier run stored about itself.

    Raises:
        ValueError: If the folder holds no answers, or what it says of them is damaged.
    """
    store.claimed(folder)
    found: dict[str, Any] = {**read_record(folder / store.PROTOCOL, StoredRun)}
    if not isinstance(found["protocol"].get("decoding"), dict) or "tuned" not in found["models"]:
        raise ValueError(f"{folder / store.PROTOCOL} is damaged: it names no decoding or no model. Draw the answers into another folder.")
    return found
