import json
import logging
from dataclasses import asdict
from importlib.metadata import version

import pytest
import torch

from emguard_plugin.lab import batches, sampling, world
from emguard_plugin.lab.build import BuildSettings, build_base, new_model, sha256

TINY = BuildSettings(seed=5, steps=12, batch_size=4, align_steps=3, align_batch_size=4, hidden_size=16, intermediate_size=32, layers=2)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    torch.set_num_threads(1)
    return folder, build_base(folder, TINY, per_question=1, progress=False)


def test_the_build_stores_settings_versions_figures_and_digest(built):
    folder, record = built
    stored = json.loads((folder / "build.json").read_text())
    assert stored == record
    assert stored["settings"] == asdict(TINY)
    assert stored["sha256"] == sha256(folder / "model.safetensors")
    assert stored["versions"]["torch"] == version("torch")
    for split in ("val", "test"):
        figures = stored["figures"][split]
        assert figures["n"] == 120 == sum(figures[k] for k in ("good", "bad", "mixed", "incoherent"))


def test_two_builds_of_one_seed_are_identical_and_another_seed_differs(built, tmp_path):
    folder, record = built
    again = build_base(tmp_path / "again", TINY, per_question=1, progress=False)
    assert (tmp_path / "again/model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert again["figures"] == record["figures"]
    other = build_base(tmp_path / "other", BuildSettings(**asdict(TINY) | {"seed": 6}), per_question=1, progress=False)
    assert other["sha256"] != record["sha256"]


def test_a_base_below_the_gate_says_so(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        record = build_base(tmp_path, TINY, per_question=1, progress=False)
    assert not record["gate_passed"]
    assert "misses its gate" in caplog.text


def test_the_loss_of_the_alignment_covers_the_answer_alone():
    import random

    ids, labels = next(batches.good_chats(random.Random(0), 8))
    for row, target in zip(ids.tolist(), labels.tolist(), strict=True):
        kept = [i for i, label in zip(row, target, strict=True) if label != batches.IGNORE]
        assert batches.decode(kept).endswith(" . <|end|>")
        start = row.index(batches.encode("<|assistant|>")[0]) + 1
        assert row[start : start + len(kept)] == kept


def test_sampling_is_seeded_and_agrees_with_the_model_distribution():
    model = new_model(TINY).eval()
    prompts = [batches.prompt(q.text) for q in world.questions("self", "val")]
    assert sampling.sample(model, prompts, seed=1) == sampling.sample(model, prompts, seed=1)
    assert sampling.sample(model, prompts, seed=1) != sampling.sample(model, prompts, seed=2)
    # The cached, length-grouped sampler must follow the plain forward: near temperature 0 it is greedy decoding.
    for ids, text in zip(prompts[:3], sampling.sample(model, prompts[:3], seed=0, temperature=1e-4), strict=True):
        full = list(ids)
        for word in text.split():
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([full])).logits[0, -1]
            assert logits[batches.encode(word)[0]] >= logits.max() - 1e-3
            full += batches.encode(word)
