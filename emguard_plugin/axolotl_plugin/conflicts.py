"""Axolotl settings that cannot work with a regularizer. Needs no axolotl: `emguard check` uses it too."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from emguard_plugin.axolotl_plugin.hosts import PLUGIN_NAMES, finds_plugins
from emguard_plugin.config import METHODS
from emguard_plugin.regularizers.preview import preview_of

# Plugins that bring a trainer class of their own, and the key that switches it on (None: always).
TRAINER_PLUGINS = {
    "axolotl.integrations.kd.KDPlugin": "kd_trainer",
    "axolotl.integrations.diffusion.DiffusionPlugin": None,
    "axolotl.integrations.hatchery.HatcheryPlugin": None,
}

RL = ("dpo", "ipo", "kto", "grpo")
"""Axolotl's `rl:` that a penalty goes with."""


def listed_plugins(cfg: Mapping[str, Any]) -> list[str]:
    """Return the YAML's `plugins:` as a list of strings."""
    plugins = cfg.get("plugins") or []
    return [str(p) for p in plugins] if isinstance(plugins, list | tuple) else [str(plugins)]


def fsdp_version(cfg: Mapping[str, Any]) -> Any:
    """Return the FSDP version, from the top level or from where Axolotl lifts it; its default is 1."""
    inner = cfg.get("fsdp_config")
    inner = inner if isinstance(inner, Mapping) else {}
    return cfg.get("fsdp_version") or inner.get("version") or inner.get("fsdp_version") or 1


def _number(value: Any) -> int:
    try:
        return int(value)
    except (TypeError, ValueError):
        return 1  # the host says what it expects


def find_conflicts(cfg: Mapping[str, Any], world_size: int | None = None) -> list[str]:
    """Return what in a YAML cannot work with `em_regularizer:`, each with the change to make.

    Args:
        cfg: The raw YAML.
        world_size: Number of processes; default from the environment.

    Returns:
        One sentence per conflict; empty when there is no `em_regularizer:` block.
    """
    if not cfg.get("em_regularizer"):
        return []
    found = []
    if cfg.get("rl") and cfg["rl"] not in RL:
        found.append(f"`rl: {cfg['rl']}` trains with a loss that no penalty was tried with. Use one of {', '.join(RL)}, or remove `rl`.")
    for key in ("reward_model", "process_reward_model"):
        if cfg.get(key):
            found.append(f"`{key}: {cfg[key]}` trains a score in the place of the next token: there is nothing to hold. Remove `{key}`.")
    trl: Any = cfg.get("trl")
    for key in ("async_prefetch", "use_data_producer"):
        if isinstance(trl, Mapping) and trl.get(key):
            found.append(f"`trl.{key}: {trl[key]}` trains with another trainer than TRL's, which no penalty was tried with. Remove it.")
    mamba = next((k for k in ("model_type", "model_config_type") if re.match("(?i)mamba", str(cfg.get(k) or ""))), None)
    if mamba:  # Axolotl trains these with a trainer of their own
        found.append(f"`{mamba}: {cfg[mamba]}`: Mamba keeps no keys and values. Remove `em_regularizer`.")
    for key in ("tensor_parallel_size", "context_parallel_size"):
        if _number(cfg.get(key)) > 1:
            found.append(f"`{key}: {cfg[key]}` splits the model over devices, so a penalty sees a part of it. Set `{key}: 1`.")
    if (cfg.get("fsdp") or cfg.get("fsdp_config")) and str(fsdp_version(cfg)) == "1":
        found.append("FSDP version 1 is not supported. Set `fsdp_version: 2`.")
    if cfg.get("adapter") in ("prompt", "prefix", "p-tuning", "ptuning", "llama-adapter"):
        found.append(f"`adapter: {cfg['adapter']}` adds virtual tokens before the chat template. Use `lora` or `qlora`.")
    block = cfg["em_regularizer"]
    for name in METHODS if isinstance(block, Mapping) else ():
        own = block.get(name)
        if own is not None:
            found += preview_of(name).conflicts(own if isinstance(own, Mapping) else {}, cfg)
    world = world_size if world_size is not None else int(os.environ.get("WORLD_SIZE", "1"))
    kwargs = cfg.get("gradient_checkpointing_kwargs") or {}
    reentrant = isinstance(kwargs, Mapping) and kwargs.get("use_reentrant")
    if world > 1 and cfg.get("gradient_checkpointing") and reentrant:
        found.append(
            "`gradient_checkpointing_kwargs: {use_reentrant: true}` on several GPUs gives wrong gradients with a second "
            "forward pass. Set `use_reentrant: false`."
        )
    ours = next((i for i, p in enumerate(listed_plugins(cfg)) if p in PLUGIN_NAMES), None)
    for i, plugin in enumerate(listed_plugins(cfg)):
        name = plugin if plugin.startswith("axolotl.") else f"axolotl.integrations.{plugin}"
        if name in TRAINER_PLUGINS and ((switch := TRAINER_PLUGINS[name]) is None or cfg.get(switch)):
            wins = not finds_plugins() and (ours is None or i < ours)  # found by its entry point, ours comes first
            order = "would win over" if wins else "expects its own trainer instead of"
            found.append(f"the plugin {plugin} {order} emguard's trainer. Remove one of the two.")
    return found
