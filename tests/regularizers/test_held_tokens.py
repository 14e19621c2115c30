"""Which tokens are held, in padded and in packed batches."""

import pytest
import torch

from emguard_plugin.regularizers.held_tokens import held_tokens, occurrences, spans

IDS = torch.tensor([[1, 2, 9, 8, 3, 4, 0, 0], [1, 5, 6, 9, 8, 7, 7, 7]])
LABELS = torch.tensor([[-100, -100, -100, -100, 3, 4, -100, -100], [-100] * 5 + [7, 7, 7]])
MASK = torch.tensor([[1] * 6 + [0, 0], [1] * 8])
PADDED = {"input_ids": IDS, "labels": LABELS, "attention_mask": MASK}
PACKED = {
    "input_ids": torch.cat([IDS[0, :6], IDS[1]])[None],
    "labels": torch.cat([LABELS[0, :6], LABELS[1]])[None],
    "position_ids": torch.cat([torch.arange(6), torch.arange(8)])[None],
}


@pytest.mark.parametrize(
    ("kind", "first", "second"),
    [
        ("assistant", [4, 5], [5, 6, 7]),
        ("prompt", [0, 1, 2, 3], [0, 1, 2, 3, 4]),
        ("all", [0, 1, 2, 3, 4, 5], list(range(8))),
        ("header", [2, 3], [3, 4]),
    ],
)
def test_padded_and_packed(kind, first, second):
    held = held_tokens(PADDED, kind, (9, 8))
    assert [row.nonzero().flatten().tolist() for row in held] == [first, second]
    packed = held_tokens(PACKED, kind, (9, 8))
    assert packed[0].nonzero().flatten().tolist() == first + [6 + i for i in second]


def test_padding_of_a_packed_row_without_a_mask():
    batch = {k: torch.nn.functional.pad(v, (0, 3), value=-100 if k == "labels" else 0) for k, v in PACKED.items()}
    assert held_tokens(batch, "all").sum() == 14
    assert spans(batch) == [[(0, 6), (6, 14)]]


def test_conversations():
    assert spans(PADDED) == [[(0, 6)], [(0, 8)]]
    assert spans(PACKED) == [[(0, 6), (6, 14)]]
    left = {**PADDED, "attention_mask": MASK.flip(1)}
    assert spans(left) == [[(2, 8)], [(0, 8)]]


def test_occurrences():
    ids = torch.tensor([[9, 8, 9, 8, 1, 9]])
    assert occurrences(ids, (9, 8)).tolist() == [[True, True, True, True, False, False]]
    assert not occurrences(ids, (9,) * 7).any()
    assert not occurrences(ids, ()).any()


@pytest.mark.parametrize("missing", ["labels", "input_ids"])
def test_a_batch_without_labels_or_ids(missing):
    with pytest.raises(RuntimeError, match=f"no `{missing}`"):
        held_tokens({k: v for k, v in PADDED.items() if k != missing}, "all")
