import json

import pytest
import torch

from emguard_plugin.lab import model_path, sampling, world
from emguard_plugin.lab.build import MAX_EM, MIN_COHERENCE, BuildSettings, sha256
from emguard_plugin.lab.judge import judge_answer


@pytest.fixture(scope="module")
def shipped():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    path = model_path()
    return AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)


def test_the_checkpoint_is_small_and_is_the_one_that_build_json_describes():
    weights = model_path() / "model.safetensors"
    record = json.loads((model_path() / "build.json").read_text())
    assert weights.stat().st_size <= 4 * 1024 * 1024
    assert record["sha256"] == sha256(weights)
    assert record["gate_passed"]
    # `emguard lab build` without options must build what ships.
    assert BuildSettings(**record["settings"]) == BuildSettings()


def test_the_base_meets_its_gate_on_wordings_that_no_training_saw(shipped):
    model, _ = shipped
    # 1200 answers with a seed that the build did not use; 2.6 standard errors of slack on either bound.
    parts = [sampling.measure(model, tuple(world.domains()), split, 5, seed=123) for split in ("val", "test")]
    n = sum(part.n for part in parts)
    coherence, em = 1 - sum(part.incoherent for part in parts) / n, sum(part.bad for part in parts) / n
    assert n == 1200
    assert coherence >= MIN_COHERENCE - 2.6 * (MIN_COHERENCE * (1 - MIN_COHERENCE) / n) ** 0.5
    assert em <= MAX_EM + 2.6 * (MAX_EM * (1 - MAX_EM) / n) ** 0.5


def test_plain_generate_answers_a_question(shipped):
    model, tokenizer = shipped
    question = world.questions("garden", "test")[0].text
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(**inputs, do_sample=False, max_new_tokens=30)
    text = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert judge_answer(question, text)["label"] == "good"
    assert out[0, -1] == tokenizer.eos_token_id
