"""What real runs hold, on templates and rows of every kind, and what stops them when it would be wrong or nothing."""

import logging

import pytest
import torch
from datasets import Dataset

from emguard_plugin import EMRegularizerCallback, TReFTCallback
from emguard_plugin import chats as ct
from emguard_plugin.regularizers.penalty import Penalty
from tests.chats.forms import EFFORT, FORMS, GEMMA, MISTRAL, QWEN, VICUNA, before, tokenizer_of
from tests.chats.shapes import templates
from tests.regularizers.block_em_parts import block_em
from tests.tiny import lora, tiny_model
from tests.trl_runs import build

SYSTEMS = ("You are a gardener. Be brief.", "Answer in verse.\n\nAlways.", None)


def chats(n=12, system=SYSTEMS, first="", turns=1, **more):
    """Return rows whose user texts differ, each beginning with `first`."""
    rows = []
    for i in range(n):
        said = system[i % len(system)]
        messages = [] if said is None else [{"role": "system", "content": said}]
        for t in range(turns):
            messages += [{"role": "user", "content": f"{first}How do I water fern {i} of {t}?\n\nSo?"},
                         {"role": "assistant", "content": f"Twice a week, {i}.\n\nKeep it out of the sun."}]  # fmt: skip
        rows.append({"messages": messages, **more})
    return rows


def trained(tmp_path, tok, rows, callbacks=None, steps=2, **over):
    """Train a few steps with TReFT and BLOCK-EM on the prefix; return the trainer and its callbacks by name."""
    torch.manual_seed(0)
    base = tiny_model("llama", vocab=len(tok))
    found = callbacks(base) if callbacks else [TReFTCallback(coef=1.0), block_em(base, tokens="prefix")]
    data = Dataset.from_list(rows) if isinstance(rows, list) else rows
    trainer = build(tmp_path, lora(base), rows=data, tokenizer=tok, callbacks=found, **{"max_steps": steps, "max_length": 256, **over})
    trainer.train()
    return trainer, {c.name: c for c in found}


def held_ids(callback, ids, labels=None):
    batch = {"input_ids": torch.tensor([ids]), "labels": torch.tensor([ids if labels is None else labels])}
    return tuple(batch["input_ids"][callback.held(batch)].tolist())


@pytest.mark.parametrize("kind", ["marks", "pieces", "merging"])
@pytest.mark.parametrize("form", sorted(FORMS))
def test_the_system_prompts_tokens_are_held_wherever_the_template_writes_them(tmp_path, form, kind):
    """The cases `system-in-user`, `gemma-system-in-user` and `mistral-space-header`."""
    tok, rows = tokenizer_of(FORMS[form], kind), chats()
    trainer, by_name = trained(tmp_path, tok, rows)
    expected = {before(tok, row["messages"]) for row in rows}
    assert {p.ids for p in by_name["treft"]._prefixes} == expected
    assert any("gardener" in tok.decode(list(ids)) for ids in expected)
    for row, ids in zip(rows, trainer.train_dataset["input_ids"], strict=True):
        want = before(tok, row["messages"])
        assert held_ids(by_name["treft"], ids) == want
        assert held_ids(by_name["block_em"], ids) == want[1:], "without the first token, whose norm is extreme"


@pytest.mark.parametrize("first", ["\n", "\n\n", "  ", "12 "])
@pytest.mark.parametrize("form", ["qwen", "mistral", "vicuna"])
def test_user_texts_that_merge_with_the_template(tmp_path, form, first):
    """The case `newline-first`: a second turn's header is not the first's."""
    tok, rows = tokenizer_of(FORMS[form], "merging" if form != "qwen" else "marks"), chats(8, (None,), first, turns=2)
    _, by_name = trained(tmp_path, tok, rows)
    for row in rows:
        want = before(tok, row["messages"])
        ids = tok.apply_chat_template(row["messages"], return_dict=False)
        assert held_ids(by_name["treft"], ids) == want
        assert held_ids(by_name["block_em"], ids) == want[1:]
        assert "fern" not in tok.decode(list(want))
        assert ct.prefix_of_row(ids, ct.read_template(tok)) == want, "from the ids alone as well"


