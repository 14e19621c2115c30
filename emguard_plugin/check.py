"""`emguard check`: what a YAML would do, without training."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from emguard_plugin.axolotl_plugin.conflicts import PLUGIN_NAMES, find_conflicts, listed_plugins
from emguard_plugin.config import (
    BlockEMConfig,
    EMEvalConfig,
    EMRegularizerConfig,
    KLConfig,
    TReFTConfig,
    misspelt_blocks,
)


@dataclass
class Report:
    """What `emguard check` prints.

    Attributes:
        active: What will be held or measured.
        notes: What could not be checked here.
        problems: What must change before the run does what it says.
    """

    active: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def check_config(path: str | Path) -> Report:
    """Check an Axolotl YAML or a file for `emguard sft`.

    Args:
        path: The YAML.

    Returns:
        The report; nothing is raised for a faulty YAML.
    """
    import yaml

    report = Report()
    try:
        cfg = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as exc:
        report.problems.append(f"{path} cannot be read: {exc}")
        return report
    if not isinstance(cfg, Mapping):
        report.problems.append(f"{path} is not a YAML mapping of settings.")
        return report
    for key, meant in misspelt_blocks(list(cfg)).items():
        report.problems.append(f"unknown key `{key}:`. Did you mean `{meant}:`?")
    if "model_name_or_path" not in cfg:
        _check_plugin(cfg, report)
        report.problems += find_conflicts(cfg)
    regularizer = _validate("em_regularizer", EMRegularizerConfig, cfg, report)
    evaluation = _validate("em_eval", EMEvalConfig, cfg, report)
    if regularizer is not None:
        if regularizer.treft is not None:
            _check_treft(regularizer.treft, cfg, report)
        if regularizer.block_em is not None:
            _check_block_em(regularizer.block_em, cfg, report)
        if regularizer.kl is not None:
            _check_kl(regularizer.kl, cfg, report)
    elif not report.problems:
        report.notes.append("no `em_regularizer:` block: the run is not regularized.")
    if evaluation is not None:
        _check_eval(evaluation, report)
    return report


def _validate(name: str, model: type, cfg: Mapping[str, Any], report: Report) -> Any:
    from pydantic import ValidationError

    if name not in cfg:
        return None
    try:
        return model.model_validate(cfg[name])
    except ValidationError as exc:
        for error in exc.errors():
            where = ".".join([name, *(str(p) for p in error["loc"])])
            report.problems.append(f"{where}: {error['msg'].removeprefix('Value error, ')}")
        return None


def _check_plugin(cfg: Mapping[str, Any], report: Report) -> None:
    if not isinstance(cfg.get("plugins") or [], list):
        report.problems.append(
            f"`plugins: {cfg['plugins']}` is not a list, and Axolotl reads it as one. Write `plugins: [emguard_plugin.EMGuardPlugin]`."
        )
    plugins = listed_plugins(cfg)
    asked = [b for b in ("em_regularizer", "em_eval") if b in cfg]
    if asked and not set(plugins) & set(PLUGIN_NAMES):
        report.problems.append(
            f"`{asked[0]}:` is set but the plugin is not listed, so Axolotl drops the block without a word. Add "
            "`plugins: [emguard_plugin.EMGuardPlugin]`."
        )
    for plugin in plugins:
        module = plugin.rpartition(".")[0]
        names = [module, f"axolotl.integrations.{module}"]
        if not any(_importable(name) for name in names if name):
            report.problems.append(f"the plugin `{plugin}` cannot be imported; Axolotl would go on without it.")
    if asked and not _importable("axolotl"):
        report.notes.append("axolotl is not installed here.")


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _check_treft(treft: TReFTConfig, cfg: Mapping[str, Any], report: Report) -> None:
    from jinja2 import TemplateError

    from emguard_plugin import chat_template as ct

    what = f"treft: coef {treft.coef:g}, {treft.tokens}, layers {treft.layers}" + (", compat" if treft.compat else "")
    if treft.coef == 0:
        what += " (measures only, the run is unchanged)"
    report.active.append(what)
    if cfg.get("chat_template") not in (None, "tokenizer_default"):
        report.notes.append(f"`chat_template: {cfg['chat_template']}` is resolved by Axolotl: the prefix is checked at start.")
        return
    tokenizer = _load_tokenizer(cfg, report)
    if tokenizer is None:
        return
    kwargs = cfg.get("chat_template_kwargs") or {}
    try:
        template = ct.read_template(tokenizer, **kwargs)
        if treft.tokens == "prefix":
            ct.require_prefix(template)
        elif not template.postfix:
            raise ValueError("the chat template prints nothing between query and answer: `tokens: postfix` has nothing to hold.")
        held = [template.prefix] if treft.tokens == "prefix" else [template.postfix]
        held += [ct.system_prefix(tokenizer, s, **kwargs) for s in treft.extra_prefixes]
    except (ValueError, TypeError, TemplateError) as exc:
        report.problems.append(f"em_regularizer.treft: {exc}")
        return
    for ids in held:
        report.active.append(f"treft holds {len(ids)} tokens: {tokenizer.decode(list(ids))!r}")
    if template.dated_after is not None and treft.tokens == "prefix":
        report.problems.append(
            "em_regularizer.treft: the chat template prints today's date in the prefix. Pin it with `chat_template_kwargs`."
        )
    report.notes.append("rows with other system prompts are found when training starts, each with its own prefix.")


def _check_kl(kl: KLConfig, cfg: Mapping[str, Any], report: Report) -> None:
    from emguard_plugin.anchors import load_chats

    coef = 0.7 if kl.coef is None else kl.coef
    what = f"coef {coef:g} nats per token" if kl.target is None else f"held at {kl.target:g} nats per token"
    what += " (measures only, the run is unchanged)" if coef == 0 and kl.target is None else ""
    source = kl.anchors.removeprefix("self:").replace("self", "bundled")
    count = "anchors"
    if source != "train":
        try:
            kl.check_files()
            if source == "bundled" or Path(source).expanduser().exists():
                count = f"{len(load_chats(source))} anchors"
            else:
                report.notes.append(f"em_regularizer.kl.anchors: {source} is loaded when training starts.")
        except ValueError as exc:
            report.problems.append(str(exc))
    report.active.append(f"kl: {what}, KL({kl.direction}), {count} ({kl.anchors}), {kl.tokens} tokens, reference {kl.cache}")
    adapter = cfg.get("adapter") if "model_name_or_path" not in cfg else cfg.get("use_peft")
    if kl.cache == "live" and not adapter:
        report.problems.append(
            "em_regularizer.kl.cache: `live` needs an adapter to switch off, and there is none. Use `memory` or a folder."
        )


def _check_block_em(block: BlockEMConfig, cfg: Mapping[str, Any], report: Report) -> None:
    from emguard_plugin.latents import LatentSet
    from emguard_plugin.regularizers.block_em_rules import calibrated_coef, set_in_words

    try:
        block.check_files()
        latents = LatentSet.load(block.latents)
        shared_by = len(latents) if block.latent_reduction == "mean" else 1
        coef = calibrated_coef(latents.calibration, block.tokens, shared_by) if block.coef == "auto" else block.coef
    except ValueError as exc:
        report.problems.append(str(exc))
        return
    what = f"coef {coef:g}" + (", calibrated" if block.coef == "auto" else "")
    what += " (measures only, the run is unchanged)" if coef == 0 else ""
    report.active.append(
        f"block_em: {what}, {set_in_words(latents)}, {block.tokens} tokens, found on {latents.model}, base {block.cache}"
    )
    adapter = cfg.get("adapter") if "model_name_or_path" not in cfg else cfg.get("use_peft")
    for key, set_ in {"cache: live": block.cache == "live", "freeze_above: true": block.freeze_above}.items():
        if set_ and not adapter:
            report.problems.append(f"`em_regularizer.block_em.{key}` needs an adapter, and there is none.")
    if block.tokens in ("header", "prefix"):
        _check_block_em_tokens(block.tokens, cfg, report)
    report.notes.append(f"whether the model is the one that the latents were found on ({latents.model}) is checked at start.")


def _check_block_em_tokens(tokens: str, cfg: Mapping[str, Any], report: Report) -> None:
    from jinja2 import TemplateError

    from emguard_plugin import chat_template as ct

    if cfg.get("packing") and cfg.get("packing_strategy") == "wrapped" and tokens == "prefix":
        report.problems.append("`em_regularizer.block_em.tokens: prefix` cannot be found under `packing_strategy: wrapped`. Use `bfd`.")
    if cfg.get("chat_template") not in (None, "tokenizer_default"):
        report.notes.append(f"`chat_template: {cfg['chat_template']}` is resolved by Axolotl: the {tokens} is checked at start.")
        return
    tokenizer = _load_tokenizer(cfg, report)
    if tokenizer is None:
        return
    try:
        template = ct.read_template(tokenizer, **(cfg.get("chat_template_kwargs") or {}))
    except (ValueError, TypeError, TemplateError) as exc:
        report.problems.append(f"em_regularizer.block_em: {exc}")
        return
    held = template.postfix if tokens == "header" else template.prefix[1:]
    if tokens == "header" and not held:
        report.problems.append("em_regularizer.block_em: the chat template prints nothing between query and answer for `tokens: header`.")
    else:
        others = ", or the prefix of the system prompt that a row has" if tokens == "prefix" else ""
        report.active.append(f"block_em holds {len(held)} tokens of each conversation: {tokenizer.decode(list(held))!r}{others}")


def _load_tokenizer(cfg: Mapping[str, Any], report: Report) -> Any:
    """Return the run's tokenizer, or None with the reason in the report."""
    key = next((k for k in ("tokenizer_config", "base_model", "model_name_or_path") if cfg.get(k)), None)
    if key is None:
        report.problems.append("no model is named: `base_model:` (Axolotl) or `model_name_or_path:` (TRL).")
        return None
    name, here = str(cfg[key]), f"`{key}: {cfg[key]}`"
    is_folder = Path(name).expanduser().is_dir()
    if not is_folder and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        report.problems.append(f"{here} is not a folder.")
        return None
    template = cfg.get("chat_template_path")
    try:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(name)
        if template and Path(template).is_file():
            tokenizer.chat_template = Path(template).read_text(encoding="utf-8")
        elif template:
            tokenizer.chat_template = AutoTokenizer.from_pretrained(template).chat_template
    except (OSError, ValueError, ImportError) as exc:
        reason = str(exc).strip().splitlines()[0]
        if is_folder:
            report.problems.append(f"{here}: the tokenizer cannot be loaded ({reason}).")
        else:
            report.notes.append(
                f"{here} is not a folder here, so it is taken as a hub name, which cannot be loaded ({reason}): prefix not checked."
            )
        return None
    return tokenizer


def _check_eval(config: EMEvalConfig, report: Report) -> None:
    from emguard_plugin.evaluation.judges import build_judges
    from emguard_plugin.evaluation.plan import requests
    from emguard_plugin.evaluation.questions import load_questions

    try:
        config.check_files()
        built = build_judges(config.judges)
        suites = {name: load_questions(source) for name, source in config.suites().items()}
    except (ValueError, ImportError) as exc:
        report.problems.append(f"em_eval: {exc}")
        return
    n = len(requests(config, suites)) * (2 if config.evaluate_base else 1)
    sizes = ", ".join(f"{len(q)} in {k}" for k, q in suites.items())
    judges = ", ".join(judge.name for judge in built)
    gate = "" if config.fail_above is None else f"; the gate is an EM rate of {config.fail_above:g}"
    report.active.append(f"em_eval: {sizes}; {n} answers in all; judged by {judges}{gate}")
