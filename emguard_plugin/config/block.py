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
from emguard_plugin.files.secrets import refuse_keys, shown

# A number to YAML 1.2 and to people, a text to YAML 1.1, which PyYAML reads: `1e5`, `2.5e-3` without a sign or a dot.
_EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")
_PROSE = frozenset({"system_prompt", "extra_prefixes", "chat_template"})
"""Fields whose texts are no names: they may be long."""
MOST, MOST_SEED = 1e12, 2**53
"""Larger numbers are slips, and overflow counters, timers and generators of random numbers further down."""
_VARIABLE = re.compile(r"\$\{[A-Za-z_]\w*\}|^\$[A-Za-z_]\w*(/|$)")
"""`${HOME}/cache`, `$OUT/a`: what a shell fills in, and nothing here does."""
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
        cls._check_kind(data)
        known = list(cls.model_fields)
        for key in data:
            if key not in known:
                raise ValueError(cls._unknown(str(key), known))
        return {key: _read(key, value, _kinds(cls.model_fields[key].annotation)) for key, value in data.items()}

    @classmethod
    def _check_kind(cls, data: dict[Any, Any]) -> None:
        """Raise ValueError where another class would have to read the block."""

    @classmethod
    def _unknown(cls, key: str, known: Sequence[str]) -> str:
        return f"unknown key '{shown(key)}'.{cls._advice(key, known)} Allowed here: {', '.join(known)}."

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


def exists(path: str | Path) -> bool:
    """Return whether a file or folder is there; also for a text that no file system takes for a name."""
    try:
        return Path(path).expanduser().exists()
    except (OSError, ValueError, RuntimeError):
        return False


def _check_json(key: str, value: Any) -> None:
    """Refuse what a free mapping cannot hand on: results and later runs read it as JSON."""
    if isinstance(value, dict):
        for name, inner in value.items():
            if not isinstance(name, str):
                raise ValueError(f"`{key}: {shown(name)}` is no name. Put it in quotes.")
            _check_json(f"{key}.{shown(name)}", inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            _check_json(key, inner)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"`{key}: {value}` is no finite number.")
    elif not isinstance(value, str | int | float | None):
        raise ValueError(f"`{key}: {value}` is read as {shown(value)}. Put it in quotes.")


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
    if isinstance(value, dict) and any((get_origin(kind) or kind) is dict for kind in kinds):
        _check_json(key, value)
    for kind in kinds:
        if get_origin(kind) is list and isinstance(value, list | tuple):
            inner = _kinds(get_args(kind)[0])
            return [_read(key, item, inner) for item in value]
        if get_origin(kind) is list and isinstance(value, dict):
            raise ValueError(f"`{key}:` takes a list; begin each entry with `- `.")
    if isinstance(value, bool):
        if not switch:
            wanted = "a number" if number and not text else "a text; put it in quotes" if text and not number else "a number or a word"
            wanted = wanted if number or text else "a list" if any(get_origin(kind) is list for kind in kinds) else "keys of its own"
            raise ValueError(
                f"`{key}: {shown(value)}` is a switch, and {key} takes {wanted}. YAML reads on, off, yes, no, true and false as switches."
            )
    elif isinstance(value, int | float):
        if switch and not number:
            raise ValueError(f"`{key}: {shown(value)}`: {key} is a switch. Write true or false.")
        if not math.isfinite(value):
            raise ValueError(f"`{key}: {value}` is no finite number.")
        if abs(value) > (MOST_SEED if key == "seed" else MOST):
            raise ValueError(f"`{key}: {shown(value)}` is larger than anything that it could mean. Write a smaller number.")
    elif isinstance(value, str):
        if not value.strip() and text:
            raise ValueError(f"`{key}:` is blank. Fill it in, or remove it.")
        if "\0" in value or any("\ud800" <= c <= "\udfff" for c in value):
            raise ValueError(f"`{key}:` holds characters that are no text (NUL, or half of a character).")
        if text and key not in _PROSE and (len(value) > 4000 or any(len(part.encode()) > 255 for part in value.split("/"))):
            raise ValueError(f"`{key}: {shown(value, 40)}` is too long for a name or a path.")
        if key not in _PROSE and _VARIABLE.search(value):
            raise ValueError(f"`{key}: {shown(value)}` names a variable, and nothing fills in variables here. Write its value.")
        if switch and not text:
            raise ValueError(f"`{key}: {shown(value)}` is a text, and {key} is a switch. Write true or false, without quotes.")
        if number and value not in words and str not in kinds:
            if _EXPONENT.fullmatch(value):
                return _read(key, float(value), kinds)
            if _NUMERIC.fullmatch(value.strip()):
                raise ValueError(f"`{key}: {shown(value)}` is a text, and {key} takes a number. Write it without quotes, as 0.5 or 1.0e-3.")
    return value