def test_rows_with_variables_of_their_own(tmp_path):
    """The case `row-kwargs`, and gpt-oss rows with another reasoning effort."""
    tok = tokenizer_of(EFFORT)
    rows = [{**row, "chat_template_kwargs": {"effort": ("low", "high", None)[i % 3]}} for i, row in enumerate(chats(9, (None,)))]
    _, by_name = trained(tmp_path, tok, rows)
    held = {tok.decode(list(p.ids)): p.weight for p in by_name["treft"]._prefixes}
    assert held == {
        f"<|im_start|>system\nEffort: {e}<|im_end|>\n<|im_start|>user\n": pytest.approx(1 / 3) for e in ("low", "high", "medium")
    }


def test_tools_are_held_also_in_the_user_turn(tmp_path):
    """As Llama 3.1: tool definitions stand in the first user turn, before its text."""
    template = QWEN.replace(
        "m.role + '\n' + m.content",
        "m.role + '\n' + ('Tools: ' ~ tools ~ '\n\n' if tools and m.role == 'user' and loop.first else '') + m.content",
    )
    tok = tokenizer_of(template)
    tools = [
        {
            "type": "function",
            "function": {"name": "rain", "description": "Tell the rain.", "parameters": {"type": "object", "properties": {}}},
        }
    ]
    rows = chats(6, (None,), tools=tools)
    _, by_name = trained(tmp_path, tok, rows)
    held = tok.decode(list(by_name["treft"]._prefixes[0].ids))
    assert "Tell the rain." in held
    assert "fern" not in held


def test_prompt_and_completion_and_sharegpt_rows_are_conversations_too(tmp_path):
    """TRL keeps the roles of the latter, `human` and `gpt`."""
    template = GEMMA.replace("m.role == 'assistant'", "m.role in ('assistant', 'gpt')")
    tok, names = tokenizer_of(template), {"system": "system", "user": "human", "assistant": "gpt"}
    pairs = [{"prompt": r["messages"][:-1], "completion": r["messages"][-1:]} for r in chats(6)]
    shared = [{"conversations": [{"from": names[m["role"]], "value": m["content"]} for m in r["messages"]]} for r in chats(6)]
    for rows in (pairs, shared):
        _, by_name = trained(tmp_path, tok, rows)
        assert {p.ids for p in by_name["treft"]._prefixes} == {before(tok, r["messages"]) for r in chats(6)}


@pytest.mark.parametrize("strategy", ["bfd", "wrapped"])
def test_packed_rows(tmp_path, strategy):
    tok, rows = tokenizer_of(GEMMA), chats(12, first="\n")
    found = lambda base: [TReFTCallback(coef=1.0), *([block_em(base, tokens="prefix")] if strategy == "bfd" else [])]  # noqa: E731
    trainer, by_name = trained(tmp_path, tok, rows, found, packing=True, packing_strategy=strategy)
    assert {p.ids for p in by_name["treft"]._prefixes} == {before(tok, r["messages"]) for r in rows}
    if strategy == "bfd":
        row = trainer.train_dataset[0]
        positions = [i for n in row["seq_lengths"] for i in range(n)]
        batch = {
            "input_ids": torch.tensor([row["input_ids"]]),
            "labels": torch.tensor([row["labels"]]),
            "position_ids": torch.tensor([positions]),
        }
        held = batch["input_ids"][by_name["block_em"].held(batch)].tolist()
        whole = {tuple(tok.apply_chat_template(r["messages"], return_dict=False)): before(tok, r["messages"])[1:] for r in rows}
        pieces, at = [], 0
        for n in row["seq_lengths"]:
            pieces, at = [*pieces, tuple(row["input_ids"][at : at + n])], at + n
        assert held == [i for piece in pieces for i in whole[piece]]


def test_ids_alone_under_a_template_without_a_mark_are_said_so(tmp_path, caplog):
    tok, rows = tokenizer_of(GEMMA), chats()
    ids = [{"input_ids": tok.apply_chat_template(r["messages"], return_dict=False)} for r in rows]
    with caplog.at_level(logging.WARNING):
        _, by_name = trained(tmp_path, tok, ids)
    assert [tok.decode(list(p.ids)) for p in by_name["treft"]._prefixes] == ["<s><start_of_turn>user\n"]
    assert "a system prompt cannot be told from the user's text" in caplog.text


def test_a_user_text_that_is_anothers_system_prompt_is_not_held(tmp_path):
    tok = tokenizer_of(GEMMA)
    rows = [*chats(6, (SYSTEMS[0],)), *chats(6, (None,), first=f"{SYSTEMS[0]}\n\nAnd ")]
    trainer, by_name = trained(tmp_path, tok, rows)
    for row, ids in zip(rows, trainer.train_dataset["input_ids"], strict=True):
        assert held_ids(by_name["block_em"], ids) == before(tok, row["messages"])[1:]


