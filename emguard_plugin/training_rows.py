"""Conversations, as token ids, out of whatever training set a host has prepared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, islice, pairwise
from typing import Any

MAX_ROWS = 2000
"""Enough to estimate the frequency of each prefix to about a percent."""


def conversations(
    dataset: Any,
    wrapped_at: Sequence[int] | None = None,
    system_open: Sequence[int] = (),
    limit: int = MAX_ROWS,
) -> Iterator[list[int]]:
    """Yield conversations out of up to `limit` rows, evenly spread over the data set.

    Packed rows are taken apart: by `seq_lengths` (TRL `bfd`), or by `position_ids` that restart (Axolotl). Padding, where
    `attention_mask` is 0, is dropped.

    Args:
        dataset: A `datasets.Dataset`, `IterableDataset` or sequence of mappings with `input_ids`.
        wrapped_at: For TRL's `packing_strategy: wrapped`, whose rows keep no boundaries: the ids that open a
            conversation. Rows are cut at each occurrence, and what stands before the first one is dropped.
        system_open: The ids that open a system message; with `wrapped_at`, each must open a conversation that starts so.
        limit: Most rows of the data set to read.

    Raises:
        ValueError: when rows have no `input_ids`, or when `wrapped_at` would hide conversations with another start.
    """
    if dataset is None:
        return
    if hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__"):
        n = len(dataset)
        rows = (dataset[i * n // min(n, limit)] for i in range(min(n, limit)))
    else:
        rows = islice(iter(dataset), limit)
    for row in rows:
        if "input_ids" not in row:
            raise ValueError(
                f"the training rows have {sorted(row)} but no `input_ids`: TReFT checks its prefix against tokenised rows. "
                "Let the trainer prepare the data set (no `skip_prepare_dataset`)."
            )
        yield from _split(row, wrapped_at, tuple(system_open))


def _split(row: Any, wrapped_at: Sequence[int] | None, system_open: tuple[int, ...]) -> Iterator[list[int]]:
    ids = [int(i) for i in row["input_ids"]]
    mask, positions = row.get("attention_mask"), row.get("position_ids")
    keep = [i for i in range(len(ids)) if mask is None or int(mask[i])]
    ids = [ids[i] for i in keep]
    if row.get("seq_lengths") is not None:
        starts = [0, *accumulate(int(n) for n in row["seq_lengths"])][:-1]
    elif wrapped_at:
        starts = _occurrences(wrapped_at, ids)
        whole = len(ids) - len(wrapped_at)  # a conversation may be cut inside its prefix at the end of the row
        if system_open and any(i <= whole and i not in starts for i in _occurrences(system_open, ids)):
            raise ValueError(
                "`packing_strategy: wrapped` loses where conversations begin, and some of these begin with a system prompt of "
                "their own: their prefixes would not be held. Use `packing_strategy: bfd`."
            )
    else:
        starts = [0] if positions is None else [new for new, old in enumerate(keep) if int(positions[old]) == 0]
    for a, b in pairwise([*starts, len(ids)]):
        if b > a:
            yield ids[a:b]


def _occurrences(needle: Sequence[int], ids: list[int]) -> list[int]:
    n = len(needle)
    return [i for i in range(len(ids)) if tuple(ids[i : i + n]) == tuple(needle)]
