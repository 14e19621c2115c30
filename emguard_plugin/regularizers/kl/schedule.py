"""Which anchors go into which forward pass: a function of seed and step alone, so a resumed run goes on where it was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np

FULL_PASS = 256
"""Tokens below which a forward pass of a large model takes no less time, so anchors are put together up to here."""


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, n: int) -> np.ndarray:
    return np.random.default_rng([seed, 0x4B4C, epoch]).permutation(n)


@dataclass(frozen=True)
class Schedule:
    """The anchors of every optimizer step, cut into one slot per (forward pass, process).

    A step draws its anchors from a stream that passes through all of them in a new order each time. Cutting a step into more
    micro-batches or processes does not change what it draws, and the mean over its tokens is taken over the whole step.

    Attributes:
        sizes: Tokens of each anchor.
        per_step: Anchors of one optimizer step.
        passes: Micro-batches of a step that have anchors.
        micro_batches: Micro-batches of a full step; the last of an epoch may have fewer.
        processes: Processes, each with anchors of its own.
        seed: The run's seed.
        ratio: Anchor tokens per training token that this comes to.
    """

    sizes: tuple[int, ...]
    per_step: int
    passes: int
    micro_batches: int
    processes: int
    seed: int
    ratio: float

    @classmethod
    def plan(cls, sizes: Sequence[int], ratio: float, batch_tokens: float, micro_batches: int, processes: int, seed: int) -> Schedule:
        """Choose how many anchors a step takes, and over how many of its micro-batches to spread them.

        Evenly spread they cost the least memory, but a pass of less than 256 tokens is not faster than one of 256: short
        ones are put together, up to the size of a micro-batch.

        Args:
            sizes: Tokens of each anchor.
            ratio: Anchor tokens wanted per training token.
            batch_tokens: Tokens of one micro-batch of one process.
            micro_batches: Micro-batches per optimizer step.
            processes: Number of processes.
            seed: The run's seed.

        Returns:
            The schedule of a whole run.
        """
        mean, step_tokens = float(np.mean(sizes)), batch_tokens * micro_batches * processes
        per_step = min(max(round(ratio * step_tokens / mean), processes), max(len(sizes), processes))
        one_pass = max(ratio * batch_tokens, min(batch_tokens, FULL_PASS))
        passes = round(per_step * mean / processes / one_pass)
        passes = max(1, min(passes, micro_batches, per_step // processes))
        return cls(tuple(sizes), per_step, passes, micro_batches, processes, seed, per_step * mean / step_tokens)

    def rows(self, step: int, micro_batches: int) -> list[int]:
        """Return the anchors of one optimizer step that accumulates so many micro-batches, in stream order."""
        n = self.per_step
        if micro_batches < self.micro_batches:
            n = max(self.processes, round(n * micro_batches / self.micro_batches))
        at, size = step * self.per_step, len(self.sizes)
        return [int(_order(self.seed, i // size, size)[i % size]) for i in range(at, at + n)]

    def slots(self, step: int, micro_batches: int) -> list[list[int]]:
        """Return the anchors of each (micro-batch, process), micro-batches first; later micro-batches have none.

        Anchors of like length share a slot, which saves padding, and neighbouring slots run at the same time.
        """
        rows = sorted(self.rows(step, micro_batches), key=lambda i: self.sizes[i])
        n = max(1, min(self.passes, micro_batches, len(rows) // self.processes)) * self.processes
        cuts = [round(i * len(rows) / n) for i in range(n + 1)]
        return [rows[a:b] for a, b in pairwise(cuts)]