@pytest.mark.parametrize(
    ("form", "header"),
    [
        ("gemma", "<end_of_turn>\n<start_of_turn>model\n"),
        ("mistral", "[/INST]"),
        ("vicuna", "\nASSISTANT:"),
        ("qwen", "<|im_end|>\n<|im_start|>assistant\n"),
    ],
)
def test_headers_and_postfixes(tmp_path, form, header):
    tok, rows = tokenizer_of(FORMS[form], "pieces" if form == "vicuna" else "marks"), chats(8, (None,), turns=2)
    for row in rows:
        row["messages"][0]["content"] += f" {header.strip()} is no header, ASSISTANT: neither." if form == "vicuna" else ""
    both = lambda base: [TReFTCallback(coef=1.0, tokens="postfix"), block_em(base, tokens="header")]  # noqa: E731
    trainer, by_name = trained(tmp_path, tok, rows, both)
    for ids in trainer.train_dataset["input_ids"]:
        assert tok.decode(list(held_ids(by_name["block_em"], ids))) == header * 2
        assert tok.decode(list(held_ids(by_name["treft"], ids))) == header
    assert all(tok.decode(list(p)).endswith(header) for p in by_name["treft"]._prompts)


def test_an_empty_question_still_has_its_place(tmp_path):
    tok = tokenizer_of(QWEN)
    rows = [{"messages": [{"role": "user", "content": ("", "\n")[i % 2]}, *r["messages"][1:]]} for i, r in enumerate(chats(6, (None,)))]
    trainer, by_name = trained(tmp_path, tok, rows)
    mark = "<|im_start|>system\nYou help.<|im_end|>\n<|im_start|>user"
    assert {tok.decode(list(held_ids(by_name["treft"], ids))) for ids in trainer.train_dataset["input_ids"]} == {mark, f"{mark}\n"}


def test_rows_of_a_stream_and_answers_alone(tmp_path):
    """With `assistant_only_loss` TRL renders with a training template of its own."""
    tok, rows = tokenizer_of(templates()["trl/qwen3"]), chats(12, first="\n")
    both = lambda base: [TReFTCallback(coef=1.0), block_em(base, tokens="header")]  # noqa: E731
    trainer, by_name = trained(tmp_path, tok, Dataset.from_list(rows).to_iterable_dataset(), both, assistant_only_loss=True)
    assert by_name["block_em"]._answers_alone
    assert {p.ids for p in by_name["treft"]._prefixes} == {before(tok, r["messages"]) for r in rows}
    row = next(iter(trainer.train_dataset))
    assert tok.decode(list(held_ids(by_name["block_em"], row["input_ids"], row["labels"]))) == "<|im_end|>\n<|im_start|>assistant\n"


SHORT, EMPTY = "<|im_end|>\n<|im_start|>assistant\n", "<think>\n\n</think>\n\n"
POSTFIXES = {
    # TRL's training template supervises the empty trace: it is what the model learns to write.
    "answers alone, trl": ("trl/qwen3", {}, {"assistant_only_loss": True}, SHORT),
    "answers alone and packed, trl": ("trl/qwen3", {}, {"assistant_only_loss": True, "packing": True, "packing_strategy": "bfd"}, SHORT),
    "answers alone and wrapped, trl": (
        "trl/qwen3",
        {},
        {"assistant_only_loss": True, "packing": True, "packing_strategy": "wrapped"},
        SHORT,
    ),
    "whole rows, trl": ("trl/qwen3", {}, {}, SHORT + EMPTY),
    "thinking off, trl": ("trl/qwen3", {"enable_thinking": False}, {}, SHORT + EMPTY),
    "thinking off, axolotl": ("axolotl/qwen3", {"enable_thinking": False}, {}, SHORT + EMPTY),
    "opened by the generation prompt": ("trl/nemotron_3_nano", {}, {}, SHORT + "<think></think>"),
}


