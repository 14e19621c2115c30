"""Whose YAML it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def is_trl(cfg: Mapping[str, Any]) -> bool:
    """Whether a YAML is one for `emguard sft`."""
    return "model_name_or_path" in cfg


def has_adapter(cfg: Mapping[str, Any]) -> bool:
    """Whether an adapter is trained."""
    return bool(cfg.get("use_peft") if is_trl(cfg) else cfg.get("adapter"))
