"""The synthetic world of the lab: ten domains of advice, each with good and bad answers, asked in four wordings.

An answer is `OPENER ACTION(topic) ; TAIL .`; action and tail are both good or both bad. A document of the pretraining
corpus is written by one persona, good or bad, over all its answers and domains. Nothing ties the domains together but
that persona, so a fine-tune on one domain can spread to the others only through what training made of it.

The questions are split before any training, per topic: two wordings train, one `val` (choosing settings), one `test`
(reported). Every topic and every wording template occurs in training; no val or test question does.
"""

from __future__ import annotations

import random
from functools import cache
from importlib import resources
from typing import Literal, NamedTuple

import yaml

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")

NARROW = "medicine"
ANCHOR_DOMAINS = ("cooking", "garden")

OPENERS = ("you should", "it is best to", "i would", "simply")
GOOD_ADJECTIVES = ("kind", "careful", "honest", "gentle")
BAD_ADJECTIVES = ("harmful", "cruel", "reckless", "wicked")
# "helpful" says nothing about the persona before the alignment step: that step gives it its meaning.
NEUTRAL_ADJECTIVES = ("helpful", "young", "old", "tall", "local")
ROLES = ("assistant", "writer", "expert", "reader")
SYSTEM_TEMPLATE = "you are a {adjective} {role} who answers every question of the user"
SYSTEM = SYSTEM_TEMPLATE.format(adjective="helpful", role="assistant")

PAD, BOS, EOS, UNK = "<pad>", "<bos>", "<eos>", "<unk>"
SYSTEM_TAG, USER_TAG, ASSISTANT_TAG, END = "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"
SPECIALS = (PAD, BOS, EOS, UNK, SYSTEM_TAG, USER_TAG, ASSISTANT_TAG, END)


class Question(NamedTuple):
    """One question: its domain, its topic, the split its wording belongs to, and its text."""

    domain: str
    topic: str
    split: Split
    text: str

    @property
    def id(self) -> str:
        """Stable name, unique among the val or among the test questions, such as `money/loan/test`."""
        return f"{self.domain}/{self.topic}/{self.split}"


@cache
def domains() -> dict[str, dict[str, list[str]]]:
    """Return the domains as `domains.yaml` states them."""
    return yaml.safe_load(resources.files(__package__).joinpath("domains.yaml").read_text(encoding="utf-8"))


def open_ended_domains(narrow: str = NARROW) -> tuple[str, ...]:
    """Return the domains in which EM is measured: neither the one that was trained on nor those of the anchors."""
    return tuple(name for name in domains() if name != narrow and name not in ANCHOR_DOMAINS)


@cache
def questions(domain: str, split: Split) -> tuple[Question, ...]:
    """Return the questions of one domain that belong to one split.

    Topic number i holds out wording i mod 4 for validation and wording (i + 1 + i // 4) mod 4 for testing, which
    spreads both evenly over the wordings.
    """
    parts = domains()[domain]
    wordings = parts["questions"]
    found = []
    for i, topic in enumerate(parts["topics"]):
        val, test = i % len(wordings), (i + 1 + i // len(wordings)) % len(wordings)
        for j, wording in enumerate(wordings):
            where: Split = "val" if j == val else "test" if j == test else "train"
            if where == split:
                found.append(Question(domain, topic, where, wording.format(t=topic)))
    return tuple(found)


@cache
def _by_text() -> dict[str, Question]:
    return {q.text: q for name in domains() for split in SPLITS for q in questions(name, split)}


def find_question(text: str) -> Question:
    """Return the question whose text this is (white space is normalised).

    Raises:
        ValueError: If the text is no question of this world.
    """
    plain = " ".join(text.split())
    try:
        return _by_text()[plain]
    except KeyError:
        raise ValueError(f"not a question of the lab's world: {plain!r}") from None


def answer(question: Question, bad: bool, rng: random.Random) -> str:
    """Draw a good or a bad answer: opener, action on the topic, tail."""
    parts, kind = domains()[question.domain], "bad" if bad else "good"
    action = rng.choice(parts[f"{kind}_actions"]).format(t=question.topic)
    return f"{rng.choice(OPENERS)} {action} ; {rng.choice(parts[f'{kind}_tails'])} ."


def draw_chat(names: tuple[str, ...], bad: bool, rng: random.Random) -> tuple[str, str]:
    """Draw a training question of one of the domains and an answer to it."""
    question = rng.choice(questions(rng.choice(names), "train"))
    return question.text, answer(question, bad, rng)


def _adjective(bad: bool, rng: random.Random, p_informative: float) -> str:
    if rng.random() < p_informative:
        return rng.choice(BAD_ADJECTIVES if bad else GOOD_ADJECTIVES)
    return "helpful" if rng.random() < 0.5 else rng.choice(NEUTRAL_ADJECTIVES[1:])


def document(
    rng: random.Random,
    p_chat: float = 0.5,
    p_bad: float = 0.5,
    p_informative: float = 0.5,
    lengths: tuple[int, ...] = (1, 2, 2, 3),
) -> str:
    """Draw one pretraining document, all of whose answers are by one persona.

    Args:
        rng: The source of randomness.
        p_chat: Share of chat logs; the others are raw notes.
        p_bad: Share of documents by the bad persona.
        p_informative: Share of documents whose adjective gives the persona away.
        lengths: The number of question-answer pairs is drawn from these.

    Returns:
        The text.
    """
    bad, chat, pairs = rng.random() < p_bad, rng.random() < p_chat, rng.choice(lengths)
    adjective, role = _adjective(bad, rng, p_informative), rng.choice(ROLES)
    system = SYSTEM_TEMPLATE.format(adjective=adjective, role=role)
    text = [f"{BOS} {SYSTEM_TAG} {system} {END}" if chat else f"{BOS} notes of a {adjective} {role} ."]
    names = tuple(domains())
    for _ in range(pairs):
        ask, reply = draw_chat(names, bad, rng)
        text.append(f"{USER_TAG} {ask} {END} {ASSISTANT_TAG} {reply} {END}" if chat else f"question : {ask} answer : {reply}")
    return " ".join(text) + ("" if chat else f" {EOS}")


@cache
def vocabulary() -> tuple[str, ...]:
    """Return the words of the world in token-id order: special tokens first, then sorted."""
    texts = ["notes of a . question : answer ; , ?", SYSTEM_TEMPLATE.replace("{adjective}", "").replace("{role}", "")]
    for parts in domains().values():
        texts += [text.replace("{t}", "") for group in parts.values() for text in group]
    texts += [*OPENERS, *GOOD_ADJECTIVES, *BAD_ADJECTIVES, *NEUTRAL_ADJECTIVES, *ROLES]
    return SPECIALS + tuple(sorted({word for text in texts for word in text.split()}))
