"""What the misaligned model's own penalty is on its narrow rows, and what it gained there: the yardstick of `coef: auto`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor, nn

from emguard_plugin.chats import Book, Chat, read_book, read_template
from emguard_plugin.chats.held_tokens import IGNORE, TokenKind, held_tokens, real_tokens
from emguard_plugin.chats.sources import ChatSetting, StoredChat, TokenizedChat, read_chats, tokenized
from emguard_plugin.evaluation.asking.pair import BASE_MODEL, MISALIGNED_MODEL, ModelPair
from emguard_plugin.latents import LatentSet, SubsetEncoder
from emguard_plugin.models.modes import eval_mode
from emguard_plugin.models.residual import keep_residual
from emguard_plugin.regularizers.functional import block_em_penalty, block_em_violation

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DATA = ChatSetting(
    name="--data",
    joined=" ",
    if_unheld="`--data`: in {where} the chat template prints no reply as it was written, so nothing of it is supervised. Leave the chat out.",
)
KINDS: tuple[TokenKind, ...] = get_args(TokenKind)
MAX_ROWS = 256
"""Rows that are looked at, evenly spread; the rule of `coef: auto` needs the order of magnitude."""


def narrow_rows(source: str | Path, tokenizer: PreTrainedTokenizerBase) -> list[TokenizedChat]:
    """Read the chats of the narrow fine-tune, as training does.

    Returns:
        One row of tokens per chat, in their order.

    Raises:
        ValueError: If they cannot be read or rendered.
    """
    return tokenized(_sample(source), tokenizer, "assistant", DATA)


def narrow_book(source: str | Path, tokenizer: PreTrainedTokenizerBase) -> Book:
    """Return what the same chats show about whose text is whose, as training knows it of its conversations."""
    return read_book(tokenizer, (Chat(messages, {}) for _, messages in _sample(source)))


def _sample(source: str | Path) -> list[StoredChat]:
    chats = read_chats(str(source), DATA)
    return [chats[i * len(chats) // MAX_ROWS] for i in range(MAX_ROWS)] if len(chats) > MAX_ROWS else chats


@torch.no_grad()
def calibrate(
    pair: ModelPair, latents: LatentSet, rows: Sequence[TokenizedChat], batch_size: int, book: Book | None = None
) -> dict[str, Any]:
    """Return the unguarded model's penalty for each kind of tokens, as training holds them, and the gap of the task loss.

        penalty[kind] = sum over tokens of the kind and latents of the squared move in the bad direction / supervised tokens
        task_loss_gap = loss(base) - loss(misaligned), nats per supervised token

    Args:
        pair: Both models.
        latents: The set K.
        rows: From `narrow_rows`.
        batch_size: Rows per forward pass.
        book: From `narrow_book`.

    Raises:
        ValueError: If the rows have no supervised token.
    """
    template = read_template(pair.tokenizer)
    sums, losses, supervised, tokens = dict.fromkeys(KINDS, 0.0), dict.fromkeys((BASE_MODEL, MISALIGNED_MODEL), 0.0), 0, 0
    for batch in _batches(rows, batch_size):
        inputs = _inputs(batch)
        real, answer = real_tokens(inputs), held_tokens(inputs, "assistant")
        seen: dict[str, dict[int, Tensor]] = {}
        for role in (BASE_MODEL, MISALIGNED_MODEL):
            with pair.use(role) as model:
                seen[role], loss = _read(model, latents, inputs)
            losses[role] += loss
        per_token = sum(
            (_violation(encoder, seen[MISALIGNED_MODEL][encoder.layer], seen[BASE_MODEL][encoder.layer]) for encoder in latents.encoders),
            torch.zeros(real.shape),
        )
        for kind in KINDS:
            sums[kind] += float((per_token * held_tokens(inputs, kind, template, book)).sum())
        supervised, tokens = supervised + int(answer.sum()), tokens + int(real.sum())
    if not supervised:
        raise ValueError("`--data` holds no supervised token. Give chats with an assistant turn.")
    return {
        "penalty": {kind: total / supervised for kind, total in sums.items()},
        "task_loss_gap": (losses[BASE_MODEL] - losses[MISALIGNED_MODEL]) / supervised,
        "rows": len(rows),
        "supervised_tokens": supervised,
        "tokens": tokens,
    }


def _violation(encoder: SubsetEncoder, tuned: Tensor, base: Tensor) -> Tensor:
    signs = encoder.signs.to(tuned.device)
    return block_em_penalty(block_em_violation(encoder.encode(tuned), encoder.encode(base), signs)).cpu()


def _batches(rows: Sequence[TokenizedChat], size: int) -> Iterator[list[TokenizedChat]]:
    ordered = sorted(rows, key=lambda row: -len(row.ids))
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]


def _inputs(batch: Sequence[TokenizedChat]) -> dict[str, Tensor]:
    """Return what a host makes of the rows: (B, T) ids, attention mask and labels, padded on the right."""
    width = max(len(row.ids) for row in batch)
    ids, mask = (torch.zeros(len(batch), width, dtype=torch.long) for _ in range(2))
    labels = torch.full_like(ids, IGNORE)
    for i, row in enumerate(batch):
        ids[i, : len(row.ids)] = torch.tensor(row.ids)
        mask[i, : len(row.ids)] = 1
        at = [position + 1 for position in row.held]  # `held` are the positions that predict an answer's tokens
        labels[i, at] = ids[i, at]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _read(model: PreTrainedModel, latents: LatentSet, inputs: dict[str, Tensor]) -> tuple[dict[int, Tensor], float]:
    """Return the residual stream at the latents' layers, and the summed loss of the answers in nats."""
    here = {name: t.to(model.device) for name, t in inputs.items()}
    labels = here.pop("labels")[:, 1:]
    with eval_mode(model), keep_residual(model, latents.layers) as kept:
        out = model(**here, use_cache=False)
    loss = nn.functional.cross_entropy(out.logits[:, :-1].float().transpose(1, 2), labels, ignore_index=IGNORE, reduction="sum")
    return kept.take(latents.layers, with_gradient=False), float(loss)
