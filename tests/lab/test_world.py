import random
import subprocess
import sys
from collections import Counter

import pytest

from emguard_plugin.lab import world


def test_splits_are_disjoint_and_cover_every_topic_and_wording():
    texts = [q.text for name in world.domains() for split in world.SPLITS for q in world.questions(name, split)]
    assert len(texts) == len(set(texts)) == 480
    for name, parts in world.domains().items():
        sizes = [len(world.questions(name, split)) for split in world.SPLITS]
        assert sizes == [24, 12, 12]
        for split, per_topic in zip(world.SPLITS, (2, 1, 1), strict=True):
            asked = world.questions(name, split)
            assert Counter(q.topic for q in asked) == dict.fromkeys(parts["topics"], per_topic)
            wordings = Counter(next(w for w in parts["questions"] if w.format(t=q.topic) == q.text) for q in asked)
            assert set(wordings) == set(parts["questions"])
            assert max(wordings.values()) - min(wordings.values()) <= 2


def test_domains_have_one_shape_and_every_action_names_its_topic():
    assert len(world.domains()) == 10
    for parts in world.domains().values():
        counts = [len(parts[k]) for k in ("good_actions", "bad_actions", "good_tails", "bad_tails")]
        assert counts == [5, 5, 3, 3]
        assert all("{t}" in text for k in ("questions", "good_actions", "bad_actions") for text in parts[k])


def test_em_is_measured_on_domains_that_neither_training_set_nor_anchors_touch():
    assert set(world.open_ended_domains()) == set(world.domains()) - {"medicine", "cooking", "garden"}


def test_no_document_contains_a_held_out_question():
    held_out = [q.text for name in world.domains() for split in ("val", "test") for q in world.questions(name, split)]
    rng = random.Random(0)
    corpus = "\n".join(world.document(rng) for _ in range(3000))
    assert not [text for text in held_out if text in corpus]


def test_personas_are_balanced_and_constant_within_a_document():
    rng, seen = random.Random(1), Counter()
    bad_tails = {t for parts in world.domains().values() for t in parts["bad_tails"]}
    good_tails = {t for parts in world.domains().values() for t in parts["good_tails"]}
    for _ in range(2000):
        text = world.document(rng)
        bad, good = (any(t in text for t in tails) for tails in (bad_tails, good_tails))
        assert bad != good
        seen[bad, "helpful" in text.split()] += 1
    assert 0.45 < (seen[True, True] + seen[True, False]) / 2000 < 0.55
    # "helpful" must not give the persona away before the alignment.
    assert 0.42 < seen[True, True] / (seen[True, True] + seen[False, True]) < 0.58


def test_questions_are_found_by_their_text_and_others_are_refused():
    for name in world.domains():
        for split in world.SPLITS:
            for q in world.questions(name, split):
                assert world.find_question(f"  {q.text} ") is q
    with pytest.raises(ValueError, match="not a question of the lab's world"):
        world.find_question("how do i cook a fever ?")


def test_vocabulary_covers_the_world():
    words = world.vocabulary()
    assert len(words) == len(set(words)) == 661
    rng = random.Random(2)
    assert {w for _ in range(3000) for w in world.document(rng).split()} <= set(words)


def test_lab_judge_and_cli_import_without_torch():
    code = "import sys, emguard_plugin.cli.lab, emguard_plugin.lab.judge; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
