"""The bytes of a file: opened, cut into lines, decoded, with a sentence for all that can go wrong there."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from emguard_plugin.files.secrets import redact

SHOWN = 60
"""Characters of a wrong value that a message shows."""


def read_text(path: str | Path) -> str:
    """Return the text of a UTF-8 file, without BOM.

    Raises:
        ValueError: If it cannot be read or is not UTF-8.
    """
    with open_file(path) as stream:
        lines = list(lines_of(path, stream))
    try:
        return b"".join(lines).decode("utf-8-sig")
    except UnicodeDecodeError:
        return "".join(decoded(line, path, number) for number, line in enumerate(lines, start=1))


def open_file(path: str | Path) -> BinaryIO:
    """Open a file for reading, unpacked where its name ends in `.gz`.

    Returns:
        The open file; the caller closes it.

    Raises:
        ValueError: If it cannot be.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            raise ValueError(f"{path} is {'a folder' if path.is_dir() else 'no regular file'}; expected a file.")
        stream = path.open("rb")
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist.") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}.") from None
    return io.BufferedReader(gzip.GzipFile(fileobj=stream)) if path.suffix == ".gz" else stream


def lines_of(path: str | Path, stream: BinaryIO) -> Iterator[bytes]:
    """Yield the lines with their ends.

    Raises:
        ValueError: If the rest cannot be read.
    """
    try:
        # A binary stream is cut at \n alone.
        yield from stream
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read: {error}.") from None


def decoded(line: bytes, path: str | Path, number: int) -> str:
    """Return a line as text, without BOM: files that were joined carry one in their middle.

    Raises:
        ValueError: If it is not UTF-8.
    """
    try:
        return line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        wide = number == 1 and line.startswith((b"\xff\xfe", b"\xfe\xff"))
        found = "UTF-16" if wide else f"{error.reason} 0x{line[error.start]:02x} at byte {error.start + 1}"
        raise ValueError(f"{path}, line {number} is not UTF-8 ({found}). Save the file as UTF-8.") from None


def shown(value: Any) -> str:
    """Return a value as a message may show it: short, with its type, without keys."""
    if value is None:
        return "null"
    if isinstance(value, (dict, list)) and not value:
        return "an empty object" if isinstance(value, dict) else "an empty list"
    text = redact(repr(value))  # first: half a key is no longer recognised
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."


def first_line(error: Exception) -> str:
    """Return what an error says first, without keys."""
    return redact((str(error).splitlines() or [type(error).__name__])[0].rstrip("."))
