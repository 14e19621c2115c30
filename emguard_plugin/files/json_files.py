"""JSON and JSON Lines: others', read as widely as they are written, and our own, checked against a shape."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from emguard_plugin.files.text import decoded, first_line, lines_of, open_file, read_text, shown

T = TypeVar("T")
EXACT = ConfigDict(strict=True, allow_inf_nan=False)
"""For the shapes of our own records, as `__pydantic_config__`: numbers are finite, `true` is no number and "1" neither. Keys
beyond the shape are left out, so a later version may add some."""


class Row(NamedTuple):
    """One value of a file of many, where it stands, and the number of its line or row, from 1."""

    where: str
    value: Any
    number: int


def read_rows(path: str | Path) -> Iterator[Row]:
    """Yield the values of JSON Lines, one line at a time, or of one JSON list, which is read whole.

    `NaN` is let through, as pandas writes it in columns that nobody reads; what reads a value checks it.

    Raises:
        ValueError: If the file cannot be read or is not UTF-8, or a line is no JSON.
    """
    with open_file(path) as stream:
        listed = _is_list(path, stream)
        if listed is not None:
            yield from (Row(f"{path}, row {n}", value, n) for n, value in enumerate(listed, start=1))
            return
        for number, line in enumerate(lines_of(path, stream), start=1):
            text = decoded(line, path, number)
            if text.strip():
                yield Row(f"{path}, line {number}", _line(text, path, number), number)


def read_objects(path: str | Path) -> Iterator[Row]:
    """Yield the values of `read_rows`, each of which must be a JSON object.

    Raises:
        ValueError: As `read_rows`; or if a value is no object.
    """
    for row in read_rows(path):
        if not isinstance(row.value, dict):
            raise ValueError(f"{row.where} holds {shown(row.value)}; expected an object of keys and values.")
        yield row


def read_json(path: str | Path) -> Any:
    """Return the value of a JSON file.

    Raises:
        ValueError: If it cannot be read or is no JSON.
    """
    return _json(read_text(path), f"{path}")


def read_record(path: str | Path, shape: type[T]) -> T:
    """Return the record of one of our own JSON files.

    Args:
        path: The file.
        shape: What it must hold: a type that pydantic knows, a `TypedDict` with `EXACT` mostly.

    Raises:
        ValueError: If it cannot be read or holds something else.
    """
    return parsed(_json(read_text(path), f"{path}", own=True), shape, f"{path}")


def read_records(path: str | Path, shape: type[T]) -> list[T]:
    """Return the records of one of our own JSON Lines; a torn last line, as a killed writer leaves it, is left out.

    Args:
        path: The file; one that is not there holds nothing.
        shape: What each line must hold.

    Raises:
        ValueError: If a line before the last is no such record: the file was edited or damaged.
    """
    if not Path(path).exists():
        return []
    found = []
    with open_file(path) as stream:
        for number, line in enumerate(lines_of(path, stream), start=1):
            if line.endswith(b"\n") and line.strip():
                value = _json(decoded(line, path, number), f"{path}, line {number}", own=True)
                found.append(parsed(value, shape, f"{path}, line {number}"))
    return found


def seal_of(record: Mapping[str, Any]) -> str:
    """Return the checksum over all that a record says, its `seal` left out: what was changed since it was written shows."""
    plain = {name: value for name, value in record.items() if name != "seal"}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]


def parsed(value: Any, shape: type[T], where: str) -> T:
    """Return a value as the shape that it must have.

    Raises:
        ValueError: naming place, key and what was found.
    """
    try:
        found: T = _adapter(shape).validate_python(value)  # type: ignore[arg-type]  # a type is hashable
        return found
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "missing":
            raise ValueError(f"{where} is damaged or of another kind: `{key}` is missing.") from None
        about = f"`{key}` is " if key else "it holds "
        raise ValueError(f"{where} is damaged or of another kind: {about}{shown(first['input'])}; {_lower(first['msg'])}.") from None


def _is_list(path: str | Path, stream: BinaryIO) -> list[Any] | None:
    """Return the values where the file is one JSON list; else leave the stream at its beginning."""
    try:
        start = stream.peek(64) if hasattr(stream, "peek") else b""
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read: {error}.") from None
    if not start.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        return None
    raw = b"".join(lines_of(path, stream))
    stream.seek(0)
    text = "".join(decoded(line, path, number) for number, line in enumerate(raw.splitlines(keepends=True), start=1))
    try:
        found = _json(text, str(path))
    except ValueError as error:
        first = text.lstrip().partition("\n")[0]
        if not _parses(first):
            raise error from None
        return None  # lines, each of which is a list
    return found if isinstance(found, list) else None


def _line(text: str, path: str | Path, number: int) -> Any:
    where = f"{path}, line {number}"
    try:
        return _json(text, where)
    except ValueError as error:
        if number > 1 or isinstance(error, TwiceError) or text.strip()[:1] != "{":
            raise
        try:
            read_json(path)
        except ValueError:
            raise error from None
        raise ValueError(f"{path} holds one JSON object over several lines; expected a list, or one object per line.") from None


def _parses(text: str) -> bool:
    try:
        _json(text, "")
    except ValueError:
        return False
    return True


def _json(text: str, where: str, own: bool = False) -> Any:
    try:
        # A tab or a form feed inside a text is not JSON by the letter, and can mean one thing only.
        return json.loads(text, strict=own, object_pairs_hook=_object, parse_constant=_refuse_constant if own else None)
    except _Twice as error:
        raise TwiceError(f"{where}: the key {shown(error.key)} occurs twice in one object. Remove one.") from None
    except RecursionError:
        raise ValueError(f"{where} is not JSON that can be read: it is nested too deeply.") from None
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {first_line(error) if text.strip() else 'it is empty'}.") from None


class TwiceError(ValueError):
    """A key that stands twice in one object; what came first would be lost."""


class _Twice(Exception):
    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _Twice(key)
            seen.add(key)
    return found


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


@lru_cache(maxsize=64)
def _adapter(shape: Any) -> TypeAdapter[Any]:
    return TypeAdapter(shape)


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]
