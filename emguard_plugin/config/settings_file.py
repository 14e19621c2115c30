"""Read a YAML of settings: one sentence with file and line for whatever a file can hold."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from emguard_plugin.config import BLOCKS, misspelt_blocks
from emguard_plugin.files import read_json, read_text
from emguard_plugin.files.secrets import redact, remember_secrets, shown

MOST_NODES = 1_000_000
"""Aliases can make a small file a huge one; what is larger is no settings file."""
IMPORT_FROM = "import_from"
"""Key of the file that the post-train hook writes: the folder of the YAML whose block it holds."""
_PLAIN_INT = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_PLAIN_FLOAT = re.compile(r"[-+]?(\d+\.\d*|\.\d+)([eE][-+]\d+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


def read_settings(path: str | Path, whole: bool = False) -> dict[Any, Any]:
    """Read a YAML (or, by its name, a JSON) of settings.

    Beyond YAML itself it refuses what PyYAML reads otherwise than people do: a key that stands twice (the last would win), numbers in
    base 8 and 60, and contents that hold themselves. These hold for our blocks alone, as the host reads the rest.

    Args:
        path: The file.
        whole: The file is one of our blocks itself, so that its top level is ours too.

    Returns:
        The mapping.

    Raises:
        ValueError: naming file, and line where there is one.
    """
    import yaml

    if str(path).endswith(".json"):
        found = read_json(path)
    else:
        text = read_text(path)
        try:
            node = yaml.compose(text, Loader=yaml.SafeLoader)
            found = yaml.safe_load(text)
        except yaml.YAMLError as exc:
            raise ValueError(_in_words(path, exc)) from None
        except RecursionError:
            raise ValueError(f"{path} is nested too deeply to be read.") from None
        except (ValueError, TypeError, OverflowError, AttributeError) as exc:  # what constructors of dates and numbers raise
            raise ValueError(f"{path} is not valid YAML: {redact(exc)}.") from None
        if node is not None:
            _check_nodes(node, str(path), whole)
    if not isinstance(found, dict):
        what = "is empty" if found is None else f"holds {'a text' if isinstance(found, str) else shown(found)}"
        raise ValueError(f"{path} {what}; it takes a mapping of settings, `key: value` line by line.")
    remember_secrets(found)
    return found


def _in_words(path: str | Path, exc: Any) -> str:
    mark = getattr(exc, "problem_mark", None) or getattr(exc, "context_mark", None)
    where = f", line {mark.line + 1}" if mark else ""
    what = getattr(exc, "problem", None) or getattr(exc, "reason", None) or "cannot be parsed"
    hint = " Indent with blanks, not with tabs." if "'\\t'" in what else ""
    return redact(f"{path}{where} is not valid YAML: {shown(what, 120)}.{hint}")


def _check_nodes(root: Any, path: str, whole: bool) -> None:
    import yaml

    sizes: dict[int, int] = {}

    def size(node: Any, above: frozenset[int]) -> int:
        if id(node) in above:
            raise ValueError(
                f"{path}, line {node.start_mark.line + 1}: the value holds itself (an alias to its own anchor). Remove the alias."
            )
        if id(node) not in sizes:
            inner: Iterable[Any] = ()
            if isinstance(node, yaml.MappingNode):
                inner = [part for pair in node.value for part in pair]
            elif isinstance(node, yaml.SequenceNode):
                inner = node.value
            sizes[id(node)] = 1 + sum(size(part, above | {id(node)}) for part in inner)
        return sizes[id(node)]

    if size(root, frozenset()) > MOST_NODES:
        raise ValueError(f"{path} holds over {MOST_NODES} values once its aliases are filled in, which is no settings file.")
    if not isinstance(root, yaml.MappingNode):
        return
    keys = [key.value for key, _ in root.value if isinstance(key, yaml.ScalarNode)]
    ours = {*BLOCKS, *misspelt_blocks(keys)}
    _check_ours(root, path, None if whole else ours)


def _check_ours(node: Any, path: str, only: set[str] | None) -> None:
    import yaml

    if isinstance(node, yaml.ScalarNode):
        tag, text = node.tag.rsplit(":", 1)[-1], node.value
        odd = (tag == "int" and not _PLAIN_INT.fullmatch(text)) or (tag == "float" and not _PLAIN_FLOAT.fullmatch(text))
        if odd and not node.style:
            read = yaml.safe_load(text)
            raise ValueError(f"{path}, line {node.start_mark.line + 1}: YAML reads `{shown(text)}` as {read}. Write the number plainly.")
    elif isinstance(node, yaml.SequenceNode):
        for part in node.value:
            _check_ours(part, path, None)
    elif isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if only is not None and name not in only:
                continue
            if isinstance(key, yaml.ScalarNode) and name in lines and name != "<<":
                raise ValueError(f"{path}, line {line}: `{shown(name)}:` stands twice, first in line {lines[name]}. Keep one.")
            lines[name] = line
            _check_ours(value, path, None)


def search_beside(*folders: str | Path) -> None:
    """Let Python modules beside a YAML be imported (`function: my_judge:f`), and those of the current folder.

    Every entry point calls this, so that they agree. The folders come last: they shadow nothing that is installed.
    """
    for folder in (*folders, "."):
        name = str(Path(folder).expanduser().resolve())
        if name not in sys.path:
            sys.path.append(name)
