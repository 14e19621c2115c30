"""Replies that the model gives before training, for `anchors: self`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from emguard_plugin.models.modes import eval_mode

LONGEST_REPLY = 128
AT_ONCE = 32


@torch.no_grad()
def sample_replies(model: nn.Module, tokenizer: Any, prompts: Sequence[Sequence[int]], seed: int, longest: int) -> list[tuple[int, ...]]:
    """Sample one reply per prompt from the model's full distribution at temperature 1.

    Args:
        model: The model as its host calls it, before the first update.
        tokenizer: Its tokenizer.
        prompts: Ids that end with the header of a reply.
        seed: Seeds the draws; the run's own random state is left alone.
        longest: The model's context; a reply has at most 128 tokens.

    Returns:
        Ids of each reply, its end-of-turn token included.
    """
    from transformers import GenerationConfig

    base = getattr(model, "generation_config", None)
    ends = getattr(base, "eos_token_id", None)
    ends = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(ends)
    device = next(model.parameters()).device
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    replies: list[tuple[int, ...]] = [()] * len(prompts)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), eval_mode(model):
        torch.manual_seed(seed)
        for at in range(0, len(order), AT_ONCE):
            rows = order[at : at + AT_ONCE]
            width = max(len(prompts[i]) for i in rows)
            ids = torch.tensor([[pad] * (width - len(prompts[i])) + list(prompts[i]) for i in rows], device=device)
            mask = torch.tensor([[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in rows], device=device)
            config = GenerationConfig(
                do_sample=True, temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0, use_cache=True, pad_token_id=pad,
                eos_token_id=sorted(ends), max_new_tokens=max(1, min(LONGEST_REPLY, longest - width)),
            )  # fmt: skip
            out = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
            for i, reply in zip(rows, out[:, width:].tolist(), strict=True):
                end = next((t for t, token in enumerate(reply) if token in ends), len(reply) - 1)
                replies[i] = tuple(reply[: end + 1])
    return replies
