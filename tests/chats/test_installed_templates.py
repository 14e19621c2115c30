"""Prefix and postfix, for every installed chat template x conversation x tokenizer, against where the texts stand.

The expected places are computed here from the known texts, without the code under test: a text is found as it was written, and
whether its blanks were kept is seen from a rendering without them.
"""

from collections import Counter

import jinja2
import pytest

from emguard_plugin import chat_template as ct
from tests.chats.shapes import SHAPES, templates, tokenizer

KINDS = ("merging", "pieces", "marks")
ALL = templates()


def rendered(tok, messages, kw, form=list):
    return tok.apply_chat_template(form(messages), tokenize=False, **kw)


def prints_text(tok):
    """Templates of models that see images may print contents in parts alone."""
    try:
        return "Q1" in rendered(tok, SHAPES["plain"][0], {})
    except jinja2.TemplateError:
        return False


def in_parts(messages):
    return [{**m, "content": [{"type": "text", "text": m["content"]}]} if m["content"] else m for m in messages]


def place(tok, messages, i, text, kw, form, begin):
    """Return where message i's text stands in the rendering, behind `begin`; None where it is not printed as it is."""
    content = messages[i]["content"]
    core = content.strip()
    at = text.find(core, begin) if core else -1
    if at < 0:
        return None
    lead, tail = content[: len(content) - len(content.lstrip())], content[len(content.rstrip()) :]
    start, end = at, at + len(core)
    for blank, bare in ((lead, content.lstrip()), (tail, content.rstrip())):
        if blank:
            without = rendered(tok, [*messages[:i], {**messages[i], "content": bare}, *messages[i + 1 :]], kw, form)
            if without != text:  # the template keeps it
                start, end = (start - len(blank), end) if blank is lead else (start, end + len(blank))
    return start, end


def tokens(spans, start, end):
    """Return the tokens that lie wholly between two characters."""
    return [i for i, (a, b) in enumerate(spans) if a >= start and b <= end and b > a]


def expected(tok, messages, kw, form):
    """Return ids, spans, the prefix's tokens, and per answer of a user (query end, where the model begins, answer start)."""
    text = rendered(tok, messages, kw, form)
    found = tok(text, add_special_tokens=False, return_offsets_mapping=True)
    own, begin = {}, 0
    for i, m in enumerate(messages):
        if m["role"] in ("user", "assistant", "tool") and (at := place(tok, messages, i, text, kw, form, begin)):
            own[i], begin = at, at[1]
    users = [i for i in own if messages[i]["role"] == "user"]
    if not users:
        return None
    headers = []
    for i, m in enumerate(messages):
        if m["role"] == "assistant" and i in own and messages[i - 1]["role"] == "user" and i - 1 in own:
            asked, plain = (rendered(tok, messages[:i], {**kw, "add_generation_prompt": on}, form) for on in (True, False))
            answer = own[i][0]
            if m.get("reasoning_content") and 0 <= (at := text.find(m["reasoning_content"], own[i - 1][1])) < answer:
                answer = at
            same = next((k for k, (x, y) in enumerate(zip(text, asked, strict=False)) if x != y), min(len(text), len(asked)))
            model = min(same, answer) if asked != plain and same > own[i - 1][1] else answer
            trace = text.lower().find("think", own[i - 1][1])  # the mark that opens it, `<think>` or `<|START_THINKING|>`, is the answer's
            model = min(model, max(text.rfind(c, 0, trace) for c in "<[")) if trace >= 0 else model
            headers.append((own[i - 1][1], model, answer))
    return text, found["input_ids"], found["offset_mapping"], tokens(found["offset_mapping"], 0, min(a for a, _ in own.values())), headers, own


@pytest.mark.parametrize("kind", KINDS)
def test_prefix_and_postfix_of_every_installed_template(kind, record_property):
    tok = tokenizer(kind)
    seen = Counter()
    wrong = []
    for name, template in ALL.items():
        tok.chat_template = template
        read, as_parts = ct.read_template(tok), not prints_text(tok)
        for shape, (messages, kw) in SHAPES.items():
            where = f"{name} | {shape}"
            try:
                want = expected(tok, messages, kw, in_parts if as_parts else list)
            except (jinja2.TemplateError, TypeError, KeyError):
                seen["refused by the template"] += 1
                continue
            if want is None:
                seen["user not printed"] += 1
                continue
            seen["cases"] += 1
            _, ids, spans, prefix, headers, own = want
            row = ct.known_row(tok, in_parts(messages) if as_parts else messages, **kw)
            if list(row.ids) != ids or list(range(row.prefix)) != prefix:
                wrong.append(f"raw prefix | {where}: {tok.decode(ids[: row.prefix])!r} for {tok.decode(ids[: len(prefix)])!r}")
            held = [tuple(range(*h)) for h in row.headers]
            for query, model, _ in headers:
                inner = tuple(tokens(spans, query, model))
                if inner and inner not in held:
                    wrong.append(f"raw postfix | {where}: {[tok.decode([ids[i] for i in h]) for h in held]} for {tok.decode([ids[i] for i in inner])!r}")
                seen["postfixes"] += bool(inner)
            inside = {i for s in own.values() for i, (a, b) in enumerate(spans) if a < s[1] and b > s[0]}
            if inside & {i for h in held for i in h}:
                wrong.append(f"raw postfix holds text | {where}")
            alone = ct.prefix_of_row(ids, read)
            if alone is None or len(alone) < len(prefix):
                seen["ids only: nothing held" if not alone else "ids only: less held"] += 1
            if alone is not None and len(alone) > len(prefix):
                wrong.append(f"ids prefix | {where}: {tok.decode(list(alone))!r} for {tok.decode(ids[: len(prefix)])!r}")
            posts = [i for h in ct.headers_of_row(ids, read) for i in range(*h)]
            if inside & set(posts):
                wrong.append(f"ids postfix holds text | {where}: {tok.decode([ids[i] for i in posts])!r}")
            seen["ids only: no postfix"] += not posts
    record_property("counts", dict(seen))
    print(kind, len(ALL), dict(seen), len(wrong))
    assert not wrong, "\n".join(wrong[:40])
    assert seen["cases"] > 15 * len(ALL)
