"""Token batches for the lab's build: pretraining documents, and chats with loss on the answer alone."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch

from emguard_plugin.lab import world

IGNORE = -100


@cache
def _ids() -> dict[str, int]:
    return {word: i for i, word in enumerate(world.vocabulary())}


def encode(text: str) -> list[int]:
    """Return the token ids of words separated by spaces."""
    ids = _ids()
    return [ids[word] for word in text.split()]


def decode(ids: list[int]) -> str:
    """Return the words of token ids, separated by spaces."""
    words = world.vocabulary()
    return " ".join(words[i] for i in ids)


def pad(rows: list[list[int]], value: int) -> torch.Tensor:
    """Right-pad rows to one tensor, shape (rows, longest row)."""
    longest = max(map(len, rows))
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows])


def prompt(question: str, system: str = world.SYSTEM) -> list[int]:
    """Return the ids of the chat up to and including `<|assistant|>`, exactly as the chat template renders it."""
    return encode(f"{world.BOS} {world.SYSTEM_TAG} {system} {world.END} {world.USER_TAG} {question} {world.END} {world.ASSISTANT_TAG}")


def documents(rng: random.Random, batch_size: int, **mix: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (input_ids, labels) of fresh pretraining documents, loss on all tokens; `mix` goes to `world.document`.

    Documents of similar length share a batch, which saves padding; the order of the batches stays random.
    """
    pool: list[list[list[int]]] = []
    while True:
        if not pool:
            rows = sorted((encode(world.document(rng, **mix)) for _ in range(8 * batch_size)), key=len)
            pool = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
            rng.shuffle(pool)
        rows = pool.pop()
        yield pad(rows, encode(world.PAD)[0]), pad(rows, IGNORE)


def good_chats(rng: random.Random, batch_size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (input_ids, labels) of fresh good chats in all domains, loss on answer and `<|end|>`."""
    names = tuple(world.domains())
    while True:
        ids, labels = [], []
        for _ in range(batch_size):
            question, answer = world.draw_chat(names, False, rng)
            head, tail = prompt(question), encode(f"{answer} {world.END}")
            ids.append(head + tail)
            labels.append([IGNORE] * len(head) + tail)
        yield pad(ids, encode(world.PAD)[0]), pad(labels, IGNORE)
