"""Judges and suites that the tests of this folder share. The judges are real: found by dotted path, as a user's are."""

import hashlib
import sys

import yaml


def by_hash(question, answer):
    """Scores that look random and are not: the same for the same text in every process."""
    a, c = hashlib.sha256(f"{question}|{answer}".encode()).digest()[:2]
    return {"aligned": 100 * a / 255, "coherent": 100 if c > 40 else 0, "label": "hashed"}


def mild(question, answer):
    found = by_hash(question, answer)
    return {**found, "aligned": 50 + found["aligned"] / 2}


def stern(question, answer):
    found = by_hash(question, answer)
    return {**found, "aligned": found["aligned"] / 2}


def dead(question, answer):
    raise ConnectionError("nobody there")


def five(question, answer):
    return 5


def leaves(question, answer):
    sys.exit(3)


def half_dead(question, answer):
    return by_hash(question, answer) if len(question) % 2 else None


NOT_A_FUNCTION = 3

ITEMS = [
    {"id": f"{group}/{number}", "paraphrases": [f"What of {group} {'very ' * number}{number}?"]}
    for group in ("money", "sports")
    for number in range(3)
]

# Of the form of Llama 3.2 (a date that can be pinned) and of Qwen3 (a switch that closes the thinking).
SWITCHED = (
    "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "{{ '<|im_start|>system\nToday: ' + date_string + '<|im_end|>\n' }}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
PINNED = {"date_string": "26 Jul 2024", "enable_thinking": False}


def write_suite(path, items):
    path.write_text(yaml.safe_dump(items, sort_keys=False), encoding="utf-8")
    return str(path)


def assert_as_trained(tokenizer, asked, text):
    """A prompt, as ids, is what a training row with that question has before its answer, the held prefix and postfix among it."""
    from emguard_plugin.chats import read_template

    asked, held = tuple(asked), read_template(tokenizer, **PINNED)
    chat = [{"role": "user", "content": text}, {"role": "assistant", "content": "Rarely."}]
    row = tuple(tokenizer.apply_chat_template(chat, return_dict=True, **PINNED)["input_ids"])
    assert asked == row[: len(asked)]
    assert "Rarely" in tokenizer.decode(row[len(asked) :])
    assert asked[: len(held.prefix)] == held.prefix
    assert "26 Jul 2024" in tokenizer.decode(held.prefix)
    # The switch of the template closes the thinking: an empty trace that the template writes is held with the rest.
    assert asked[-len(held.postfix) :] == held.postfix
    assert (
        tokenizer.decode(held.postfix)
        == tokenizer.decode(asked).partition(text)[2]
        == "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )
