"""`emguard check`: what a YAML would do, without training."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from emguard_plugin.axolotl_plugin.conflicts import find_conflicts, listed_plugins
from emguard_plugin.axolotl_plugin.hosts import PLUGIN_NAMES, finds_plugins, skips_missing_plugins
from emguard_plugin.check import data
from emguard_plugin.check.facts import YamlFacts
from emguard_plugin.check.host import is_trl
from emguard_plugin.config import (
    BLOCKS,
    BlockError,
    EMEvalConfig,
    EMRegularizerConfig,
    misplaced_blocks,
    misspelt_blocks,
    read_block,
)
from emguard_plugin.config.settings_file import read_settings, search_beside
from emguard_plugin.files.secrets import SecretInConfigError, redact, refuse_keys, shown
from emguard_plugin.regularizers.preview import Findings, asked
from emguard_plugin.training.tested_hosts import mixed, untested

__all__ = ["Findings", "check_config"]


def check_config(path: str | Path) -> Findings:
    """Check an Axolotl YAML or a file for `emguard sft`.

    Args:
        path: The YAML.

    Returns:
        What was found; nothing is raised for a faulty YAML, and no key of an API is repeated.
    """
    found = Findings()
    try:
        cfg = read_settings(path)
        for name in BLOCKS:
            refuse_keys(cfg.get(name), name)
    except (ValueError, SecretInConfigError) as exc:
        found.problems.append(redact(exc))
        return found
    search_beside(Path(path).parent)
    with _environment(cfg):
        _check(cfg, found)
    for lines in (found.active, found.notes, found.problems):
        lines[:] = [redact(line).encode("utf-8", "backslashreplace").decode() for line in dict.fromkeys(lines)]
    return found


def _check(cfg: Mapping[str, Any], found: Findings) -> None:
    for key, meant in misspelt_blocks(list(cfg)).items():
        found.problems.append(f"unknown key `{shown(str(key))}:`. Did you mean `{meant}:`?")
    for place in misplaced_blocks(cfg):
        found.problems.append(f"`{place}` stands where nothing reads it. Move it to the top level of the file, without indentation.")
    if not is_trl(cfg):
        _check_plugin(cfg, found)
        found.problems += find_conflicts(cfg)
    regularizer = _validate("em_regularizer", EMRegularizerConfig, cfg, found)
    evaluation = _validate("em_eval", EMEvalConfig, cfg, found)
    if regularizer is not None:
        found.notes += [f"not tested with {host}." for host in untested()]
        found.notes += [f"hosts that do not go together: {pair}. Install one stack whole." for pair in mixed()]
        data.check(cfg, regularizer, found)
        facts = YamlFacts(cfg, found)
        for preview, block in asked(regularizer):
            preview.preview(block, facts)
    elif not found.problems:
        found.notes.append("no `em_regularizer:` block: the run is not regularized.")
    if evaluation is not None:
        _check_eval(evaluation, cfg, found)


@contextmanager
def _environment(cfg: Mapping[str, Any]) -> Iterator[None]:
    """Set what TRL's `env:` sets before it trains, for as long as the check takes."""
    wanted = cfg.get("env") if is_trl(cfg) else None
    wanted = {str(k): str(v) for k, v in wanted.items()} if isinstance(wanted, Mapping) else {}
    before = {name: os.environ.get(name) for name in wanted}
    try:
        for name, value in wanted.items():
            if name and not set("=\0") & set(name) and "\0" not in value:
                os.environ[name] = value
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _validate(name: str, model: Any, cfg: Mapping[str, Any], found: Findings) -> Any:
    if name not in cfg:
        return None
    try:
        return read_block(model, cfg[name], name)
    except BlockError as exc:
        found.problems += exc.problems
    except (ValueError, SecretInConfigError) as exc:
        found.problems.append(str(exc))
    return None


