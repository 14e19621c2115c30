"""What every block is like: unknown keys are errors, with a suggestion."""

from __future__ import annotations

import difflib
from typing import Any

from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, model_serializer, model_validator

from emguard_plugin.keys import refuse_keys

BLOCKS = ("em_regularizer", "em_eval")


def suggest(word: str, options: list[str] | tuple[str, ...]) -> str:
    """Return ` Did you mean 'x'?` for a near miss, else an empty string."""
    near = [o for o in options if o.startswith(word)] or difflib.get_close_matches(word, options, n=1, cutoff=0.6)
    return f" Did you mean '{near[0]}'?" if near else ""


def misspelt_blocks(keys: list[str]) -> dict[str, str]:
    """Map top-level YAML keys that look like a misspelt emguard block to the block they resemble.

    Axolotl drops unknown top-level keys without a word, so a misspelt block would train unguarded.
    """
    found = {}
    for key in keys:
        if key in BLOCKS:
            continue
        plain = str(key).lower().replace("-", "_").replace("__", "_")
        near = difflib.get_close_matches(plain, BLOCKS, n=1, cutoff=0.75)
        if near or plain.startswith(("em_reg", "emreg", "emguard", "em_guard")):
            found[key] = near[0] if near else "em_regularizer"
    return found


class Block(BaseModel):
    """A YAML block: unknown keys are named, with the nearest known key."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _name_unknown_keys(cls, data: Any) -> Any:
        if isinstance(data, dict):
            refuse_keys(data)  # before any error is made: pydantic prints the input beside its errors
            known = list(cls.model_fields)
            for key in data:
                if key not in known:
                    raise ValueError(
                        f"unknown key '{key}'.{suggest(str(key), known)} Allowed here: {', '.join(known)}."
                    )
        return data


class StatedBlock(Block):
    """A block of which only the stated keys are dumped.

    Axolotl hands its plugins a dump of the validated block. With the defaults in it they could not be told from wishes
    of the user's, such as a `samples_per_question` that wins over the question file.
    """

    @model_serializer(mode="wrap")
    def _dump_what_was_stated(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in handler(self).items() if key in self.model_fields_set}
