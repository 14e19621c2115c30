"""pydantic's errors as sentences of the YAML's words, without values that could be secrets."""

from __future__ import annotations

import json
import re
from typing import Any, TypeVar, cast

from pydantic import BaseModel, ValidationError

from emguard_plugin.config.names import suggest
from emguard_plugin.config.provider import BRANCH
from emguard_plugin.files.secrets import SecretInConfigError, redact, refuse_keys, shown

Model = TypeVar("Model", bound=BaseModel)


class BlockError(ValueError):
    """What is wrong with a block, all of it in one line.

    Attributes:
        problems: One sentence per place.
    """

    def __init__(self, problems: list[str]) -> None:
        super().__init__(" | ".join(problems))
        self.problems = problems


def read_block(model: type[Model], data: Any, name: str) -> Model:
    """Validate a block.

    Args:
        model: Its class.
        data: What YAML gave.
        name: Its key, such as `em_eval`.

    Returns:
        The validated block.

    Raises:
        BlockError: with all problems, each with its place.
        ValueError: for what is no mapping at all.
        SecretInConfigError: for a key of an API in the file.
    """
    if data is None:
        raise ValueError(f"`{name}:` is empty, so it asks for nothing. Fill it in, or remove it.")
    if not isinstance(data, dict | BaseModel):
        raise ValueError(f"`{name}:` is {_a(data)}; it takes a mapping of keys, indented below it.")
    refuse_keys(data, name)
    try:
        return model.model_validate(data)
    except ValidationError as exc:
        raise BlockError(problems(exc, name)) from None
    except RecursionError:
        raise ValueError(f"`{name}:` is nested too deeply to be read.") from None


_read: dict[tuple[type[BaseModel], str], BaseModel] = {}


def read_once(model: type[Model], data: Any, name: str) -> Model:
    """Do the same once per process for equal data: a host asks for a block at each of its hooks.

    Args:
        model: As for `read_block`.
        data: As for `read_block`.
        name: As for `read_block`.

    Returns:
        The same object each time; who changes it changes it for all.

    Raises:
        ValueError: as `read_block`.
    """
    if isinstance(data, BaseModel):  # what was stated in it does not show in its text
        return read_block(model, data, name)
    try:
        key = model, json.dumps(data, sort_keys=True, default=repr)
    except (TypeError, ValueError, RecursionError):  # no block either; `read_block` says why
        return read_block(model, data, name)
    if key not in _read:
        _read[key] = read_block(model, data, name)
    return cast(Model, _read[key])


def problems(error: ValidationError, name: str) -> list[str]:
    """Return one sentence per place; no value that was not one of ours is repeated.

    Args:
        error: From a block.
        name: The block's key.
    """
    found: dict[str, list[str]] = {}
    errors = error.errors(include_url=False)
    for one in errors:
        if one["type"] == "literal_error" and isinstance(one.get("input"), list | tuple) and _closer(one["loc"], errors):
            continue  # a list was meant, and another alternative says what is wrong in it
        where = name
        for part in one["loc"]:
            if isinstance(part, int):
                where += f"[{part}]"
            elif part.isidentifier() and part not in ("float", "int", "str"):  # else a branch of a union
                where += f".{part}"
        message = one["msg"].removeprefix("Value error, ")
        if one["type"] == "missing":
            needs = next((f"; `{part}` needs it" for part in one["loc"] if str(part).startswith(BRANCH)), "")
            message = f"is missing{needs}."
        elif one["type"] != "value_error":
            message = f"{_in_words(one)}, found {_found(one.get('input'))}.{_near(one)}"
        found.setdefault(where, [])
        if message not in found[where]:
            found[where].append(message)
    return [redact(f"{where}: {' Or: '.join(messages)}") for where, messages in found.items()]


def _closer(place: tuple[Any, ...], errors: list[Any]) -> bool:
    """Whether an error stands inside the list that another alternative took the value for."""
    return any(len(e["loc"]) > len(place) and e["loc"][: len(place) - 1] == place[:-1] and isinstance(e["loc"][-1], int) for e in errors)


def _in_words(one: Any) -> str:
    """Say what is allowed; pydantic's own words are those of Python where a mapping or a list is meant."""
    kind = one["type"]
    if kind in ("model_type", "dict_type", "model_attributes_type"):
        return "takes a mapping of keys, `key: value`, indented below it"
    if kind == "list_type":
        return "takes a list, such as `[one, two]`, or one entry a line behind `- `"
    if kind == "too_short":
        return f"takes a list of at least {one['ctx']['min_length']} item"
    if kind == "string_too_short":
        return "takes a text"
    if kind == "literal_error":
        return f"takes {one['ctx']['expected']}"
    if kind in _BOUNDS:
        words, name = _BOUNDS[kind]
        return f"takes a number {words} {one['ctx'][name]:g}"
    return str(one["msg"])


_BOUNDS = {
    "greater_than": ("above", "gt"),
    "greater_than_equal": ("of at least", "ge"),
    "less_than": ("below", "lt"),
    "less_than_equal": ("of at most", "le"),
}


def _near(one: Any) -> str:
    value = one.get("input")
    if one["type"] != "literal_error" or not isinstance(value, str):
        return ""
    return suggest(value[:40], re.findall("'([^']+)'", one["ctx"]["expected"]))


def _found(value: Any) -> str:
    if value == []:
        return "an empty list"
    if isinstance(value, str):
        return f"'{shown(value, 40)}'" if value else "an empty text"
    return shown(value)


def _a(value: Any) -> str:
    kinds = {bool: "a switch", str: "a text", int: "a number", float: "a number", list: "a list"}
    return kinds.get(type(value), f"of type {type(value).__name__}")


__all__ = ["BlockError", "SecretInConfigError", "problems", "read_block", "read_once"]
