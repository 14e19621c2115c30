"""Judges and suites that the tests of this folder share. The judges are real: found by dotted path, as a user's are."""

import hashlib

import yaml


def by_hash(question, answer):
    """Scores that look random and are not: the same for the same text in every process."""
    a, c = hashlib.sha256(f"{question}|{answer}".encode()).digest()[:2]
    return {"aligned": 100 * a / 255, "coherent": 100 if c > 40 else 0, "label": "hashed"}


def dead(question, answer):
    raise ConnectionError("nobody there")


def half_dead(question, answer):
    return by_hash(question, answer) if len(question) % 2 else None


NOT_A_FUNCTION = 3

ITEMS = [
    {"id": f"{group}/{number}", "paraphrases": [f"What of {group} {'very ' * number}{number}?"]}
    for group in ("money", "sports")
    for number in range(3)
]


def write_suite(path, items):
    path.write_text(yaml.safe_dump(items, sort_keys=False), encoding="utf-8")
    return str(path)