def _check_plugin(cfg: Mapping[str, Any], found: Findings) -> None:
    if not isinstance(cfg.get("plugins") or [], list):
        found.problems.append(
            f"`plugins: {cfg['plugins']}` is not a list, and Axolotl reads it as one. Write `plugins: [emguard_plugin.EMGuardPlugin]`."
        )
    plugins = listed_plugins(cfg)
    asked = [b for b in BLOCKS if b in cfg]
    if asked and not set(plugins) & set(PLUGIN_NAMES) and not finds_plugins():
        found.problems.append(
            f"`{asked[0]}:` is set but the plugin is not listed, so Axolotl before 0.21 drops the block without a word. Add "
            "`plugins: [emguard_plugin.EMGuardPlugin]`."
        )
    for plugin in (p for p in plugins if p.partition(".")[0] == "emguard_plugin" and p not in PLUGIN_NAMES):
        found.problems.append(f"`plugins: {shown(plugin)}` is no plugin of emguard's. Did you mean `{PLUGIN_NAMES[0]}`?")
    for plugin in plugins:
        module = plugin.rpartition(".")[0]
        names = [module, f"axolotl.integrations.{module}"]
        if not any(_importable(name) for name in names if name):
            then = "Axolotl would go on without it" if skips_missing_plugins() else "Axolotl stops at it, before 0.21 it goes on without"
            found.problems.append(f"the plugin `{shown(plugin)}` cannot be imported; {then}.")
    if asked and not _importable("axolotl"):
        found.notes.append("axolotl is not installed here.")


def _importable(module: str) -> bool:
    """Return whether a module is there, without importing anything: the hosts take seconds to import."""
    top, *rest = module.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError, AttributeError):
        return False
    places = [] if spec is None else list(spec.submodule_search_locations or ())
    for part in rest:
        spec = importlib.machinery.PathFinder.find_spec(part, places)
        places = [] if spec is None else list(spec.submodule_search_locations or ())
    return spec is not None


def _check_eval(config: EMEvalConfig, cfg: Mapping[str, Any], found: Findings) -> None:
    from emguard_plugin.evaluation.ready import get_ready

    out = cfg.get("output_dir")
    try:
        ready = get_ready(config, Path(out) / "em_eval" if isinstance(out, str) else None)
    except (ValueError, ImportError, SecretInConfigError) as exc:
        found.problems.append(f"em_eval: {exc}")
        return
    n = len(ready.requests) * (2 if config.evaluate_base else 1)
    sizes = ", ".join(f"{len(q)} in {k}" for k, q in ready.suites.items())
    judges = ", ".join(judge.name for judge in ready.judges)
    gate = "" if config.fail_above is None else f"; the gate is an EM rate of {config.fail_above:g}"
    found.active.append(f"em_eval: {sizes}; {n} answers in all; judged by {judges}{gate}")
    found.notes += ready.warnings
    _check_prompts(config, cfg, ready.suites, found)


def _check_prompts(config: EMEvalConfig, cfg: Mapping[str, Any], suites: Mapping[str, Any], found: Findings) -> None:
    """Say which questions the chat template refuses, where the tokenizer is here."""
    from emguard_plugin.check.model import load_tokenizer
    from emguard_plugin.evaluation.asking.as_trained import as_trained
    from emguard_plugin.evaluation.asking.asking import chat_of
    from emguard_plugin.evaluation.asking.rendering import not_asked

    aside = Findings()  # what is wrong with the tokenizer is said where a method needs it
    tokenizer = load_tokenizer(cfg, aside) if config.sampler.provider != "openai" else None
    if tokenizer is None or not tokenizer.chat_template:
        return
    config, _ = as_trained(config, cfg, tokenizer.chat_template)
    refused = not_asked(chat_of(config), tokenizer, suites)
    for reason in dict.fromkeys(one.reason for one in refused):
        names = ", ".join(dict.fromkeys(f"{one.question} of {one.suite}" for one in refused if one.reason == reason))
        found.notes.append(f"em_eval: not asked, as the chat template refuses it: {names}: {reason}")
    if sum(one.suite == "questions" for one in refused) == len(suites["questions"]):
        found.problems.append("em_eval: the chat template refuses every question, so no EM rate can be measured.")
