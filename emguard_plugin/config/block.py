"""What every block is like: nothing is guessed. Unknown keys, switches in place of numbers and empty texts are errors."""

from __future__ import annotations

import math
import re
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, model_serializer, model_validator

from emguard_plugin.config.names import BLOCKS, suggest
from emguard_plugin.keys import refuse_keys, shown

# A number to YAML 1.2 and to people, a text to YAML 1.1, which PyYAML reads: `1e5`, `2.5e-3` without a sign or a dot.
_EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")
_NUMERIC = re.compile(r"[-+]?[\d_]*\.?[\d_]+([eE][-+]?\d+)?%?")


class Block(BaseModel):
    """A YAML block. What the rules below say holds for every field, whoever adds it.

    - A key that is not known is named, with the nearest known one.
    - A switch (true, false, yes, no, on, off) is no number and no text, and a number or a text is no switch.
    - A text is no number, except the exponents that YAML 1.1 takes for texts (`1e5`).
    - Numbers are finite, texts are not blank and hold no NUL and no half characters.
    - Keys of APIs are refused wherever they stand, and no error shows a value.
    """

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _read_as_meant(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        refuse_keys(data)  # before any error is made
        known = list(cls.model_fields)
        for key in data:
            if key not in known:
                raise ValueError(f"unknown key '{shown(str(key))}'.{cls._advice(str(key), known)} Allowed here: {', '.join(known)}.")
        return {key: _read(key, value, _kinds(cls.model_fields[key].annotation)) for key, value in data.items()}

    @classmethod
    def _advice(cls, key: str, known: Sequence[str]) -> str:
        if key in BLOCKS:
            return f" `{key}:` is a block of its own: move it to the top level of the file, without indentation."
        near = suggest(key, known)
        if near:
            return near
        for name, field in cls.model_fields.items():  # a key that belongs one level deeper
            for kind in _flat(field.annotation):
                if isinstance(kind, type) and issubclass(kind, Block) and key in kind.model_fields:
                    return f" It belongs into `{name}:`."
        return ""


class StatedBlock(Block):
    """A block of which only the stated keys are dumped.

    Axolotl hands its plugins a dump of the validated block. With the defaults in it they could not be told from wishes
    of the user's, such as a `samples_per_question` that wins over the question file.
    """

    @model_serializer(mode="wrap")
    def _dump_what_was_stated(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in handler(self).items() if key in self.model_fields_set}


def is_file(path: str | Path) -> bool:
    """Return whether a file is there; also for a text that no file system takes for a name."""
    try:
        return Path(path).expanduser().is_file()
    except (OSError, ValueError, RuntimeError):  # too long; a NUL; `~nobody`
        return False


def _flat(annotation: Any) -> list[Any]:
    """Return the alternatives of a type, with what lists hold."""
    if get_origin(annotation) is Annotated:
        return _flat(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [kind for part in get_args(annotation) for kind in _flat(part)]
    if get_origin(annotation) is list:
        return [annotation, *_flat(get_args(annotation)[0])]
    return [annotation]


def _kinds(annotation: Any) -> list[Any]:
    """Return the alternatives of a type, lists as they are."""
    if get_origin(annotation) is Annotated:
        return _kinds(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [kind for part in get_args(annotation) for kind in _kinds(part)]
    return [annotation]


def _read(key: str, value: Any, kinds: list[Any]) -> Any:
    """Check one value against the kinds that its field takes, and return it; an exponent that YAML left a text as a number."""
    words = [word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)]
    number, text, switch = bool({int, float} & set(kinds)), str in kinds or bool(words), bool in kinds
    for kind in kinds:
        if get_origin(kind) is list and isinstance(value, list | tuple):
            inner = _kinds(get_args(kind)[0])
            return [_read(key, item, inner) for item in value]
        if get_origin(kind) is list and isinstance(value, dict):
            raise ValueError(f"`{key}:` takes a list; begin each entry with `- `.")
    if isinstance(value, bool):
        if not switch:
            wanted = "a number" if number and not text else "a text; put it in quotes" if text and not number else "a number or a word"
            raise ValueError(
                f"`{key}: {shown(value)}` is a switch, and {key} takes {wanted}. YAML reads on, off, yes, no, true and false as switches."
            )
    elif isinstance(value, int | float):
        if switch and not number:
            raise ValueError(f"`{key}: {shown(value)}`: {key} is a switch. Write true or false.")
        if not math.isfinite(value):
            raise ValueError(f"`{key}: {value}` is no finite number.")
    elif isinstance(value, str):
        if not value.strip() and text:
            raise ValueError(f"`{key}:` is blank. Fill it in, or remove it.")
        if "\0" in value or any("\ud800" <= c <= "\udfff" for c in value):
            raise ValueError(f"`{key}:` holds characters that are no text (NUL, or half of a character).")
        if switch and not text:
            raise ValueError(f"`{key}: {shown(value)}` is a text, and {key} is a switch. Write true or false, without quotes.")
        if number and value not in words and str not in kinds:
            if _EXPONENT.fullmatch(value):
                return _read(key, float(value), kinds)
            if _NUMERIC.fullmatch(value.strip()):
                raise ValueError(f"`{key}: {shown(value)}` is a text, and {key} takes a number. Write it without quotes, as 0.5 or 1.0e-3.")
    return value
