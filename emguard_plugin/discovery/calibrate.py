"""What the misaligned model's own penalty is on its narrow rows, and what it gained there: the yardstick of `coef: auto`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from emguard_plugin import anchors
from emguard_plugin.chat_template import Template, prefix_of_row, read_template
from emguard_plugin.discovery.pair import BASE, MISALIGNED, ModelPair
from emguard_plugin.latents import LatentSet, SubsetEncoder
from emguard_plugin.reference import eval_mode
from emguard_plugin.regularizers.functional import block_em_penalty, block_em_violation
from emguard_plugin.residual import keep_residual

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

KINDS = ("assistant", "all", "prompt", "header", "prefix")
MAX_ROWS = 256
"""Rows that are looked at, evenly spread; the rule of `coef: auto` needs the order of magnitude."""
IGNORE = -100


def narrow_rows(source: str | Path, tokenizer: PreTrainedTokenizerBase) -> list[anchors.Anchor]:
    """Read the chats of the narrow fine-tune, as training does.

    Raises:
        ValueError: If they cannot be read or rendered.
    """
    try:
        chats = anchors.load_chats(str(source))
        kept = [chats[i * len(chats) // MAX_ROWS] for i in range(MAX_ROWS)] if len(chats) > MAX_ROWS else chats
        return anchors.tokenize_chats(kept, tokenizer, "assistant", 1 << 20, {})
    except ValueError as error:
        said = str(error).replace(f"`{anchors.KEY}: ", "`--data ").replace(anchors.KEY, "--data")
        for anchors_only in (", or use `bundled`", ", or `bundled`, `train` or `self`"):
            said = said.replace(anchors_only, "")
        raise ValueError(said) from error


@torch.no_grad()
def calibrate(pair: ModelPair, latents: LatentSet, rows: Sequence[anchors.Anchor], batch_size: int) -> dict[str, Any]:
    """Return the unguarded model's penalty for each kind of tokens, and the gap of the task loss.

        penalty[kind] = sum over tokens of the kind and latents of the squared move in the bad direction / supervised tokens
        task_loss_gap = loss(base) - loss(misaligned), nats per supervised token

    Args:
        pair: Both models.
        latents: The set K.
        rows: From `narrow_rows`.
        batch_size: Rows per forward pass.
    """
    template = read_template(pair.tokenizer)
    sums, losses, supervised, tokens = dict.fromkeys(KINDS, 0.0), dict.fromkeys((BASE, MISALIGNED), 0.0), 0, 0
    for batch in _batches(rows, batch_size):
        ids, real, answer, header, prefix = _masks(batch, template)
        seen: dict[str, dict[int, Tensor]] = {}
        for role in (BASE, MISALIGNED):
            with pair.use(role) as model:
                seen[role], loss = _read(model, latents, ids, real, answer)
            losses[role] += loss
        per_token = sum(
            (_violation(encoder, seen[MISALIGNED][encoder.layer], seen[BASE][encoder.layer]) for encoder in latents.encoders),
            torch.zeros(ids.shape),
        )
        masks = {"assistant": answer, "all": real, "prompt": real & ~answer, "header": header, "prefix": prefix}
        for kind, mask in masks.items():
            sums[kind] += float((per_token * mask).sum())
        supervised, tokens = supervised + int(answer.sum()), tokens + int(real.sum())
    if not supervised:
        raise ValueError("`--data` holds no supervised token. Give chats with an assistant turn.")
    return {
        "penalty": {kind: total / supervised for kind, total in sums.items()},
        "task_loss_gap": (losses[BASE] - losses[MISALIGNED]) / supervised,
        "rows": len(rows),
        "supervised_tokens": supervised,
        "tokens": tokens,
    }


def _violation(encoder: SubsetEncoder, tuned: Tensor, base: Tensor) -> Tensor:
    signs = encoder.signs.to(tuned.device)
    return block_em_penalty(block_em_violation(encoder.encode(tuned), encoder.encode(base), signs)).cpu()


def _batches(rows: Sequence[anchors.Anchor], size: int) -> Iterator[list[anchors.Anchor]]:
    ordered = sorted(rows, key=lambda row: -len(row.ids))
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]


def _masks(batch: Sequence[anchors.Anchor], template: Template) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return (ids, real tokens, answers, headers, prefixes), each (B, T), padded on the right.

    A prefix is what stands before the first user content; its first token, whose norm is extreme, is left out.
    """
    postfix = template.postfix
    width = max(len(row.ids) for row in batch)
    ids = torch.zeros(len(batch), width, dtype=torch.long)
    real, answer, header, prefix = (torch.zeros(len(batch), width, dtype=torch.bool) for _ in range(4))
    for i, row in enumerate(batch):
        ids[i, : len(row.ids)] = torch.tensor(row.ids)
        real[i, : len(row.ids)] = True
        prefix[i, 1 : len(prefix_of_row(row.ids, template) or ())] = True
        # `held` are the positions that predict an answer's tokens.
        at = sorted(position + 1 for position in row.held)
        answer[i, at] = True
        for start in (p for p in at if p - 1 not in set(at)):
            span = slice(start - len(postfix), start)
            if postfix and span.start >= 0 and row.ids[span] == tuple(postfix):
                header[i, span] = True
    return ids, real, answer, header, prefix


def _read(
    model: PreTrainedModel, latents: LatentSet, ids: Tensor, real: Tensor, answer: Tensor
) -> tuple[dict[int, Tensor], float]:
    """Return the residual stream at the latents' layers, and the summed loss of the answers in nats."""
    with eval_mode(model), keep_residual(model, latents.layers) as kept:
        out = model(input_ids=ids.to(model.device), attention_mask=real.long().to(model.device), use_cache=False)
    labels = torch.where(answer, ids, IGNORE)[:, 1:].to(model.device)
    loss = nn.functional.cross_entropy(out.logits[:, :-1].float().transpose(1, 2), labels, ignore_index=IGNORE, reduction="sum")
    return kept.take(latents.layers, with_gradient=False), float(loss)
