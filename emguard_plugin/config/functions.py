"""Functions of the user's own that a YAML names as `module:name`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from emguard_plugin.config.settings_file import search_beside


def import_function(name: str, setting: str) -> Callable[..., Any]:
    """Return the function `module:name`, of a module beside the YAML, in the current folder, or installed.

    Args:
        name: As the YAML has it.
        setting: The setting with its value, for errors.

    Raises:
        ValueError: when the module cannot be imported, or has no such function.
    """
    module_name, _, attribute = name.partition(":")
    search_beside()
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        raise ValueError(
            f"{setting}: importing {module_name} failed: {type(error).__name__}: {error}. Is it on the Python path?"
        ) from error
    found: Any = getattr(module, attribute, None)
    if found is None:
        public = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise ValueError(f"{setting}: {module_name} has no `{attribute}`. It has: {', '.join(public) or 'nothing'}.")
    if not callable(found):
        raise ValueError(f"{setting} is {type(found).__name__}, not a function.")
    return found
