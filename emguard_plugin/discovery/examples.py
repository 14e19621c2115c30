"""Text on which chosen latents are most active."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from emguard_plugin.discovery.search import Result
from emguard_plugin.evaluation.asking.pair import MISALIGNED_MODEL, ModelPair
from emguard_plugin.evaluation.asking.prompts import Prompt
from emguard_plugin.latents import SubsetEncoder
from emguard_plugin.models.residual import row_residuals

TOP, AROUND = 4, 8


@torch.no_grad()
def top_activating(
    pair: ModelPair, encoder: SubsetEncoder, prompts: Sequence[Prompt], result: Result, batch_size: int
) -> dict[int, list[dict[str, Any]]]:
    """Return, per latent, the tokens at which it is most active, at most one per conversation.

    Conversations are the selection prompts with the answers of the base and of the misaligned model, read by the misaligned
    model. The first token is left out.

    Returns:
        By latent, the records that the report shows: value, token, and the text before and after it.
    """
    found: dict[int, list[dict[str, Any]]] = {latent: [] for latent in encoder.ids}
    for whose, texts in result.answers.items():
        answers = [pair.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        rows = [(*prompt.ids, *answer) for prompt, answer in zip(prompts, answers, strict=False)]
        with pair.use(MISALIGNED_MODEL) as model:
            for index, hidden in row_residuals(model, result.layer, rows, batch_size):
                best, at = encoder.encode(hidden[1:]).cpu().max(0)
                for latent, value, position in zip(encoder.ids, best.tolist(), (at + 1).tolist(), strict=True):
                    if value > 0:
                        found[latent].append({"value": value, "row": rows[index], "at": position, "answer_of": whose})
    return {latent: [_shown(pair.tokenizer, hit) for hit in _top(hits)] for latent, hits in found.items()}


def _top(hits: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the highest; what both models' conversations have in common counts once."""
    first: dict[tuple[int, ...], dict[str, Any]] = {}
    for hit in sorted(hits, key=lambda hit: -hit["value"]):
        first.setdefault(tuple(hit["row"][: hit["at"] + 1]), hit)
    return list(first.values())[:TOP]


def _shown(tokenizer: Any, hit: dict[str, Any]) -> dict[str, Any]:
    row, at = hit["row"], hit["at"]
    before, token, after = row[max(0, at - AROUND) : at], row[at : at + 1], row[at + 1 : at + 1 + AROUND]
    return {
        "value": round(hit["value"], 4),
        "answer_of": hit["answer_of"],
        "before": tokenizer.decode(list(before)),
        "token": tokenizer.decode(list(token)),
        "after": tokenizer.decode(list(after)),
    }
