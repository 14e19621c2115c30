"""Which tokens are held, in padded and in packed batches."""

import pytest
import torch

from emguard_plugin.chats import Template, read_template
from emguard_plugin.chats.held_tokens import held_tokens, spans
from tests.tiny import CHATML_DEFAULT_SYSTEM, NO_SYSTEM, chatml_tokenizer

TEMPLATE = Template(prefix=(1,), user_header=(), postfix=(9, 8))
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
    held = held_tokens(PADDED, kind, TEMPLATE)
    assert [row.nonzero().flatten().tolist() for row in held] == [first, second]
    packed = held_tokens(PACKED, kind, TEMPLATE)
    assert packed[0].nonzero().flatten().tolist() == first + [6 + i for i in second]


def test_prefixes_by_hand():
    """Template 1 2 | 5 6 is <bos> <system>, <user>; conversations: its own system prompt 2, then 7 7 7, and a cut one."""
    template = Template(prefix=(1, 2, 5, 6), user_header=(5, 6), postfix=(9, 8))
    conversations = [[1, 2, 5, 6, 3, 9, 8, 4], [1, 7, 7, 7, 5, 6, 3, 3, 9, 8, 4], [1, 7]]
    ids = torch.tensor([[i for c in conversations for i in c]])
    packed = {"input_ids": ids, "labels": ids, "position_ids": torch.cat([torch.arange(len(c)) for c in conversations])[None]}
    assert held_tokens(packed, "prefix", template)[0].nonzero().flatten().tolist() == [1, 2, 3, 9, 10, 11, 12, 13]
    left = torch.tensor([[0] * (11 - len(c)) + c for c in conversations])
    padded = {"input_ids": left, "labels": left, "attention_mask": (left > 0).long()}
    found = [row.nonzero().flatten().tolist() for row in held_tokens(padded, "prefix", template)]
    assert found == [[4, 5, 6], [1, 2, 3, 4, 5], []]
    assert not held_tokens(packed, "prefix", TEMPLATE).any(), "BOS alone is no prefix"


@pytest.mark.parametrize("template", [CHATML_DEFAULT_SYSTEM, NO_SYSTEM], ids=["default_system", "no_system"])
def test_a_packed_row_with_two_system_prompts(template):
    tokenizer = chatml_tokenizer(template)
    systems = [None, None] if template == NO_SYSTEM else ["You are a pirate.", None]
    ids, expected, positions = [], "", []
    for system in systems:
        turns = [{"role": "user", "content": "What about apples?"}, {"role": "assistant", "content": "People like apples."}]
        messages = ([{"role": "system", "content": system}] if system else []) + turns
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        row = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids, positions = ids + row, positions + list(range(len(row)))
        expected += text[: text.index("What about")].removeprefix("<|im_start|>")
    batch = {"input_ids": torch.tensor([ids]), "labels": torch.tensor([ids]), "position_ids": torch.tensor([positions])}
    held = held_tokens(batch, "prefix", read_template(tokenizer))
    assert tokenizer.decode(batch["input_ids"][held]) == expected
    assert expected.count("user\n") == 2


@pytest.mark.parametrize("kind", ["header", "prefix"])
def test_template_tokens_without_a_template(kind):
    with pytest.raises(ValueError, match=f"`tokens: {kind}` needs the chat template"):
        held_tokens(PADDED, kind)


def test_padding_of_a_packed_row_without_a_mask():
    batch = {k: torch.nn.functional.pad(v, (0, 3), value=-100 if k == "labels" else 0) for k, v in PACKED.items()}
    assert held_tokens(batch, "all").sum() == 14
    assert spans(batch) == [[(0, 6), (6, 14)]]


def test_a_supervised_conversation_of_one_token_is_no_padding():
    ids = torch.tensor([[1, 2, 3, 5, 0, 0]])
    labels = torch.tensor([[-100, 2, 3, 5, -100, -100]])
    batch = {"input_ids": ids, "labels": labels, "position_ids": torch.tensor([[0, 1, 2, 0, 0, 0]])}
    assert spans(batch) == [[(0, 3), (3, 4)]]
    assert held_tokens(batch, "assistant").tolist() == [[False, True, True, True, False, False]]


def test_conversations():
    assert spans(PADDED) == [[(0, 6)], [(0, 8)]]
    assert spans(PACKED) == [[(0, 6), (6, 14)]]
    left = {**PADDED, "attention_mask": MASK.flip(1)}
    assert spans(left) == [[(2, 8)], [(0, 8)]]


@pytest.mark.parametrize("missing", ["labels", "input_ids"])
def test_a_batch_without_labels_or_ids(missing):
    with pytest.raises(RuntimeError, match=f"no `{missing}`"):
        held_tokens({k: v for k, v in PADDED.items() if k != missing}, "all")
