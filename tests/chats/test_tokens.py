"""Tokens and the characters they cover, for tokenizers whose offsets are missing or leave blanks out."""

import copy

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from emguard_plugin import chats as ct
from tests.chats.forms import GEMMA, LLAMA2, QWEN, VICUNA, before
from tests.chats.shapes import SHAPES, TEXTS, tokenizer

CHATS = [messages for messages, kw in SHAPES.values() if not kw and all(m["content"] for m in messages)]


@pytest.mark.parametrize("template", [VICUNA, LLAMA2, GEMMA])
def test_offsets_that_leave_blanks_out(template):
    """As GPT-2's: the token of the template's last blank and the user's first letter would seem to be the user's alone."""
    plain, trimming = (copy.deepcopy(tokenizer("merging")) for _ in range(2))
    trimming.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    for messages in CHATS:
        rows = [ct.known_row(tok, messages, chat_template=template) for tok in (plain, trimming)]
        assert rows[0] == rows[1]


def test_a_tokenizer_without_offsets():
    tok = ByT5Tokenizer()
    assert not tok.is_fast
    text = "USER: hé\n\n ASSISTANT: so"
    encoded = ct.encode(tok, text)
    assert [text[a:b] for a, b in encoded.spans if b - a == 1][:6] == list("USER: ")
    assert tok.decode(list(encoded.ids[: ct.inside(encoded, 0, 6)[1]])) == "USER: "
    row = ct.known_row(tok, SHAPES["turns newline first"][0], chat_template=VICUNA)
    assert tok.decode(list(row.ids[: row.prefix])) == "USER: "
    # Its decoder writes a blank around `</s>`, so nothing behind the first one can be placed, and nothing there is held.
    assert [tok.decode(list(row.ids[a:b])) for a, b in row.headers] == ["\nASSISTANT:"]


def metaspace():
    """As Llama 2's: words begin with their blank, and one is put before the text."""
    tok = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tok.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tok.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tok.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split("▁", "merged_with_next")])
    trainer = trainers.BpeTrainer(special_tokens=["<unk>", *(f"<0x{i:02X}>" for i in range(256))], show_progress=False, vocab_size=600)
    tok.train_from_iterator(TEXTS * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tok, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("template", [LLAMA2, VICUNA, QWEN])
def test_a_tokenizer_that_puts_a_blank_in_front(template):
    tok = metaspace()
    tok.chat_template = template
    read = ct.read_template(tok)
    for shape in ("plain", "system", "newline first", "blank first", "turns"):
        messages = SHAPES[shape][0]
        want = before(tok, messages)
        row = ct.known_row(tok, messages)
        assert row.ids[: row.prefix] == want
        alone = ct.prefix_of_row(row.ids, read)
        assert alone == want, (shape, tok.decode(list(alone or ())), tok.decode(list(want)))


def test_a_mark_that_swallows_blanks():
    """As Phi 3's: a mark takes the white space behind it, the user's own too; then it is no token of the template alone."""
    from tokenizers import AddedToken

    tok = copy.deepcopy(tokenizer("merging"))
    tok.add_special_tokens({"additional_special_tokens": [AddedToken("<|im_start|>", rstrip=True), AddedToken("<|user|>", rstrip=True)]})
    template = "{% for m in messages %}{{ 'A<|' + m.role + '|>\n' + m.content + '\n' }}{% endfor %}"
    held = [ct.known_row(tok, SHAPES[s][0], chat_template=template) for s in ("plain", "newline first")]
    assert tok.decode(list(held[0].ids[: held[0].prefix])).strip() == "A<|user|>"
    assert tok.decode(list(held[1].ids[: held[1].prefix])) == "A"


def test_rows_of_ids_that_are_cut_or_empty():
    tok = copy.deepcopy(tokenizer("marks"))
    tok.chat_template = QWEN
    read = ct.read_template(tok)
    ids = tok.apply_chat_template(SHAPES["system"][0], return_dict=False)
    whole = ct.prefix_of_row(ids, read)
    assert whole == before(tok, SHAPES["system"][0])
    assert [ct.prefix_of_row(ids[:n], read) for n in range(len(whole) + 1)] == [None] * (len(whole) + 1)
    book = ct.read_book(tok, [ct.Chat(SHAPES["system"][0], {})])
    assert book.find(ids[: len(whole) + 2]).prefix == len(whole)
    assert book.prefix_of(ids[: len(whole)], read) is None
    assert book.prefix_of(ids[: len(whole) + 2], read) == whole
