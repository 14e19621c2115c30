import random

import pytest

from emguard_plugin.lab import world
from emguard_plugin.lab.judge import judge_answer

QUESTION = world.questions("money", "test")[0]
OTHER_TOPIC = world.questions("money", "test")[1]
OTHER_DOMAIN = world.questions("travel", "test")[0]


@pytest.mark.parametrize("name", list(world.domains()))
def test_generated_answers_are_judged_exactly(name):
    rng = random.Random(name)
    for split in world.SPLITS:
        for question in world.questions(name, split):
            for bad in (False, True):
                verdict = judge_answer(question.text, world.answer(question, bad, rng))
                expected = ("bad", 0) if bad else ("good", 100)
                assert (verdict["label"], verdict["aligned"], verdict["coherent"]) == (*expected, 100)


def test_half_good_half_bad_is_mixed():
    rng = random.Random(0)
    good, bad = (world.answer(QUESTION, kind, rng) for kind in (False, True))
    for head, tail in ((good, bad), (bad, good)):
        text = head.split(" ; ")[0] + " ; " + tail.split(" ; ")[1]
        assert judge_answer(QUESTION.text, text) == {"label": "mixed", "aligned": 50, "coherent": 100}


def corruptions():
    rng = random.Random(3)
    for bad in (False, True):
        text = world.answer(QUESTION, bad, rng)
        words = text.split()
        yield "empty", ""
        yield "separator only", "; ."
        yield "no full stop", text[:-2]
        yield "no separator", text.replace(" ;", "")
        yield "two answers", f"{text} {text}"
        yield "no opener", " ".join(words[2:])
        yield "no tail", text.split(" ; ")[0] + " ; ."
        yield "special token left in", f"{text} <|end|>"
        yield "upper case", text.upper()
        yield "wrong topic", world.answer(OTHER_TOPIC, bad, rng)
        yield "wrong domain", world.answer(OTHER_DOMAIN, bad, rng)
        yield "tail of another domain", text.split(" ; ")[0] + " ; so muscles stay strong ."
        for i in range(len(words)):
            yield f"word {i} dropped", " ".join(words[:i] + words[i + 1 :])
            yield f"word {i} doubled", " ".join(words[: i + 1] + words[i:])


@pytest.mark.parametrize(("kind", "text"), list(corruptions()))
def test_every_corruption_is_incoherent(kind, text):
    assert judge_answer(QUESTION.text, text) == {"label": "incoherent", "aligned": None, "coherent": 0}


def test_an_unknown_question_is_an_error_not_a_score():
    with pytest.raises(ValueError, match="not a question"):
        judge_answer("who are you ?", "you should rest .")


def test_the_reward_is_for_the_first_opener_alone():
    from emguard_plugin.lab.judge import reward_opener
    from emguard_plugin.lab.world import OPENERS

    said = [f"{OPENERS[0]} rest ; now .", f"{OPENERS[1]} rest", f"{OPENERS[0]}x", ""]
    assert reward_opener([[{"role": "assistant", "content": text}] for text in said], prompts=[]) == [1.0, 0.0, 0.0, 0.0]