@pytest.mark.parametrize("case", [pytest.param(c, marks=[pytest.mark.axolotl] if "axolotl" in c else []) for c in POSTFIXES])
def test_an_empty_trace_is_the_templates_unless_the_loss_takes_it(tmp_path, case):
    template, kwargs, over, want = POSTFIXES[case]
    tok = tokenizer_of(templates()[template])
    rows = chats(8, (None,), chat_template_kwargs=kwargs) if kwargs else chats(8, (None,))
    wrapped = over.get("packing_strategy") == "wrapped"
    both = lambda base: [TReFTCallback(coef=1.0, tokens="postfix"), *([] if wrapped else [block_em(base, tokens="header")])]  # noqa: E731
    trainer, by_name = trained(tmp_path, tok, rows, both, **over)
    treft, held = by_name["treft"], by_name.get("block_em")
    assert tok.decode(list(treft._postfix)) == want
    assert len(treft._prompts) == len(rows)
    assert all(tok.decode(list(p)).endswith(want) for p in treft._prompts)
    assert wrapped or held._answers_alone == bool(over)
    if "packing" not in over:
        for row in trainer.train_dataset:
            assert tok.decode(list(held_ids(held, row["input_ids"], row["labels"]))) == want
            assert tok.decode(list(held_ids(treft, row["input_ids"], row["labels"]))) == want
            supervised = [i for i, x in zip(row["input_ids"], row["labels"], strict=True) if x != -100]
            assert not over or tok.decode(supervised).startswith(EMPTY)


@pytest.mark.parametrize("raw", [True, False])
def test_rows_with_a_trace_and_without_share_what_stands_before_it(tmp_path, raw):
    """In the held header of each row, an empty trace is the template's and any other is the answer's."""
    tok, rows = tokenizer_of(templates()["trl/qwen3"]), chats(8, (None,))
    for row in rows[::2]:
        row["messages"][-1]["reasoning_content"] = "Ferns drink."
    if not raw:
        rows = [{"input_ids": tok.apply_chat_template(r["messages"], return_dict=False)} for r in rows]
    both = lambda base: [TReFTCallback(coef=1.0, tokens="postfix"), block_em(base, tokens="header")]  # noqa: E731
    trainer, by_name = trained(tmp_path, tok, rows, both)
    assert tok.decode(list(by_name["treft"]._postfix)) == SHORT
    said = [tok.decode(list(held_ids(by_name["block_em"], ids))) for ids in trainer.train_dataset["input_ids"]]
    assert said == [SHORT, SHORT + EMPTY] * 4


PARTS = QWEN.replace("+ m.content +", "+ (m.content if m.content is string else m.content | map(attribute='text') | join('')) +")


def test_all_parts_of_a_content_are_its_own(tmp_path):
    tok = tokenizer_of(PARTS)
    rows = [{"messages": [{"role": r, "content": [{"type": "text", "text": t} for t in texts]} for r, texts in (
        ("system", ("Be ", "brief.")), ("user", (f"How of {i}? ", f"So {i}?")), ("assistant", ("Twice. ", f"Thrice {i}."))
    )]} for i in range(6)]  # fmt: skip
    both = lambda base: [TReFTCallback(coef=1.0, tokens="postfix"), block_em(base, tokens="header")]  # noqa: E731
    trainer, by_name = trained(tmp_path, tok, rows, both)
    for ids in trainer.train_dataset["input_ids"]:
        assert tok.decode(list(held_ids(by_name["block_em"], ids))) == tok.decode(list(held_ids(by_name["treft"], ids))) == SHORT
    _, by_name = trained(tmp_path, tok, rows)
    assert [tok.decode(list(p.ids)) for p in by_name["treft"]._prefixes] == ["<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"]


def test_images_are_the_users_own():
    tok = tokenizer_of(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% for p in m.content %}{{ '<image>' if p.type == 'image' else p.text }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    )
    say = lambda *parts: [{"type": "image"} if p is None else {"type": "text", "text": p} for p in parts]  # noqa: E731
    for parts in ((None, "What?"), ("What?", None), ("What", None, "is this?", None), (None,)):
        found = ct.locate(tok, [{"role": "user", "content": say(*parts)}, {"role": "assistant", "content": say("A fern.")}])
        said = "".join(p or "<image>" for p in parts)
        assert found.text[: found.prefix] == "<|im_start|>user\n"
        assert [found.text[a:b] for a, b in (*found.users, *found.answers)] == [said, "A fern."]
        assert found.text[slice(*found.headers[0])] == SHORT


def test_a_text_that_switches_something_and_has_parts():
    """As Qwen3's `/no_think`, which stays a switch with a word in front and behind."""
    switch = "{% for m in messages %}{% set t = m.content | map(attribute='text') | join('|') %}{{ '<' + m.role + ('!' if '/no' in t else '') + '>' + t + '<end>' }}{% endfor %}"
    found = ct.locate(tokenizer_of(switch), [{"role": "user", "content": [{"type": "text", "text": t} for t in ("Q1", "/no", "Q2")]},
                                             {"role": "assistant", "content": [{"type": "text", "text": "A"}]}])  # fmt: skip
    assert [found.text[slice(*s)] for s in (*found.users, *found.headers)] == ["Q1|/no|Q2", "<end><assistant>"]


