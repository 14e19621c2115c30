from itertools import pairwise

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from hypothesis import given, settings
from hypothesis import strategies as st

from emguard_plugin.chats.training_rows import MAX_ROWS, conversations

OPEN = (7, 8)
CHATS = st.lists(st.lists(st.integers(10, 99), min_size=1, max_size=9).map(lambda body: [*OPEN, *body]), max_size=12)
FORMATS = {"lists": list, "numpy": np.array, "torch": torch.tensor}


def flat(rows):
    return [i for r in rows for i in r]


def restarting(rows):
    return [p for r in rows for p in range(len(r))]


def openings(row):
    return [i for i in range(len(row)) if tuple(row[i : i + 2]) == OPEN]


def chunks(row, cuts):
    """Cut a packed row into several, at any place."""
    edges = sorted({0, len(row), *(c % (len(row) + 1) for c in cuts)})
    return [row[a:b] for a, b in pairwise(edges)]


@settings(max_examples=60, deadline=None)
@given(chats=CHATS, split=st.integers(0, 12), kind=st.sampled_from(sorted(FORMATS)))
def test_packing_is_undone(chats, split, kind):
    make, packs = FORMATS[kind], [p for p in (chats[:split], chats[split:]) if p]
    by_length = [{"input_ids": make(flat(p)), "seq_lengths": make([len(c) for c in p])} for p in packs]
    by_position = [{"input_ids": make(flat(p)), "position_ids": make(restarting(p))} for p in packs]
    assert list(conversations(by_length)) == list(conversations(by_position)) == chats
    assert list(conversations([{"input_ids": make(c)} for c in chats])) == chats


@settings(max_examples=60, deadline=None)
@given(chats=CHATS, cuts=st.lists(st.integers(0, 200), max_size=3))
def test_wrapped_chunks_are_cut_where_conversations_begin(chats, cuts):
    for chunk in chunks(flat(chats), cuts):
        found = list(conversations([{"input_ids": chunk}], wrapped_at=OPEN))
        assert [openings(f) for f in found] == [[0]] * len(found)
        kept = sum(map(len, found))
        assert chunk[len(chunk) - kept :] == flat(found)
        assert openings(chunk[: len(chunk) - kept]) == []


@settings(max_examples=60, deadline=None)
@given(chats=CHATS, left=st.integers(0, 4), right=st.integers(0, 4), kind=st.sampled_from(sorted(FORMATS)))
def test_padding_is_dropped(chats, left, right, kind):
    make, body, pad = FORMATS[kind], flat(chats), 0
    row = {
        "input_ids": make([pad] * left + body + [pad] * right),
        "attention_mask": make([0] * left + [1] * len(body) + [0] * right),
    }
    assert list(conversations([row])) == ([body] if body else [])
    row["position_ids"] = make([0] * left + restarting(chats) + [0] * right)
    assert list(conversations([row])) == chats


def test_numbered_attention_masks_keep_every_token():
    """Axolotl numbers the conversations of a packed row."""
    row = {"input_ids": [7, 8, 9, 7, 8], "attention_mask": [1, 1, 1, 2, 2], "position_ids": [0, 1, 2, 0, 1]}
    assert list(conversations([row])) == [[7, 8, 9], [7, 8]]


def test_the_end_of_an_earlier_conversation_is_dropped():
    row = {"input_ids": [5, 6, 7, 8, 9], "position_ids": [3, 4, 0, 1, 2]}
    assert list(conversations([row])) == [[7, 8, 9]]


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
def test_what_trl_packs(strategy):
    from trl import pack_dataset

    chats = [[*OPEN, *range(10 + i, 13 + i + i % 5)] for i in range(40)]
    packed = pack_dataset(Dataset.from_dict({"input_ids": chats}), 16, strategy)
    assert len(packed) < len(chats)
    found = list(conversations(packed, wrapped_at=OPEN if strategy == "wrapped" else None))
    if strategy != "wrapped":
        assert sorted(found) == sorted(chats)
    else:  # one conversation per chunk may lack its end or be lost, and another may drag half an opening along
        assert [openings(f) for f in found] == [[0]] * len(found)
        assert sum(f in chats for f in found) >= len(chats) - 2 * len(packed)


def test_data_sets_of_every_kind():
    rows = [{"input_ids": [*OPEN, i]} for i in range(6)]
    expected = [r["input_ids"] for r in rows]
    plain = Dataset.from_list(rows)
    stream = IterableDataset.from_generator(lambda: iter(rows))
    for dataset in (rows, tuple(rows), plain, plain.with_format("torch"), plain.with_format("numpy"), stream):
        assert list(conversations(dataset)) == expected
    assert next(iter(stream))["input_ids"] == expected[0], "the trainer still gets the first row"


def test_a_stream_is_read_to_the_limit_only():
    taken = []

    def rows():
        for i in range(10**9):
            taken.append(i)
            yield {"input_ids": [i]}

    assert len(list(conversations(IterableDataset.from_generator(rows)))) == MAX_ROWS
    assert len(taken) <= MAX_ROWS + 1


@settings(max_examples=40, deadline=None)
@given(n=st.integers(0, 300), limit=st.integers(1, 300))
def test_samples_are_spread_evenly(n, limit):
    found = [row[0] for row in conversations([{"input_ids": [i]} for i in range(n)], limit=limit)]
    assert len(found) == min(n, limit)
    assert found == sorted(set(found))
    gaps = [b - a for a, b in pairwise([*found, n])]
    assert not found or (found[0] == 0 and max(gaps) - min(gaps) <= 1)


@pytest.mark.parametrize("row", [{"input_ids": []}, {"input_ids": [], "position_ids": []}, {"input_ids": [], "seq_lengths": []}])
def test_empty_rows_hold_nothing(row):
    assert list(conversations([row])) == []


def test_a_template_without_a_prefix_cuts_no_wrapped_row():
    assert list(conversations([{"input_ids": [5, 6]}], wrapped_at=())) == [[5, 6]]


def test_later_rows_without_ids_are_an_error_too():
    with pytest.raises(ValueError, match=r"rows have \['text'\] but no `input_ids`.*skip_prepare_dataset"):
        list(conversations([{"input_ids": [1]}, {"text": "x"}]))


def test_wrapped_chunks_with_another_system_prompt_are_refused():
    default, other = [7, 8, 20, 30], [7, 9, 21, 30]
    row = {"input_ids": [*default, *default, 7]}
    assert list(conversations([row], wrapped_at=(7, 8, 20), system_open=(7,))) == [default, [*default, 7]]
    with pytest.raises(ValueError, match="packing_strategy: bfd"):
        list(conversations([{"input_ids": [*default, *other]}], wrapped_at=(7, 8, 20), system_open=(7,)))
