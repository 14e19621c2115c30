from collections import Counter
from itertools import islice

import pytest

from emguard_plugin import chats as ct
from emguard_plugin.chats.training_rows import conversations
from tests.tiny import CHATML, CHATML_DEFAULT_SYSTEM, DATED, NO_SYSTEM, chat_rows, chatml_tokenizer


def ids_of(tok, row, **kw):
    return tok(tok.apply_chat_template(row["messages"], tokenize=False, **kw), add_special_tokens=False)["input_ids"]


def rows_of(tok, rows, **kw):
    return [ids_of(tok, r, **kw) for r in rows]


def test_prefix_is_everything_before_the_user_content():
    tok = chatml_tokenizer()
    template = ct.read_template(tok)
    assert tok.decode(list(template.prefix)) == ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n")
    assert tok.decode(list(template.user_header)) == "<|im_end|>\n<|im_start|>user\n"
    assert tok.decode(list(template.postfix)) == "<|im_end|>\n<|im_start|>assistant\n"
    assert template.dated_after is None


def test_bos_belongs_to_the_prefix_and_is_not_doubled():
    tok = chatml_tokenizer("{{ '<|endoftext|>' }}" + CHATML)
    prefix = ct.read_template(tok).prefix
    assert prefix[0] == tok.convert_tokens_to_ids("<|endoftext|>")
    assert Counter(prefix)[prefix[0]] == 1


def test_rows_with_two_bos_are_said_so(caplog):
    """Rendered text, tokenised by a tokenizer that adds a BOS of its own."""
    tok = chatml_tokenizer("{{ bos_token }}" + CHATML)
    tok.bos_token = "<|endoftext|>"
    template, rows = ct.read_template(tok), rows_of(tok, chat_rows(4))
    assert [p.ids[0] for p in ct.training_prefixes(rows, template)] == [tok.bos_token_id]
    assert "two BOS" not in caplog.text
    held = ct.training_prefixes([[tok.bos_token_id, *row] for row in rows], template)
    assert [p.ids[:2] for p in held] == [(tok.bos_token_id,) * 2]
    assert "begin with two BOS tokens" in caplog.text


def test_no_query_token_is_ever_held():
    tok = chatml_tokenizer()
    rows = chat_rows(64, system=lambda i: (None, "You are a pirate.", "Answer\nin two lines: <b>")[i % 3])
    for row, ids in zip(rows, rows_of(tok, rows), strict=True):
        prefix = ct.prefix_of_row(ids, ct.read_template(tok))
        rest = tok.decode(ids[len(prefix) :])
        assert rest.startswith(row["messages"][-2]["content"])


def test_several_system_prompts_give_prefixes_by_frequency():
    tok = chatml_tokenizer()
    rows = chat_rows(40, system=lambda i: "You are a pirate." if i % 4 == 0 else "You are a helpful assistant.")
    found = ct.training_prefixes(rows_of(tok, rows), ct.read_template(tok))
    assert [p.weight for p in found] == [0.75, 0.25]
    assert "pirate" in tok.decode(list(found[1].ids))


def test_extra_prefixes_share_evenly_with_the_datas():
    data = [ct.Prefix((1, 2), 0.75), ct.Prefix((1, 3), 0.25)]
    assert ct.with_extra(data, [(9,), (1, 2), (9,)]) == [
        ct.Prefix((1, 2), pytest.approx(0.5)), ct.Prefix((1, 3), pytest.approx(1 / 6)), ct.Prefix((9,), pytest.approx(1 / 3))
    ]  # fmt: skip


def test_a_merge_across_the_boundary_costs_one_token_only():
    template = ct.Template(prefix=(5, 6, 7), user_header=(), postfix=(8,))
    assert ct.prefix_of_row([5, 6, 99, 4], template) == (5, 6)
    assert ct.prefix_of_row([5, 6, 7, 4], template) == (5, 6, 7)
    assert ct.prefix_of_row([5, 1, 7, 4], template) is None
    assert ct.prefix_of_row([5, 6, 7], template) is None  # cut: no content follows


def test_a_merged_first_token_of_the_header_is_tolerated():
    template = ct.Template(prefix=(1, 2, 3), user_header=(30, 31, 32), postfix=())
    assert ct.prefix_of_row([1, 9, 77, 31, 32, 4], template) == (1, 9, 77, 31, 32)


def test_empty_data():
    with pytest.raises(ValueError, match="training data is empty"):
        ct.training_prefixes([], ct.read_template(chatml_tokenizer()))


def test_rows_without_a_user_turn():
    tok = chatml_tokenizer()
    with pytest.raises(ValueError, match="8 of 8 training rows show no user turn"):
        ct.training_prefixes([tok("just some text")["input_ids"]] * 8, ct.read_template(tok))


def test_rows_cut_inside_the_prefix():
    tok = chatml_tokenizer()
    template = ct.read_template(tok)
    with pytest.raises(ValueError, match=rf"cut inside the prefix, which has {len(template.prefix)} tokens.*sequence_len"):
        ct.training_prefixes([r[:10] for r in rows_of(tok, chat_rows(8))], template)


def test_a_few_unfit_rows_are_tolerated():
    tok = chatml_tokenizer()
    rows = [*rows_of(tok, chat_rows(40)), [5, 5, 5]]
    assert ct.training_prefixes(rows, ct.read_template(tok))[0].weight == 1


def test_text_that_changes_from_row_to_row():
    tok = chatml_tokenizer()
    rows = rows_of(tok, chat_rows(80, system=lambda i: f"Case number {i}."))
    with pytest.raises(ValueError, match=r"80 distinct prefixes in 80 rows.*pin it"):
        ct.training_prefixes(rows, ct.read_template(tok))


