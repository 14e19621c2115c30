"""BLOCK-EM's rules around the penalty: the coefficient from a calibration, the yardstick, and when a constraint is void."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from emguard_plugin import chats as ct
from emguard_plugin.chats.held_tokens import TokenKind
from emguard_plugin.chats.training_rows import conversations, labelled_conversations, supervised
from emguard_plugin.latents import LatentSet
from emguard_plugin.models.adapters import peft_model
from emguard_plugin.models.residual import decoder
from emguard_plugin.reference.stored import tensors_hash
from emguard_plugin.regularizers.block_em.calibration import COEF_BOUNDS, GAP_PER_PENALTY
from emguard_plugin.regularizers.block_em.words import freeze_needs_adapter
from emguard_plugin.regularizers.run_facts import RunFacts

logger = logging.getLogger(__name__)
BASE_WITHIN = 0.05
"""Relative distance of latents from the base model's that rounding explains, recorded in other batches and 16 or 8 bits included."""
BYPASSED_SHARE, BYPASSED_SHIFT, BYPASSED_STEPS = 0.01, 0.05, 20
"""When the penalty is below 1 % of the yardstick and the residual stream has moved by 5 %, the constraint may be bypassed."""


def unguarded_penalty(calibration: Mapping[str, Any], tokens: TokenKind, shared_by: int = 1) -> float | None:
    """Return the yardstick, the unguarded misaligned model's own penalty on its rows; warn when there was nothing to block.

    Args:
        calibration: As for `calibrated_coef`.
        tokens: As for `calibrated_coef`.
        shared_by: As for `calibrated_coef`.
    """
    penalties = calibration.get("penalty") or {}
    here = penalties.get(tokens)
    if here is None:
        return None
    if GAP_PER_PENALTY * max(calibration.get("task_loss_gap") or 0.0, 0.0) >= COEF_BOUNDS[1] * here:
        best = max(penalties, key=lambda k: penalties[k] or 0.0)
        other = f" At `tokens: {best}` it is {penalties[best]:.3g}." if penalties[best] > 10 * here else ""
        logger.warning(
            "em_regularizer.block_em: the unguarded misaligned model's own penalty at `tokens: %s` is %.3g, next to nothing: the "
            "constraint is void, and a penalty of 0 will mean nothing.%s", tokens, here, other,
        )  # fmt: skip
    return float(here) / shared_by


def warn_if_bypassed(penalty: float, outside_shift: float, yardstick: float | None, step: int) -> bool:
    """Warn when the penalty is met while the model moves where nothing is held.

    Returns:
        Whether it warned.
    """
    if step < BYPASSED_STEPS or penalty > BYPASSED_SHARE * (yardstick or 0.0) or outside_shift < BYPASSED_SHIFT:
        return False
    logger.warning(
        "em_regularizer.block_em: at step %d the penalty is %.3g, but the residual stream at the held tokens has moved by %.0f %% "
        "outside the latents that are held. A met constraint does not show that misalignment is absent: measure the EM rate, and "
        "widen the set by another round of `emguard discover` if it is not.", step, penalty, 100 * outside_shift,
    )  # fmt: skip
    return True


@torch.no_grad()
def distance(now: Sequence[Tensor], base: Sequence[Tensor]) -> float:
    """Return `||now - base|| / ||base||` over all latents at all held tokens.

    Args:
        now: Per layer, (N, K) pre-activations.
        base: The base model's.
    """
    missed = sum(float((a - b.to(a.device)).square().sum()) for a, b in zip(now, base, strict=True))
    size = sum(float(b.square().sum()) for b in base)
    return (missed / max(size, 1e-30)) ** 0.5


def warn_of_dropout(away: float) -> None:
    """Warn that the training forward is not the base model before the first update, though the model is.

    Args:
        away: `distance` of the training forward.
    """
    logger.warning(
        "em_regularizer.block_em: before the first update the latents of the training forward are %.1f %% away from the base model's, "
        "where nothing has been learnt: what sets them apart is in training alone (dropout of the model or of a continued adapter, "
        "another kernel), and the penalty holds that too. Set `attention_dropout` and the like to 0.", 100 * away,
    )  # fmt: skip


def content(latents: LatentSet) -> str:
    """Return what tells this set of latents from any other, whatever else its file says."""
    tensors = {f"{e.layer}.{n}": t for e in latents.encoders for n, t in e.tensors().items()}
    return tensors_hash(tensors) + "|" + json.dumps([e.settings() for e in latents.encoders])


def span(weight: Tensor) -> Tensor:
    """Return (d, rank): an orthonormal basis of the encoder rows' span."""
    u, s, _ = torch.linalg.svd(weight.double().T, full_matrices=False)
    return u[:, s > 1e-6 * s.max()].float()


def template_of(run: RunFacts, tokens: TokenKind) -> ct.Template:
    """Return the chat template, once the training rows have shown the tokens to hold, `header` or `prefix`.

    Raises:
        ValueError: when the template has none, the rows lack them, or packing lost where conversations begin.
    """
    template, book = run.template, run.book
    rows = conversations(run.sample)
    if tokens == "header":
        both = list(labelled_conversations(run.sample))
        ct.prompts_with_postfix([ids for ids, _ in both], template, book, [supervised(labels) for _, labels in both])
        return template
    if run.wrapped_packing:
        raise ValueError(
            "`em_regularizer.block_em.tokens: prefix`: `packing_strategy: wrapped` loses where conversations begin, so their prefixes "
            "cannot be found. Use `packing_strategy: bfd`, or `tokens: prompt`."
        )
    found = [(row, len(ct.prefix_of(row, template, book) or ())) for row in rows]
    if not found:
        raise ValueError("the training data is empty: there is no prefix to hold.")
    lacking = [row for row, end in found if end < (1 if any(n > 1 for _, n in found) else 2)]
    if len(lacking) > (1 - ct.MIN_SHARE_FOUND) * len(found):
        raise ValueError(
            f"`em_regularizer.block_em.tokens: prefix`: {len(lacking)} of {len(found)} training rows show nothing of the chat template "
            f"before the user's content, besides their first token; one begins with {ct.shown(template, lacking[0])}. Train on chats "
            "rendered with this tokenizer's template, or use `tokens: prompt`."
        )
    if book is None:
        ct.warn_unmarked(template)
    return template


def freeze_above(run: RunFacts, last: int) -> list[nn.Parameter]:
    """Freeze what trains above a decoder layer, and return it.

    Args:
        run: The run that is about to start.
        last: 0-based index of the highest layer that goes on training.

    Returns:
        The parameters that no longer train.

    Raises:
        ValueError: when it is too late, nothing to freeze is an adapter, or nothing would be left to train.
    """
    key = "`em_regularizer.block_em.freeze_above`"
    if run.optimizer_built:
        raise ValueError(
            f"{key}: the optimizer exists already, so it is too late to freeze layers. Let the trainer build it, or set PEFT's "
            "`layers_to_transform`."
        )
    if peft_model(run.model) is None:
        raise ValueError(freeze_needs_adapter())
    _, layers = decoder(run.model)
    below = {id(p) for layer in layers[: last + 1] for p in layer.parameters()}
    below |= {id(p) for p in run.model.get_input_embeddings().parameters()}
    frozen = [p for p in run.model.parameters() if p.requires_grad and id(p) not in below]
    for p in frozen:
        p.requires_grad_(False)
    if not any(p.requires_grad for p in run.model.parameters()):
        raise ValueError(f"{key}: nothing trains at or below layer {last}. Widen the adapter.")
    return frozen
