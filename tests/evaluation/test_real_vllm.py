"""`sampler: {provider: vllm}` with vLLM itself, where the command `vllm` is on the PATH (CONTRIBUTING says how it was installed)."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig

from emguard_plugin import EMGuardSFTTrainer
from emguard_plugin.config import EMEvalConfig
from emguard_plugin.evaluation import run_em_eval
from emguard_plugin.lab import model_path
from emguard_plugin.lab.export import narrow_rows, question_items
from emguard_plugin.lab.world import open_ended_domains

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("vllm") is None, reason="vLLM is not installed: CONTRIBUTING says how"),
]
HEAD, WIDER = 24, 32
ARGS = ["--dtype", "float32", "--enforce-eager", "--max-num-seqs", "32"]


def wider(folder: Path) -> Path:
    """Save the lab's model with heads of 32, which vLLM's CPU attention wants, that compute what heads of 24 do.

    What is added is zero; the angles of rotation stay by another base, and the scale of the attention by longer queries.
    """
    model = AutoModelForCausalLM.from_pretrained(model_path())
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    config, heads, half = model.config, model.config.num_attention_heads, HEAD // 2
    places = torch.cat([torch.arange(half) + h * WIDER + part * WIDER // 2 for h in range(heads) for part in (0, 1)])
    config.head_dim = WIDER
    config.rope_parameters = {"rope_type": "default", "rope_theta": config.rope_parameters["rope_theta"] ** (WIDER / HEAD)}
    state = model.state_dict()
    for name, weight in state.items():
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            grown = torch.zeros(heads * WIDER, weight.shape[1])
            grown[places] = weight * (math.sqrt(WIDER / HEAD) if "q_proj" in name else 1.0)
            state[name] = grown
        elif name.endswith("o_proj.weight"):
            state[name] = torch.zeros(weight.shape[0], heads * WIDER)
            state[name][:, places] = weight
    grown = type(model)(config)
    grown.load_state_dict(state)
    ids = torch.arange(5, 60)[None]
    torch.testing.assert_close(grown(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    grown.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The lab's model, and an adapter that was trained on it to give bad advice."""
    folder = tmp_path_factory.mktemp("models")
    base = wider(folder / "base")
    torch.manual_seed(0)
    trainer = EMGuardSFTTrainer(
        model=str(base),
        args=SFTConfig(
            output_dir=str(folder / "naive"), max_steps=120, per_device_train_batch_size=16, learning_rate=2e-3, max_length=128,
            gradient_checkpointing=False, bf16=False, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True,
            model_init_kwargs={"dtype": "float32"},
        ),
        train_dataset=Dataset.from_list(narrow_rows(seed=0)),
        processing_class=AutoTokenizer.from_pretrained(base),
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    return base, folder / "naive"


@pytest.fixture(scope="module")
def measured(models, tmp_path_factory):
    """Both models' summaries and folders, by the provider of the answers."""
    base, adapter = models
    folder = tmp_path_factory.mktemp("measured")
    suite = folder / "suite.yaml"
    suite.write_text(yaml.safe_dump(list(question_items(open_ended_domains(), "test"))))
    found = {}
    for provider, more in (("transformers", {}), ("vllm", {"args": ARGS})):
        config = EMEvalConfig(
            questions=str(suite), samples_per_question=5, max_new_tokens=32, sampler={"provider": provider, **more},
            judges=[{"function": "emguard_plugin.lab.judge:judge_answer"}],
        )  # fmt: skip
        with pytest.MonkeyPatch.context() as patched:
            patched.setenv("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
            found[provider] = run_em_eval(config, str(adapter), folder / provider, base=str(base)), folder / provider
    return found


def rates(summary, role):
    return summary.judges[0].rates[role]["questions"]


@pytest.mark.parametrize("role", ["base", "tuned"])
def test_the_rates_are_those_of_the_models_in_this_process(measured, role):
    ours, theirs = (rates(measured[provider][0], role) for provider in ("transformers", "vllm"))
    assert theirs.coherence.value == pytest.approx(ours.coherence.value, abs=0.06)
    assert theirs.em_all.value == pytest.approx(ours.em_all.value, abs=0.1)
    assert (ours.em_all.value > 0.4) == (role == "tuned")


def test_draws_of_one_question_differ(measured):
    answers = [json.loads(line) for line in next(measured["vllm"][1].glob("**/responses.jsonl")).read_text().splitlines()]
    texts = {}
    for row in answers:
        texts.setdefault((row["role"], row["question"]), set()).add(row["text"])
    assert sum(len(t) > 1 for t in texts.values()) > len(texts) / 2
