"""Conversations, as token ids, out of whatever training set a host has prepared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, islice, pairwise
from typing import Any

import numpy as np

MAX_ROWS = 2000
"""Enough to estimate the frequency of each prefix to about a percent."""
IGNORE = -100


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
    for row in _rows(dataset, limit):
        yield from _split(row, wrapped_at, system_open)


def supervised_conversations(
    dataset: Any, wrapped_at: Sequence[int] | None = None, limit: int = MAX_ROWS
) -> Iterator[tuple[list[int], list[bool]]]:
    """Yield (ids, whether the host's loss predicts each id) for the conversations that `conversations` yields.

    Raises:
        ValueError: when rows have no `input_ids` or no `labels`.
    """
    for row in _rows(dataset, limit):
        if "labels" not in row:
            raise ValueError(f"the training rows have {sorted(row)} but no `labels`, so replies cannot be told from prompts.")
        rows = (_split(row, wrapped_at, column=column) for column in ("input_ids", "labels"))
        for ids, labels in zip(*rows, strict=True):
            yield ids, [x != IGNORE for x in labels]


def labelled_conversations(
    dataset: Any, limit: int = MAX_ROWS, wrapped_at: Sequence[int] | None = None, system_open: Sequence[int] = ()
) -> Iterator[tuple[list[int], list[int] | None]]:
    """Yield (ids, labels) of what `conversations` yields; labels are None where the host makes them only when it collates.

    Raises:
        ValueError: as `conversations`.
    """
    for row in _rows(dataset, limit):
        if row.get("labels") is None:
            yield from ((ids, None) for ids in _split(row, wrapped_at, system_open))
        else:
            yield from zip(*(_split(row, wrapped_at, system_open, name) for name in ("input_ids", "labels")), strict=True)


def labels_in_stream(dataset: Any, rows: Sequence[Sequence[int]]) -> list[list[int] | None]:
    """Return the labels of conversations that TRL's `packing_strategy: wrapped` joined into one stream, in their order.

    None for one that is not there, and for all where the host makes labels only when it collates.
    """
    packed = list(_rows(dataset, MAX_ROWS))
    if not packed or packed[0].get("labels") is None:
        return [None] * len(rows)
    ids, labels = (np.concatenate([np.asarray(row[name], dtype=np.int32) for row in packed]) for name in ("input_ids", "labels"))
    stream, found, begin = ids.tobytes(), [], 0
    for row in rows:
        needle, at = np.asarray(row, dtype=np.int32).tobytes(), begin
        while (at := stream.find(needle, at)) > 0 and at % 4:
            at += 1
        found.append(None if at < 0 else labels[at // 4 : at // 4 + len(row)].tolist())
        begin = begin if at < 0 else at + len(needle)
    return found


def supervised(labels: Sequence[int] | None) -> list[bool] | None:
    """Return per token whether the loss predicts it; None where that is not known."""
    return None if labels is None else [x != IGNORE for x in labels]


def mean_row_tokens(dataset: Any, limit: int = MAX_ROWS) -> float:
    """Return the mean number of tokens of a row; 0 without a data set.

    Raises:
        ValueError: when rows have no `input_ids`.
    """
    lengths = [len(row["input_ids"]) for row in _rows(dataset, limit)]
    return sum(lengths) / max(len(lengths), 1)


def spread(dataset: Any, limit: int = MAX_ROWS) -> Iterator[Any]:
    """Yield up to `limit` rows, evenly spread over a data set, or the first ones of a stream."""
    if dataset is None:
        return
    if hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__"):
        n = len(dataset)
        yield from (dataset[i * n // min(n, limit)] for i in range(min(n, limit)))
    else:
        yield from islice(iter(dataset), limit)


COLUMNS = ("input_ids", "labels", "attention_mask", "position_ids", "seq_lengths")
"""Of a row, what tells of its ids, its conversations and its loss."""


def sample(dataset: Any, limit: int = MAX_ROWS) -> list[dict[str, Any]]:
    """Return up to `limit` rows, evenly spread, of each what tells of its ids: a data set to read again without another walk.

    Raises:
        ValueError: when rows have no `input_ids`.
    """
    return [{name: row[name] for name in COLUMNS if name in row} for row in _rows(dataset, limit)]


def _rows(dataset: Any, limit: int) -> Iterator[Any]:
    for row in spread(dataset, limit):
        if "input_ids" not in row:
            raise ValueError(
                f"the training rows have {sorted(row)} but no `input_ids`: emguard reads tokenised rows. "
                "Let the trainer prepare the data set (no `skip_prepare_dataset`)."
            )
        yield row


def _split(row: Any, wrapped_at: Sequence[int] | None, system_open: Sequence[int] = (), column: str = "input_ids") -> Iterator[list[int]]:
    """Yield the conversations of one row, as `column` has them."""
    mask, positions = row.get("attention_mask"), row.get("position_ids")
    keep = [i for i in range(len(row["input_ids"])) if mask is None or int(mask[i])]
    ids, values = ([int(row[name][i]) for i in keep] for name in ("input_ids", column))
    if row.get("seq_lengths") is not None:
        starts = [0, *accumulate(int(n) for n in row["seq_lengths"])][:-1]
    elif wrapped_at:
        starts = _occurrences(wrapped_at, ids)
        whole = len(ids) - len(wrapped_at)  # a conversation may be cut inside its prefix at the end of the row
        if system_open and any(i <= whole and i not in starts for i in _occurrences(tuple(system_open), ids)):
            raise ValueError(
                "`packing_strategy: wrapped` loses where conversations begin, and some of these begin with a system prompt of "
                "their own: their prefixes would not be held. Use `packing_strategy: bfd`."
            )
    else:
        starts = [0] if positions is None else [new for new, old in enumerate(keep) if int(positions[old]) == 0]
    for a, b in pairwise([*starts, len(ids)]):
        if b > a:
            yield values[a:b]


def _occurrences(needle: Sequence[int], ids: list[int]) -> list[int]:
    n = len(needle)
    return [i for i in range(len(ids)) if tuple(ids[i : i + n]) == tuple(needle)]
