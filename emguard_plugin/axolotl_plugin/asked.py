"""What a raw Axolotl YAML asks of emguard, read before Axolotl drops what it does not know. Needs no axolotl."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from emguard_plugin.config import (
    BLOCKS,
    Block,
    EMEvalConfig,
    EMRegularizerConfig,
    misplaced_blocks,
    misspelt_blocks,
    read_block,
)
from emguard_plugin.config.settings_file import read_settings
from emguard_plugin.files.secrets import refuse_keys, remember_secrets, shown

MODELS: dict[str, type[Block]] = {"em_regularizer": EMRegularizerConfig, "em_eval": EMEvalConfig}


def look_at_settings(cfg: Mapping[str, Any]) -> None:
    """Raise for blocks that resemble ours, stand in the wrong place, hold nothing, a key of an API, or what they cannot.

    Args:
        cfg: The raw settings; with `axolotl_config_path` the file itself is read too, since a key that stands twice in it
            has been lost here.

    Raises:
        ValueError: naming the key.
        SecretInConfigError: naming the key.
    """
    path = cfg.get("axolotl_config_path")
    if path and Path(str(path)).is_file():
        read_settings(str(path))
    try:
        raw = plain(cfg)
    except RecursionError:
        raise ValueError("the settings hold themselves (an alias to its own anchor), or are nested too deeply. Remove the alias.") from None
    remember_secrets(raw)
    for key, meant in misspelt_blocks(list(cfg)).items():
        raise ValueError(f"unknown key `{shown(str(key))}:`. Did you mean `{meant}:`? Axolotl would drop it and train unguarded.")
    for place in misplaced_blocks(raw):
        raise ValueError(
            f"`{place}` stands where nothing reads it, and Axolotl would drop it. Move it to the top level of the file, without indentation."
        )
    for name in BLOCKS:
        if name in raw:
            refuse_keys(raw[name], name)
            read_block(MODELS[name], raw[name], name)


def plain(value: Any) -> Any:
    """Return mappings as dictionaries: Axolotl's own answer any key with None."""
    if isinstance(value, Mapping):
        return {key: plain(inner) for key, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, list | tuple) else value
