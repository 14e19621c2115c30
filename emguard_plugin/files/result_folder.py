"""The run folder: append-only JSONL files that survive kill -9, a lock, and the protocol they belong to."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from emguard_plugin.files import writing
from emguard_plugin.files.writing import write_text

PROTOCOL = "protocol.json"
OPTION = "em_eval.output_dir"
HOLD_ANSWERS = ("responses.jsonl", "judgments.jsonl", "judgments.replaced.jsonl", "report.html", "inspect/")


class JsonLines:
    """One append-only file of JSON records.

    Args:
        path: The file; created by the first `append`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self, fault: Callable[[dict[str, Any]], str | None] = lambda record: None) -> list[dict[str, Any]]:
        """Return all whole records; a torn last line, as a killed writer leaves it, is left out.

        Args:
            fault: Says why a record is none of this file's, or returns None.

        Raises:
            ValueError: If the file cannot be read, or if a line before the last is no record: it was edited or damaged.
        """
        try:
            whole, _, _ = self.path.read_bytes().rpartition(b"\n")
        except FileNotFoundError:
            return []
        except OSError as error:
            raise ValueError(f"{self.path} cannot be read: {error.strerror or error}.") from error
        records = []
        for number, line in enumerate(whole.split(b"\n") if whole else [], start=1):
            try:
                record = json.loads(line)
                wrong = f"it holds {_kind(record)}, not a record" if not isinstance(record, dict) else fault(record)
            except (ValueError, RecursionError) as error:
                wrong = str(error)
            if wrong:
                raise ValueError(f"{self.path}, line {number} is damaged: {wrong}. Remove that line; it is computed again.")
            records.append(record)
        return records

    def append(self, records: Iterable[dict[str, Any]]) -> None:
        """Add records and wait until they are on the disk; a torn last line is cut off first."""
        # A lone surrogate has no UTF-8; its escape is valid JSON.
        data = _lines(records).encode("utf-8", "backslashreplace")
        with writing.naming(self.path), self.path.open("ab+") as stream:
            end = stream.seek(0, os.SEEK_END)
            stream.seek(0)
            kept = end if end == 0 or _ends_line(stream, end) else stream.read().rfind(b"\n") + 1
            stream.truncate(kept)
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())

    def replace(self, records: Iterable[dict[str, Any]]) -> None:
        """Write the file anew, in one piece."""
        write_text(self.path, _lines(records))


