"""Conversations, as token ids, out of whatever training set a host has prepared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, islice, pairwise
from typing import Any

MAX_ROWS = 2000
"""Enough to estimate the frequency of each prefix to about a percent."""
IGNORE = -100


def conversations(
    dataset: Any, wrapped_at: Sequence[int] | None = None, limit: int = MAX_ROWS
) -> Iterator[list[int]]:
    """Yield conversations out of up to `limit` rows, evenly spread over the data set.

    Packed rows are taken apart: by `seq_lengths` (TRL `bfd`), or by `position_ids` that restart (Axolotl).

    Args:
        dataset: A `datasets.Dataset`, `IterableDataset` or sequence of mappings with `input_ids`.
        wrapped_at: For TRL's `packing_strategy: wrapped`, whose rows keep no boundaries: the ids that open a
            conversation. Rows are cut at each occurrence, and what stands before the first one is dropped.
        limit: Most rows of the data set to read.

    Raises:
        ValueError: when rows have no `input_ids`.
    """
    for row in _sample(dataset, limit):
        ids = [int(i) for i in row["input_ids"]]
        for a, b in _bounds(row, ids, wrapped_at):
            yield ids[a:b]


def supervised_conversations(
    dataset: Any, wrapped_at: Sequence[int] | None = None, limit: int = MAX_ROWS
) -> Iterator[tuple[list[int], list[bool]]]:
    """Yield (ids, whether the host's loss predicts each id) for the conversations that `conversations` yields.

    Raises:
        ValueError: when rows have no `input_ids` or no `labels`.
    """
    for row in _sample(dataset, limit):
        if "labels" not in row:
            raise ValueError(f"the training rows have {sorted(row)} but no `labels`, so replies cannot be told from prompts.")
        ids, labels = [int(i) for i in row["input_ids"]], row["labels"]
        for a, b in _bounds(row, ids, wrapped_at):
            yield ids[a:b], [int(x) != IGNORE for x in labels[a:b]]


def mean_row_tokens(dataset: Any, limit: int = MAX_ROWS) -> float:
    """Return the mean number of tokens of a row; 0 without a data set.

    Raises:
        ValueError: when rows have no `input_ids`.
    """
    lengths = [len(row["input_ids"]) for row in _sample(dataset, limit)]
    return sum(lengths) / max(len(lengths), 1)


def _sample(dataset: Any, limit: int) -> Iterator[Any]:
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
                f"the training rows have {sorted(row)} but no `input_ids`: emguard reads tokenised rows. "
                "Let the trainer prepare the data set (no `skip_prepare_dataset`)."
            )
        yield row


def _bounds(row: Any, ids: Sequence[int], wrapped_at: Sequence[int] | None) -> Iterator[tuple[int, int]]:
    if row.get("seq_lengths") is not None:
        starts = [0, *accumulate(int(n) for n in row["seq_lengths"])][:-1]
    elif wrapped_at is not None:
        n = len(wrapped_at)
        starts = [i for i in range(len(ids)) if tuple(ids[i : i + n]) == tuple(wrapped_at)]
    else:
        starts = [i for i, p in enumerate(row.get("position_ids") or [0]) if int(p) == 0]
    for a, b in pairwise([*starts, len(ids)]):
        if b > a:
            yield a, b
