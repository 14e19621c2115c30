"""What catches a method that holds the wrong tokens, or none: looked at on training rows before the first step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from emguard_plugin.chats import Known, decode
from emguard_plugin.chats.held_tokens import answered
from emguard_plugin.chats.training_rows import IGNORE
from emguard_plugin.regularizers.base import EMRegularizerCallback
from emguard_plugin.regularizers.run_facts import TEMPLATE_REGIONS, Row, RunFacts


def check_held(callbacks: Sequence[EMRegularizerCallback], run: RunFacts) -> None:
    """Look at up to 256 training rows, as each method that holds tokens of them would.

    Raises:
        ValueError: for a method that would hold nothing in any row, or something of a query or an answer as part of the template.
    """
    for callback in callbacks:
        if type(callback).held is not EMRegularizerCallback.held:
            _check(callback, run)


def _check(callback: EMRegularizerCallback, run: RunFacts) -> None:
    total, rows = 0, run.rows
    of_template = callback.region in TEMPLATE_REGIONS
    answers_alone = run.answers_alone(callback.region)
    for ids, labels in rows:
        given = torch.tensor([ids])
        held = callback.held({"input_ids": given, "labels": given if labels is None else torch.tensor([labels])})
        if held is None:
            return
        at = held[0].nonzero().flatten().tolist()
        total += len(at)
        known = run.known(ids, callback.region) if of_template and not run.wrapped_packing else None
        if known is not None and (wrong := _own_text(callback.region, at, known)) is not None:
            raise ValueError(
                f"em_regularizer.{callback.name}: `tokens: {callback.region}` would hold {wrong[1]} of a training row: "
                f"{marked(run.tokenizer, ids, wrong[0])}. Nothing of a query or an answer may be held there; use other `tokens`, and "
                "please report the chat template."
            )
        if answers_alone and of_template and labels is not None and known is None:
            answers = answered(torch.tensor(labels))
            wrong_at = next((i for i in at if answers[i]), None)
            if wrong_at is not None:
                raise ValueError(
                    f"em_regularizer.{callback.name}: `tokens: {callback.region}` would hold a token that the loss supervises, in a run "
                    f"that supervises answers alone: {marked(run.tokenizer, ids, wrong_at)}. Train on conversations (`messages`) rendered "
                    "with the tokenizer's own template, or use other `tokens`."
                )
    if rows and not total and (of_template or any(labels is not None for _, labels in rows)):
        raise ValueError(_nothing(callback, rows))


def _nothing(callback: EMRegularizerCallback, rows: Sequence[Row]) -> str:
    said = f"em_regularizer.{callback.name}: `tokens: {callback.region}` holds no token of the first {len(rows)} training rows"
    if callback.region == "prompt" and all(x != IGNORE for _, labels in rows if labels is not None for x in labels):
        return (
            f"{said}, because the loss supervises every token. Set `assistant_only_loss: true` or `completion_only_loss: true` (TRL), or "
            "`train_on_inputs: false` (Axolotl), or use `tokens: all`."
        )
    return f"{said}, so it would do nothing. Choose other `tokens`, or remove the block."


def _own_text(region: str, at: Sequence[int], known: Known) -> tuple[int, str] | None:
    """Return the first held token that is a query's or an answer's, and whose it is."""
    spans = [(a, b, "text of the user's own") for a, b in known.users] + [(a, b, "text of the answer") for a, b in known.answers]
    if region == "prefix":
        late = next((i for i in at if i >= known.prefix), None)
        return None if late is None else (late, "text of the user's own, or what stands behind it,")
    return next(((i, whose) for i in at for a, b, whose in spans if a <= i < b), None)


def marked(tokenizer: Any, ids: Sequence[int], at: int, around: int = 24) -> str:
    """Return the text around a token, the token between ➤ and ◀."""
    before, this, after = (decode(tokenizer, part) for part in (ids[max(0, at - around) : at], ids[at : at + 1], ids[at + 1 : at + around]))
    return repr(f"{before}➤{this}◀{after}")