def _lines(records: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def _kind(value: Any) -> str:
    return "null" if value is None else f"a {type(value).__name__}"


def _ends_line(stream: Any, end: int) -> bool:
    stream.seek(end - 1)
    found = stream.read(1) == b"\n"
    stream.seek(0)
    return found


def prepare_folder(path: str | Path, option: str = OPTION) -> Path:
    """Create the folder and prove that it can be written.

    Args:
        path: The folder.
        option: What the user calls it.

    Returns:
        The folder.

    Raises:
        ValueError: If it cannot.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.write_bytes(b"x" * 4096)
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"cannot write to the result folder {folder}: {error.strerror or error}. Set `{option}` to a folder that can be written."
        ) from error
    return folder


def keep_private(folder: Path, model: Path) -> None:
    """Have git and the hub's `upload_folder` leave out the files that hold answers, where the results lie in a model.

    A fine-tuned model's answers may be harmful or repeat its training data. Both read the `.gitignore` at the root.
    """
    if not folder.resolve().is_relative_to(model.resolve()):
        return
    ignore = model / ".gitignore"
    inside = folder.resolve().relative_to(model.resolve()).as_posix()
    known = ignore.read_text(encoding="utf-8") if ignore.is_file() else ""
    lines = [f"/{inside}/{name}" for name in HOLD_ANSWERS]
    missing = [line for line in lines if line not in known.splitlines()]
    if missing:
        start = "" if not known or known.endswith("\n") else "\n"
        ignore.write_text(known + start + "\n".join(missing) + "\n", encoding="utf-8")


def locked(folder: Path, option: str = OPTION) -> AbstractContextManager[None]:
    """Hold the folder for this process.

    Returns:
        A context manager that frees it at its end.

    Raises:
        RuntimeError: If another process holds it.
    """
    taken = f"another process is evaluating into {folder}. Wait for it, or set another `{option}`."
    return writing.locked(folder, ".lock", option, taken)


def claim(
    folder: Path,
    record: dict[str, Any],
    entries: tuple[str, ...],
    option: str = OPTION,
    free: tuple[str, ...] = (),
    write: bool = True,
    words: Callable[[str, Any, Any], str | None] = lambda where, old, new: None,
) -> dict[str, Any]:
    """Tie the folder to one protocol.

    Args:
        folder: The run folder.
        record: What this run would store in `protocol.json`.
        entries: What of it must be the same for stored answers to be used again.
        option: What the user calls the folder.
        free: Keys inside these entries that may differ.
        write: Whether a new folder is tied at once; otherwise the caller stores the record with the first answer, and a
            run that fails before leaves nothing behind.
        words: Says what differs, given where, what was and what is; None for the place and both values, "" for nothing.

    Returns:
        The stored record: this one for a new folder, the earlier one for a resumed run.

    Raises:
        ValueError: If the folder holds results of another protocol; names what differs.
    """
    path = folder / PROTOCOL
    # The comparison is with what a reader of the file would see.
    record = plain(record)
    held = [name for name in ("responses.jsonl", "judgments.jsonl") if holds_lines(folder / name)]
    if not path.is_file():
        if held:
            raise ValueError(
                f"{folder} holds {held[0]} without {PROTOCOL}, so it is unknown what it answers to. "
                f"Delete the folder, or set another `{option}`."
            )
        if write:
            write_json(path, record)
        return record
    if not write and not held:
        # Tied by a run that failed before its first answer.
        return record
    stored = claimed(folder)
    wrong = [
        line
        for key in entries
        for where, old, new in _differences(_without(stored.get(key), free), _without(record[key], free), key)
        if (line := f"{where}: stored {json.dumps(old)}, now {json.dumps(new)}" if (said := words(where, old, new)) is None else said)
    ]
    wrong = list(dict.fromkeys(wrong))
    if wrong:
        raise ValueError(
            f"{folder} holds results of another protocol, which would be mixed with these:\n  "
            + ";\n  ".join(wrong[:12])
            + f".\nSet another `{option}`, or delete the folder."
        )
    return stored


def holds_lines(path: Path) -> bool:
    """Whether a file is there and not empty."""
    return path.is_file() and path.stat().st_size > 0


def _without(entry: Any, free: tuple[str, ...]) -> Any:
    return {key: value for key, value in entry.items() if key not in free} if isinstance(entry, dict) else entry


def claimed(folder: Path) -> dict[str, Any]:
    """Return what an earlier run stored about itself.

    Raises:
        ValueError: If the folder holds no run, or if what it says of it is damaged.
    """
    path = folder / PROTOCOL
    if not path.is_file():
        raise ValueError(f"{folder} holds no answers yet. Run the phase `generate` first, or give its `--output-dir`.")
    found = read_json(path)
    if not isinstance(found.get("protocol"), dict) or not isinstance(found.get("models", {}), dict):
        raise ValueError(f"{path} is damaged: it names no protocol. Delete the folder, or set another `{OPTION}`.")
    return found


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in one of a run's JSON files.

    Raises:
        ValueError: If it cannot be read or holds none.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}. Restore it, or delete the folder.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged: it holds {_kind(found)}, not an object. Restore it, or delete the folder.")
    return found


def plain(content: Any) -> Any:
    """Return content as a reader of its JSON would see it."""
    return json.loads(json.dumps(content))


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file in one piece: a reader sees the old file or the new one."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def _differences(old: Any, new: Any, where: str) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            if key in old or new[key]:  # what an earlier version did not know was off then
                yield from _differences(old.get(key), new.get(key), f"{where}.{key}")
    elif old != new:
        yield where, old, new