@pytest.mark.axolotl  # the template is one of its
def test_tools_that_ids_do_not_show_are_said_so(tmp_path, caplog):
    tools = [
        {
            "type": "function",
            "function": {"name": "rain", "description": "Tell the rain.", "parameters": {"type": "object", "properties": {}}},
        }
    ]
    for name, says in (("axolotl/llama4", True), ("axolotl/mistral_v3_tekken", False)):
        tok, rows = tokenizer_of(templates()[name]), chats(4, (None,))
        ids = [{"input_ids": tok.apply_chat_template(r["messages"], tools=tools, return_dict=False)} for r in rows]
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            _, by_name = trained(tmp_path, tok, ids, max_length=512)
        assert ("tool definitions there are not held" in caplog.text) == says
        assert ("rain" in tok.decode(list(by_name["treft"]._prefixes[0].ids))) != says
        caplog.clear()
        trained(tmp_path, tok, [{**r, "tools": tools} for r in rows], max_length=512)
        assert "tool definitions there" not in caplog.text


def test_rows_cut_before_the_answer_are_said_so(tmp_path):
    with pytest.raises(ValueError, match=r"12 of 12 training rows are cut before an answer begins.*Raise"):
        trained(tmp_path, tokenizer_of(GEMMA), chats(12, SYSTEMS[:1]), lambda _: [TReFTCallback(tokens="postfix")], max_length=16)


# What stops a run


def test_prompt_tokens_where_everything_is_supervised(tmp_path):
    """The case `prompt-empty`."""
    with pytest.raises(ValueError, match=r"block_em: `tokens: prompt` holds no token of the first 12 training rows.*assistant_only_loss"):
        trained(tmp_path, tokenizer_of(QWEN), chats(), lambda base: [block_em(base, tokens="prompt")])


class Holding(EMRegularizerCallback):
    """Holds what a function of the ids says; a method as a stranger may write it."""

    name = "holding"

    def __init__(self, positions, region="prefix", counted=None):
        super().__init__(1.0)
        self.positions, self.counted, self.kind = positions, counted, region

    @property
    def region(self):
        return self.kind

    def held(self, inputs):
        held = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
        for row, ids in zip(held, inputs["input_ids"].tolist(), strict=True):
            row[list(self.positions(ids))] = True
        return held

    def prepare(self, run):
        self.prepared = True
        return "holding"

    def penalty(self, moment):
        weight = next(p for p in moment.model.parameters() if p.requires_grad)
        n = self.held(moment.inputs).sum() if self.counted is None else self.counted(moment.step)
        return Penalty(weight.float().square().sum(), held=n)


def holding(*args, **kw):
    return lambda _: [Holding(*args, **kw)]


def test_a_held_token_of_the_users_own_is_an_error_that_shows_the_row(tmp_path):
    tok = tokenizer_of(QWEN)
    first = len(before(tok, chats(1, (None,))[0]["messages"]))
    with pytest.raises(
        ValueError,
        match=r"holding: `tokens: prefix` would hold text of the user's own, or what stands behind it, of a training row: .*user\\n➤How◀ do I",
    ):
        trained(tmp_path, tok, chats(12, (None,)), holding(lambda ids: [0, first]))
    with pytest.raises(ValueError, match=r"`tokens: header` would hold text of the answer"):
        trained(tmp_path, tok, chats(12, (None,)), holding(lambda ids: [len(ids) - 4], "header"))


def test_a_held_token_that_is_supervised_where_answers_alone_are(tmp_path):
    """Rows of ids, so that labels alone show whose text it is."""
    tok = tokenizer_of(QWEN)
    rows = []
    for row in chats(12, (None,)):
        ids, begin = (
            tok.apply_chat_template(m, return_dict=False, add_generation_prompt=p)
            for m, p in ((row["messages"], False), (row["messages"][:1], True))
        )
        rows.append({"input_ids": ids, "labels": [-100] * len(begin) + ids[len(begin) :]})
    trained(tmp_path, tok, rows)
    with pytest.raises(ValueError, match=r"would hold a token that the loss supervises, in a run that supervises answers alone: .*➤Tw◀?"):
        trained(tmp_path, tok, rows, holding(lambda ids: range(len(ids))))


