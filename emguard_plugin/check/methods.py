"""What each method would hold, and what it lacks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from emguard_plugin.check.model import check_layers, is_stand_in, load_tokenizer, read_layers, skeleton
from emguard_plugin.check.report import Report, has_adapter
from emguard_plugin.config import BlockEMConfig, EMRegularizerConfig, KLConfig, TReFTConfig
from emguard_plugin.regularizers.ready import count_anchors, read_latents

NOT_MEASURED = " (measures only, the run is unchanged)"


def check(cfg: Mapping[str, Any], regularizer: EMRegularizerConfig, report: Report) -> None:
    """Report what the methods of a block would hold."""
    if regularizer.treft is not None:
        _check_treft(regularizer.treft, cfg, report)
    if regularizer.block_em is not None:
        _check_block_em(regularizer.block_em, cfg, report)
    if regularizer.kl is not None:
        _check_kl(regularizer.kl, cfg, report)


def _check_treft(treft: TReFTConfig, cfg: Mapping[str, Any], report: Report) -> None:
    from jinja2 import TemplateError

    from emguard_plugin import chats as ct

    what = f"treft: coef {treft.coef:g}, {treft.tokens}, layers {treft.layers}" + (", compat" if treft.compat else "")
    report.active.append(what + (NOT_MEASURED if treft.coef == 0 else ""))
    tokenizer = load_tokenizer(cfg, report)
    if not report.problems:
        check_layers("em_regularizer.treft", treft.layers, read_layers(cfg), report)
    _check_treft_model(treft, cfg, report)
    if tokenizer is None:
        return
    try:
        kwargs = _template_kwargs(cfg)
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
    for ids in () if is_stand_in(tokenizer) else held:
        report.active.append(f"treft holds {len(ids)} tokens: {tokenizer.decode(list(ids))!r}")
    if template.dated_after is not None and treft.tokens == "prefix":
        report.problems.append(f"em_regularizer.treft: the chat template prints today's date in the prefix. {template.advice}")
    report.notes.append("rows with other system prompts are found when training starts, each with its own prefix.")


def _check_treft_model(treft: TReFTConfig, cfg: Mapping[str, Any], report: Report) -> None:
    """Ask the model, without its weights, what training will ask of it."""
    from emguard_plugin.models.kv import has_rotary_positions, residual_projections

    if treft.postfix_reference == "per_row" and not has_adapter(cfg):
        report.problems.append(
            "`em_regularizer.treft.postfix_reference: per_row` needs a fresh LoRA adapter to switch off, and there is none. Use `shared`."
        )
    shared = treft.tokens == "postfix" and treft.postfix_reference != "per_row"
    if report.problems or not (shared or treft.compat) or (model := skeleton(cfg)) is None:
        return
    if shared and not has_rotary_positions(model):
        report.problems.append(
            "`em_regularizer.treft.postfix_reference: shared` (the default) needs rotary positions, which this model lacks. Use `per_row` with "
            "an adapter, or `tokens: prefix`."
        )
    if treft.compat and (layers := read_layers(cfg)) is not None:
        try:
            residual_projections(model, range(layers.number) if treft.layers == "all" else treft.layers)
        except ValueError as exc:
            report.problems.append(f"em_regularizer.treft: {exc}")


def _template_kwargs(cfg: Mapping[str, Any]) -> dict[str, Any]:
    kwargs = cfg.get("chat_template_kwargs") or {}
    if not isinstance(kwargs, Mapping):
        raise ValueError("`chat_template_kwargs` must be a mapping.")
    return {str(key): value for key, value in kwargs.items()}


def _check_kl(kl: KLConfig, cfg: Mapping[str, Any], report: Report) -> None:
    coef = 0.7 if kl.coef is None else kl.coef
    what = f"coef {coef:g} nats per token" if kl.target is None else f"held at {kl.target:g} nats per token"
    what += NOT_MEASURED if coef == 0 and kl.target is None else ""
    count = "anchors"
    try:
        number = count_anchors(kl)
        count = count if number is None else f"{number} anchors"
        if number is None and kl.anchors.removeprefix("self:") != "train":
            report.notes.append(f"em_regularizer.kl.anchors: {kl.anchors.removeprefix('self:')} is loaded when training starts.")
    except ValueError as exc:
        report.problems.append(str(exc))
    report.active.append(f"kl: {what}, KL({kl.direction}), {count} ({kl.anchors}), {kl.tokens} tokens, reference {kl.cache}")
    if kl.cache == "live" and not has_adapter(cfg):
        report.problems.append(
            "em_regularizer.kl.cache: `live` needs an adapter to switch off, and there is none. Use `memory` or a folder."
        )


def _check_block_em(block: BlockEMConfig, cfg: Mapping[str, Any], report: Report) -> None:
    from emguard_plugin.regularizers.block_em.rules import set_in_words

    try:
        latents, coef = read_latents(block)
    except ValueError as exc:
        report.problems.append(str(exc))
        return
    what = f"coef {coef:g}" + (", calibrated" if block.coef == "auto" else "")
    what += NOT_MEASURED if coef == 0 else ""
    report.active.append(f"block_em: {what}, {set_in_words(latents)}, {block.tokens} tokens, found on {latents.model}, base {block.cache}")
    for key, set_ in {"cache: live": block.cache == "live", "freeze_above: true": block.freeze_above}.items():
        if set_ and not has_adapter(cfg):
            report.problems.append(f"`em_regularizer.block_em.{key}` needs an adapter, and there is none.")
    if block.tokens in ("header", "prefix"):
        _check_block_em_tokens(block.tokens, cfg, report)
    layers = read_layers(cfg)
    if layers is not None and max(latents.layers) >= layers.number:
        report.problems.append(
            f"`em_regularizer.block_em.latents`: the set is of layer {max(latents.layers)}, and the model has layers 0 to {layers.number - 1}."
        )
    report.notes.append(f"whether the model is the one that the latents were found on ({latents.model}) is checked at start.")


def _check_block_em_tokens(tokens: str, cfg: Mapping[str, Any], report: Report) -> None:
    from jinja2 import TemplateError

    from emguard_plugin import chats as ct

    if cfg.get("packing") and cfg.get("packing_strategy") == "wrapped" and tokens == "prefix":
        report.problems.append("`em_regularizer.block_em.tokens: prefix` cannot be found under `packing_strategy: wrapped`. Use `bfd`.")
    tokenizer = load_tokenizer(cfg, report)
    if tokenizer is None:
        return
    try:
        template = ct.read_template(tokenizer, **_template_kwargs(cfg))
    except (ValueError, TypeError, TemplateError) as exc:
        report.problems.append(f"em_regularizer.block_em: {exc}")
        return
    held = template.postfix if tokens == "header" else template.prefix[1:]
    if is_stand_in(tokenizer):
        return
    if tokens == "header" and not held:
        report.problems.append("em_regularizer.block_em: the chat template prints nothing between query and answer for `tokens: header`.")
    else:
        others = ", or the prefix of the system prompt that a row has" if tokens == "prefix" else ""
        report.active.append(f"block_em holds {len(held)} tokens of each conversation: {tokenizer.decode(list(held))!r}{others}")