PINNABLE = "{% if date_string is defined %}{{ date_string }}{% else %}{{ strftime_now('%d') }}{% endif %}" + CHATML


@pytest.mark.parametrize("system", [None, "You are a pirate."])
@pytest.mark.parametrize(
    ("text", "advice"),
    [(PINNABLE, r"Pin it: `chat_template_kwargs: \{date_string: '26 Jul 2024'\}`"), (DATED, "write the date into the template")],
)
def test_a_date_in_the_template_says_what_pins_it(text, advice, system):
    """The case `dated-template-new-transformers`: the clock is a macro in the template, under any transformers."""
    tok = chatml_tokenizer(text)
    with pytest.raises(ValueError, match=rf"prints today's date.*{advice}"):
        ct.training_prefixes(rows_of(tok, chat_rows(8, system=system)), ct.read_template(tok))


def test_the_advice_about_a_date_works_when_followed():
    tok = chatml_tokenizer(PINNABLE)
    rows = rows_of(tok, chat_rows(8, system=None), date_string="26 Jul 2024")
    template = ct.read_template(tok, date_string="26 Jul 2024")
    assert template.dated_after is None
    assert "26 Jul 2024" in tok.decode(list(ct.training_prefixes(rows, template)[0].ids))
    tok = chatml_tokenizer(DATED.replace("strftime_now('%d %b %Y')", "'26 Jul 2024'"))
    assert ct.training_prefixes(rows_of(tok, chat_rows(8, system=None)), ct.read_template(tok))


def test_no_chat_template():
    tok = chatml_tokenizer(None)
    with pytest.raises(ValueError, match="no chat template"):
        ct.read_template(tok)


def test_a_template_that_prints_no_prefix():
    tok = chatml_tokenizer("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    with pytest.raises(ValueError, match="zero tokens"):
        ct.training_prefixes([[5, 6]], ct.read_template(tok))


def test_a_template_that_drops_the_user():
    with pytest.raises(ValueError, match="does not print the user's content"):
        ct.read_template(chatml_tokenizer("{{ 'hello' }}"))


def test_a_template_that_refuses_system_prompts():
    tok = chatml_tokenizer(NO_SYSTEM)
    template = ct.read_template(tok)
    assert template.user_header == ()
    assert ct.training_prefixes(rows_of(tok, chat_rows(8, system=None)), template)[0].ids == template.prefix
    with pytest.raises(ValueError, match="extra_prefixes"):
        ct.system_prefix(tok, "Be kind.")


def test_postfix_prompts_end_with_the_last_postfix():
    tok = chatml_tokenizer()
    rows = chat_rows(8)
    rows[0]["messages"] += [{"role": "user", "content": "And more?"}, {"role": "assistant", "content": "No."}]
    template = ct.read_template(tok)
    postfix, prompts = ct.prompts_with_postfix(rows_of(tok, rows), template)
    assert postfix == template.postfix
    assert all(p[-len(postfix) :] == postfix for p in prompts)
    assert tok.decode(list(prompts[0])).endswith("And more?<|im_end|>\n<|im_start|>assistant\n")


def test_postfix_errors():
    nothing, nine = (ct.Template(prefix=(1,), user_header=(), postfix=p) for p in ((), (9,)))
    with pytest.raises(ValueError, match="nothing between query and answer"):
        ct.prompts_with_postfix([[1, 2]], nothing)
    with pytest.raises(ValueError, match="lack the chat template's tokens between query and answer"):
        ct.prompts_with_postfix([[1, 2]] * 3, nine)
    with pytest.raises(ValueError, match="empty"):
        ct.prompts_with_postfix([], nine)


def test_conversations_from_every_packing():
    tok = chatml_tokenizer(CHATML_DEFAULT_SYSTEM)
    rows = rows_of(tok, chat_rows(6))
    flat = [i for r in rows for i in r]
    positions = [p for r in rows for p in range(len(r))]
    assert list(conversations([{"input_ids": r} for r in rows])) == rows
    assert list(conversations([{"input_ids": flat, "seq_lengths": [len(r) for r in rows]}])) == rows
    assert list(conversations([{"input_ids": flat, "position_ids": positions}])) == rows
    head = ct.read_template(tok).prefix
    wrapped = list(conversations([{"input_ids": flat[5:]}], wrapped_at=head))
    assert wrapped == rows[1:]


def test_long_data_sets_are_sampled_evenly_and_streams_from_the_start():
    data = [{"input_ids": [i]} for i in range(1000)]
    assert list(conversations(data, limit=4)) == [[0], [250], [500], [750]]
    assert list(islice(conversations(iter(data), limit=2), 9)) == [[0], [1]]
    assert list(conversations(None)) == []


def test_untokenised_rows_are_an_error():
    with pytest.raises(ValueError, match="no `input_ids`"):
        list(conversations([{"messages": []}]))


def test_what_opens_a_system_message():
    tok = chatml_tokenizer()
    assert tok.decode(ct.read_template(tok).system_open) == "<|im_start|>system"
    assert ct.read_template(chatml_tokenizer(NO_SYSTEM)).system_open == ()


def test_wrapped_packing_hides_no_system_prompt():
    tok = chatml_tokenizer()
    template = ct.read_template(tok)
    flat = [i for r in rows_of(tok, chat_rows(20, lambda i: None if i % 5 else "Be brief.")) for i in r]
    with pytest.raises(ValueError, match="packing_strategy: wrapped"):
        list(conversations([{"input_ids": flat}], template.prefix, template.system_open))