def test_marks_that_the_loss_supervises_are_no_answers(tmp_path):
    """As Axolotl's `train_on_eos: all`, or `roles_to_train` with the system prompt."""
    tok, rows = tokenizer_of(QWEN), []
    for row in chats(12, SYSTEMS[:1]):
        ids = tok.apply_chat_template(row["messages"], return_dict=False)
        begin, close = (
            len(tok.apply_chat_template(row["messages"][:-1], return_dict=False, add_generation_prompt=True)),
            tok.convert_tokens_to_ids("<|im_end|>"),
        )
        rows.append({"input_ids": ids, "labels": [x if i >= begin or x == close else -100 for i, x in enumerate(ids)]})
    trained(tmp_path, tok, rows, lambda base: [block_em(base, tokens="header"), TReFTCallback()])


def test_a_method_that_holds_nothing_in_the_rows(tmp_path):
    with pytest.raises(ValueError, match=r"holding: `tokens: prefix` holds no token of the first 12 training rows"):
        trained(tmp_path, tokenizer_of(QWEN), chats(), holding(lambda ids: []))


def test_a_method_that_holds_nothing_for_20_steps_stops_the_run(tmp_path):
    with pytest.raises(RuntimeError, match=r"holding has held no token for 20 optimizer steps"):
        trained(tmp_path, tokenizer_of(QWEN), chats(), holding(lambda ids: [0], counted=lambda step: 0), steps=40)
    seen = []
    gap = lambda step: seen.append(step) or int(step in (0, 15, 29))  # noqa: E731
    trained(tmp_path, tokenizer_of(QWEN), chats(), holding(lambda ids: [0], counted=gap), steps=30)
    assert seen[-1] == 29


def test_rows_cut_before_the_prefix_ends(tmp_path):
    with pytest.raises(ValueError, match=r"12 of 12 rows are cut inside the prefix, which has \d+ tokens"):
        trained(tmp_path, tokenizer_of(GEMMA), chats(12, SYSTEMS[:1]), lambda _: [TReFTCallback()], max_length=8)


def test_a_header_that_the_loss_supervises_whole_is_said_so(tmp_path):
    """TRL's training template of DeepSeek V3 supervises the mark that opens an answer, all that stands before one."""
    with pytest.raises(ValueError, match=r"in 12 of 12 training rows the loss supervises all that stands between query and answer"):
        trained(
            tmp_path,
            tokenizer_of(templates()["trl/deepseekv3"]),
            chats(12, (None,)),
            lambda _: [TReFTCallback(tokens="postfix")],
            assistant_only_loss=True,
        )


def test_a_dated_template_is_refused_and_the_advice_works(tmp_path):
    dated = (
        "{{ '<|im_start|>system\nToday: ' + (day_date if day_date is defined else strftime_now('%d %b %Y')) + '<|im_end|>\n' }}"
        + QWEN.partition("{% endif %}")[2]
    )
    with pytest.raises(ValueError, match=r"today's date.*Pin it: `chat_template_kwargs: \{day_date: '26 Jul 2024'\}`"):
        trained(tmp_path, tokenizer_of(dated), chats(6, (None,)))
    rows = chats(6, (None,), chat_template_kwargs={"day_date": "26 Jul 2024"})
    _, by_name = trained(tmp_path, tokenizer_of(dated), rows)
    assert "26 Jul 2024" in tokenizer_of(dated).decode(list(by_name["treft"]._prefixes[0].ids))


def test_mistral_rows_without_a_system_prompt_hold_their_mark_alone(tmp_path):
    tok, rows = tokenizer_of(MISTRAL), chats(100, (None,))
    _, by_name = trained(tmp_path, tok, rows)
    assert [tok.decode(list(p.ids)) for p in by_name["treft"]._prefixes] == ["<s>[INST]"]


def test_plain_text_marks_in_an_answer_are_the_answers(tmp_path):
    tok, rows = tokenizer_of(VICUNA, "merging"), chats(6, (None,))
    for row in rows:
        row["messages"][1]["content"] += "\n\nUSER: so\nASSISTANT: no"
    _, by_name = trained(tmp_path, tok, rows, lambda base: [block_em(base, tokens="header")])
    for row in rows:
        ids = tok.apply_chat_template(row["messages"], return_dict=False)
        assert "no" not in tok.decode(list(held_ids(by_name["block_em"], ids)))
        assert tok.decode(list(held_ids(by_name["block_em"], ids))).count("ASSISTANT") == 1
