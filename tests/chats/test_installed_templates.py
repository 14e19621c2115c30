"""Prefix and postfix, for every installed chat template x conversation x tokenizer, against where the texts stand.

The expected places are computed here from the known texts, without the code under test: a text is found as it was written, and
whether its blanks were kept is seen from a rendering without them.
"""

import random
import re
from collections import Counter

import jinja2
import pytest

from emguard_plugin import chats as ct
from tests.chats.shapes import SHAPES, generated_chat, templates, tokenizer

KINDS = ("merging", "pieces", "marks")
ALL = templates()
EMPTY = re.compile(r"<think>\s*</think>\s*$")


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
    for front, blank, bare in ((True, lead, content.lstrip()), (False, tail, content.rstrip())):
        if blank:
            without = rendered(tok, [*messages[:i], {**messages[i], "content": bare}, *messages[i + 1 :]], kw, form)
            kept = max(0, min(len(blank), len(text) - len(without)))  # a template may keep blanks and drop newlines
            start, end = (start - kept, end) if front else (start, end + kept)
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
            # The mark that opens a trace is the answer's; an empty trace that the template writes is its own, whoever closes it.
            between, trace = text[own[i - 1][1] : answer], text.lower().find("think", own[i - 1][1])
            if EMPTY.search(between):
                model = model if asked.rstrip().endswith(EMPTY.search(between)[0].rstrip()) else answer
            elif trace >= 0:
                model = min(model, max(text.rfind(c, 0, trace) for c in "<["))
            headers.append((own[i - 1][1], model, answer))
    return (
        text,
        found["input_ids"],
        found["offset_mapping"],
        tokens(found["offset_mapping"], 0, min(a for a, _ in own.values())),
        headers,
        own,
    )


class Look:
    """Compares what is held with what stands there, case by case, and counts."""

    def __init__(self, kind):
        self.tok, self.seen, self.wrong, self.name = tokenizer(kind), Counter(), [], None

    def use(self, name):
        if name != self.name:
            self.name, self.tok.chat_template = name, ALL[name]
            self.read, as_parts = ct.read_template(self.tok), not prints_text(self.tok)
            self.form = in_parts if as_parts else list

    def case(self, name, shape, messages, kw, whole=False):
        """Check one conversation; with `whole`, only if every text of it is printed as it is."""
        self.use(name)
        tok, seen, where = self.tok, self.seen, f"{name} | {shape}"
        try:
            want = expected(tok, messages, kw, self.form)
        except (jinja2.TemplateError, TypeError, KeyError):
            seen["refused by the template"] += 1
            return
        if want is None or (whole and len(want[5]) < sum(m["role"] != "system" for m in messages)):
            seen["text not printed as it is"] += 1
            return
        seen["cases"] += 1
        _, ids, spans, prefix, headers, own = want

        def said(at):
            return repr(tok.decode([ids[i] for i in at]))

        row = ct.known_row(tok, self.form(messages), **kw)
        if list(row.ids) != ids or list(range(row.prefix)) != prefix:
            self.wrong.append(f"raw prefix | {where}: {said(range(row.prefix))} for {said(prefix)}")
        held = [tuple(range(*h)) for h in row.headers]
        for query, model, _ in headers:
            inner = tuple(tokens(spans, query, model))
            seen["postfixes"] += bool(inner)
            if inner and inner not in held:
                self.wrong.append(f"raw postfix | {where}: {[said(h) for h in held]} for {said(inner)}")
        inside = {i for s in own.values() for i, (a, b) in enumerate(spans) if a < s[1] and b > s[0]}
        if inside & {i for h in held for i in h}:
            self.wrong.append(f"raw postfix holds text | {where}")
        alone = ct.prefix_of_row(ids, self.read)
        if alone is None or len(alone) < len(prefix):
            seen["ids only: prefix not held" if not alone else "ids only: less of the prefix held"] += 1
        if (alone is not None and list(alone) != ids[: len(alone)]) or len(alone or ()) > len(prefix):
            self.wrong.append(f"ids prefix | {where}: {tok.decode(list(alone))!r} for {said(prefix)}")
        posts = [i for h in ct.headers_of_row(ids, self.read) for i in range(*h)]
        seen["ids only: postfix not held"] += not posts
        if inside & set(posts):
            self.wrong.append(f"ids postfix holds text | {where}: {said(posts)}")


def every_shape(kind):
    look = Look(kind)
    for name in ALL:
        for shape, (messages, kw) in SHAPES.items():
            look.case(name, shape, messages, kw)
    return look


def generated(kind, n, seed):
    look, rng = Look(kind), random.Random(f"{kind}{seed}")
    cases = sorted((rng.choice(sorted(ALL)), i) for i in range(n))
    for name, i in cases:
        look.case(name, f"generated {seed}.{i}", generated_chat(random.Random(f"{kind}{seed}.{i}")), {}, whole=True)
    return look


@pytest.mark.parametrize("kind", KINDS)
def test_prefix_and_postfix_of_every_installed_template(kind):
    look = every_shape(kind)
    assert not look.wrong, "\n".join(look.wrong[:40])
    assert look.seen["cases"] > 15 * len(ALL)
    assert look.seen["postfixes"] > look.seen["cases"]


@pytest.mark.parametrize("kind", KINDS)
def test_generated_conversations(kind):
    look = generated(kind, 120, seed=0)
    assert not look.wrong, "\n".join(look.wrong[:40])
    assert look.seen["cases"] > 60
