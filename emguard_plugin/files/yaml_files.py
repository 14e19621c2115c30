"""YAML, without showing what stands around a fault: it may be a key."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from emguard_plugin.files.json_files import read_json
from emguard_plugin.files.secrets import redact
from emguard_plugin.files.text import first_line, read_text, shown


def read_yaml(path: str | Path) -> Any:
    """Return the value of a YAML file; one whose name ends in `.json` is read as JSON.

    Raises:
        ValueError: If it cannot be read or is neither. The text around the fault is not shown: it may hold a key.
    """
    import yaml

    if Path(path).suffix == ".json":
        return read_json(path)
    text = read_text(path)
    try:
        return yaml.load(text, Loader=_loader())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise ValueError(f"{path}{line} is not valid YAML: {redact(error.problem or error.context)}.") from None
    except (yaml.YAMLError, ValueError, TypeError, OverflowError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is not valid YAML: {first_line(error)}.") from None


@lru_cache(maxsize=1)
def _loader() -> Any:
    """Return the safe loader, which also refuses a key that stands twice in one mapping."""
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_mapping_node(self, anchor: Any) -> Any:  # the stubs take an anchor for a dictionary
            node = super().compose_mapping_node(anchor)
            seen = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                    if (key.tag, key.value) in seen:
                        said = f"the key {shown(key.value)} occurs twice in one mapping"
                        raise yaml.composer.ComposerError(None, None, said, key.start_mark)
                    seen.add((key.tag, key.value))
            return node

    return Loader
